"""What the scripts share: their command lines and their endings, run folders, rows of metrics."""

import csv
import dataclasses
import difflib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import jax

INTEGERS = ("epoch", "seed", "round", "samples", "left_out")


class NotFiniteError(RuntimeError):
    """The loss became NaN or Inf."""


# ----------------------------------------------------------------------------------------- commands


@dataclasses.dataclass
class TrainArgs:
    """What the commands that train have in common."""

    config: Any
    """The experiment's own options, a dataclass."""
    out: pathlib.Path | None = None
    """Run folder; must not exist."""
    resume: pathlib.Path | None = None
    """Run folder to continue, with its own configuration; --epochs may be larger."""
    checkpoint_every: int = 5
    """Epochs between checkpoints."""
    num_devices: int | None = None
    """Virtual devices of the CPU, to try --devices pmap or shard_map without an accelerator."""
    data_dir: str | None = None
    """Where TFDS keeps its sets. Default: TFDS_DATA_DIR, else TFDS's own."""


def check_choice(option: str, value: Any, choices: Collection[str]) -> None:
    """Raises ValueError, with the nearest choice, if the option has none of its values."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"--{option} {value}: write one of {', '.join(choices)}.{hint}"
        raise ValueError(msg)


def check_least(option: str, value: float | None, least: int) -> None:
    """Raises ValueError if the option has a value, and one below the least."""
    if value is not None and value < least:
        msg = f"--{option.replace('_', '-')} {value}: write {least} or more."
        raise ValueError(msg)


def begin(args: TrainArgs) -> tuple[Any, pathlib.Path | None]:
    """Set the number of devices; the configuration, and the run folder where one is given.

    Raises:
      ValueError: less than an epoch between checkpoints; both `out` and `resume`; no run in the
        folder to resume.
    """
    check_least("checkpoint_every", args.checkpoint_every, 1)
    if args.num_devices is not None:
        jax.config.update("jax_num_cpu_devices", args.num_devices)
    if args.resume is None:
        return args.config, args.out
    if args.out is not None:
        msg = f"--out {args.out} --resume {args.resume}: write one of them."
        raise ValueError(msg)
    return saved_config(args.resume, args.config), args.resume


def new_folder(*words: str) -> pathlib.Path:
    """A run folder under `runs/`, named after the training and the time."""
    return pathlib.Path("runs") / "-".join((*words, time.strftime("%Y%m%d-%H%M%S")))


def mean_at_end(rows: list[dict], column: str) -> str:
    """Mean over the seeds in the last epoch, and with two seeds or more the standard deviation."""
    last = [row[column] for row in rows if row["epoch"] == rows[-1]["epoch"]]
    mean = sum(last) / len(last)
    std = (sum((x - mean) ** 2 for x in last) / max(len(last) - 1, 1)) ** 0.5
    return f"{mean:.4f}" + (f" +- {std:.4f} ({len(last)} seeds)" if len(last) > 1 else "")


def run_script(
    main: Callable[[Any], Any],
    args_type: type,
    description: str | None,
    after_interrupt: str = "the same command continues.",
) -> None:
    """Call `main` with the command line's arguments; an error the user can mend ends in one line.

    SIGTERM ends the script as Ctrl-C does: what is open is closed, and a line says how to go on.

    Args:
      main: the script.
      args_type: the dataclass of its arguments, `main`'s only one.
      description: the help's first part, the script's docstring.
      after_interrupt: what to do after an interruption.
    """
    import tyro

    def stop(signum, _):
        raise KeyboardInterrupt(signal.Signals(signum).name)

    for number in (signal.SIGTERM, signal.SIGINT):  # Python's own of SIGINT asyncio would replace
        if signal.getsignal(number) != signal.SIG_IGN:  # as a shell's background jobs have it
            signal.signal(number, stop)
    try:
        main(tyro.cli(args_type, description=description))
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted; {after_interrupt}")
    except (ValueError, OSError, ImportError, NotFiniteError) as error:
        sys.exit(f"error: {error}")


# -------------------------------------------------------------------------------------- run folders


def open_folder(
    config: Any,
    folder: pathlib.Path,
    resume: bool,
    free: Callable[[dict, dict], set[str]] = lambda old, new: {"epochs"},
) -> None:
    """Make the run folder, or see that it holds the same training; write `config.json`.

    A folder where a start was interrupted before it wrote `config.json` is as good as none.

    Args:
      config: a dataclass.
      folder: the run folder.
      resume: whether anything may be in it.
      free: of the old and the new configuration: what may differ. A longer training is the same.

    Raises:
      FileExistsError: something is in the folder and `resume` is False.
      ValueError: the folder holds a run of another configuration.
    """
    path = folder / "config.json"
    text = json.dumps(dataclasses.asdict(config), indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    inside = {entry.name for entry in folder.iterdir()} - {_aside(path).name}
    if inside and not resume:
        if path.name in inside:
            msg = f"exists; write --resume {folder} to continue it, or another --out."
        else:
            msg = f"holds files but no run (no {path.name}); write another --out."
        msg = f"run folder {folder} {msg}"
        raise FileExistsError(msg)
    if path.exists():
        old, new = json.loads(path.read_text()), dataclasses.asdict(config)
        same = new.keys() - free(old, new)
        differ = [k for k in new if k in same and old.get(k) != new[k]]
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
    aside = _aside(path)
    aside.write_text(text)
    os.replace(aside, path)


def _aside(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(path.suffix + ".tmp")


def paste(readme: pathlib.Path, name: str, text: str) -> None:
    """Put a text between `<!-- name -->` and `<!-- /name -->`."""
    whole = readme.read_text()
    before, found, rest = whole.partition(f"<!-- {name} -->\n")
    _, ends, after = rest.partition(f"<!-- /{name} -->")
    if not found or not ends:
        msg = f"{readme}: no <!-- {name} --> with <!-- /{name} --> after it."
        raise ValueError(msg)
    replace(readme, f"{before}{found}\n{text}\n{ends}{after}")


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
