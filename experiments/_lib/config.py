"""The configuration of a training as a file: read with every value checked, compared by name."""

import dataclasses
import difflib
import json
import math
import pathlib
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any

KINDS = {
    bool: "true or false",
    int: "a whole number between -2147483648 and 2147483647",
    float: "a finite number",
    str: "a text",
    types.NoneType: "null",
}
"""What an option of each type must be."""

Free = Callable[[dict, dict], set[str]]
"""Of the old and the new configuration: the options that may differ within one training."""


def longer(old: dict, new: dict) -> set[str]:
    """The usual `Free`: a longer training is the same one."""
    return {"epochs"}


def read_config(path: pathlib.Path, config_type: type) -> Any:
    """The configuration in a file that a training wrote.

    Args:
      path: a JSON object with one value for each field.
      config_type: the dataclass; its own checks run too.

    Raises:
      ValueError: the file is not such an object, or a value is none that the field may have.
      OSError: the file cannot be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        msg = f"{path}: {shown(str(error))}; it must be the JSON object that the training wrote."
        raise ValueError(msg) from error
    if not isinstance(found, dict):
        msg = f"{path}: {as_json(found)}; it must be the JSON object that the training wrote."
        raise ValueError(msg)
    kinds = typing.get_type_hints(config_type)
    fields = [field.name for field in dataclasses.fields(config_type)]
    for name in found:
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            msg = f"{path}: {as_json(name)} is no option; remove it.{hint}"
            raise ValueError(msg)
    for name in fields:
        options = typing.get_args(kinds[name]) or (kinds[name],)
        must = " or ".join(KINDS[kind] for kind in options)
        if name not in found:
            msg = f'{path}: no "{name}"; it must be {must}.'
            raise ValueError(msg)
        if not any(_is_a(found[name], kind) for kind in options):
            msg = f'{path}: "{name}" is {as_json(found[name])}; it must be {must}.'
            raise ValueError(msg)
    try:
        return config_type(**found)
    except ValueError as error:
        msg = f"{path}: {error}"
        raise ValueError(msg) from error


def _is_a(value, kind):
    if kind is float:
        if type(value) is int:
            return abs(value) <= 10**300
        return type(value) is float and math.isfinite(value)
    if kind is int:
        return type(value) is int and -(2**31) <= value < 2**31
    return type(value) is kind


def differences(old: Any, new: dict, free: Free = longer) -> str:
    """In words, what of two configurations must not differ and does; empty if nothing does.

    Args:
      old: as `dataclasses.asdict` gives it, perhaps through JSON.
      new: the same.
      free: what may differ.
    """
    missing = [name for name in new if name not in old]
    if missing:
        return f"no {', '.join(missing)} there"
    same = new.keys() - free(old, new)
    there = [name for name in new if name in same and old[name] != new[name]]
    return ", ".join(f"{k} {shown(old[k])} there, {shown(new[k])} here" for k in there)


def as_json(value: Any, most: int = 60) -> str:
    """A value as it stands in the file, cut to one line."""
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = type(value).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def shown(value: Any, most: int = 160) -> str:
    """A value in a message: one line, whatever is in it."""
    text = str(value)
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= most else f"{text[:most]}..."


# ---------------------------------------------------------------------------------------- options


def check_options(
    config: Any,
    choices: Mapping[str, Collection[str]],
    least: Mapping[str, float],
    positive: Collection[str] = (),
) -> None:
    """Raises ValueError at the first option that has none of its values.

    Args:
      config: a dataclass of options.
      choices: of some options all values.
      least: of others the least; the value may be None.
      positive: options whose value, where it is not None, must be above 0.
    """
    for name, known in choices.items():
        check_choice(name, getattr(config, name), known)
    for name, low in least.items():
        check_least(name, getattr(config, name), low)
    for name in positive:
        check_positive(name, getattr(config, name))


def check_choice(option: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError, with the nearest choice, if the option has none of its values."""
    if value not in choices:
        near = difflib.get_close_matches(str(value)[:100], choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"{_option(option)} {shown(value)}: write one of {', '.join(choices)}.{hint}"
        raise ValueError(msg)


def check_least(option: str, value: float | None, least: float) -> None:
    """Raises ValueError if the option has a value, and it is not finite or below the least."""
    if value is not None and not (least <= value < math.inf):
        msg = f"{_option(option)} {shown(value)}: write {least} or more."
        raise ValueError(msg)


def check_positive(option: str, value: float | None) -> None:
    """Raises ValueError if the option has a value, and it is not finite and above 0."""
    if value is not None and not (0 < value < math.inf):
        msg = f"{_option(option)} {shown(value)}: write a number above 0."
        raise ValueError(msg)


def check_seeds(first: int, number: int) -> None:
    """Raises ValueError if the seeds from `first` on are not all from 0 to 2147483647."""
    check_least("seeds", number, 1)
    most = 2**31 - number
    if not 0 <= first <= most:
        msg = f"--first-seed {shown(first)}: write a number between 0 and {most}."
        raise ValueError(msg)


def _option(name):
    return f"--{name.replace('_', '-')}"
