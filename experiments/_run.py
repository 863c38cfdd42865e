"""What every training loop does with its run folder: open it, write rows of metrics, read them."""

import csv
import dataclasses
import json
import os
import pathlib
from typing import Any

INTEGERS = ("epoch", "seed", "round", "samples", "left_out")


class NotFiniteError(RuntimeError):
    """The loss became NaN or Inf."""


def open_folder(config: Any, folder: pathlib.Path, resume: bool) -> None:
    """Make the run folder, or see that it holds the same training; write `config.json`.

    Args:
      config: a dataclass. A longer training (`epochs`) is the same training.
      folder: the run folder.
      resume: whether it may exist.

    Raises:
      FileExistsError: the folder exists and `resume` is False.
      ValueError: the folder holds a run of another configuration.
    """
    path = folder / "config.json"
    text = json.dumps(dataclasses.asdict(config), indent=1)
    if not folder.exists():
        folder.mkdir(parents=True)
    elif not resume:
        msg = (
            f"run folder {folder} exists; write --resume {folder} to continue it, or another --out."
        )
        raise FileExistsError(msg)
    elif path.exists():
        # A longer training is the same training; anything else is another one.
        old, new = json.loads(path.read_text()), dataclasses.asdict(config)
        differ = [k for k in new if k != "epochs" and old.get(k) != new[k]]
        if differ:
            changes = ", ".join(f"{k} {old.get(k)} there, {new[k]} here" for k in differ)
            msg = f"run folder {folder} holds another training ({changes}); write another --out."
            raise ValueError(msg)
    replace(path, text)


def saved_config(folder: pathlib.Path, given: Any) -> Any:
    """The folder's configuration, with whatever in `given` differs from the defaults.

    Raises:
      ValueError: no run there.
    """
    path = folder / "config.json"
    if not path.is_file():
        msg = f"--resume {folder}: no run there (no config.json)."
        raise ValueError(msg)
    default, new = dataclasses.asdict(type(given)()), dataclasses.asdict(given)
    changed = {name: value for name, value in new.items() if value != default[name]}
    return type(given)(**{**json.loads(path.read_text()), **changed})


def replace(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all."""
    aside = path.with_suffix(path.suffix + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def write_rows(path: pathlib.Path, rows: list[dict]) -> None:
    """A CSV of the rows, all with the columns of the first one."""
    lines = [",".join(rows[0])] if rows else []
    lines += [
        ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values())
        for row in rows
    ]
    replace(path, "\n".join(lines) + "\n")


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Rows of a metrics CSV, numbers as numbers."""
    with open(path, newline="") as file:
        return [
            {k: int(v) if k in INTEGERS else float(v) for k, v in row.items()}
            for row in csv.DictReader(file)
        ]
