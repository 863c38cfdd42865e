"""What the scripts share: their command lines and their endings, run folders, rows of metrics."""

import contextlib
import csv
import dataclasses
import difflib
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
import sys
import time
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax

from experiments._config import Free, differences, longer, read_config, shown
from experiments._signals import interruption, leave, with_stderr

LOCK = "lock"
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


def parse(
    args_type: type, description: str | None = None, args: Sequence[str] | None = None
) -> Any:
    """The script's arguments; with --resume, whatever is not typed is as it was in that folder.

    Args:
      args_type: a dataclass, perhaps with a `config` and a `resume`.
      description: the help's first part.
      args: what was typed. Default: the command line.

    Raises:
      ValueError: there is no run to resume, or its configuration is damaged.
    """
    import tyro

    if {"config", "resume"} <= {field.name for field in dataclasses.fields(args_type)}:
        found, _ = tyro.cli(_Resume, args=args, return_unknown_args=True, add_help=False)
        if found.resume is not None:
            config_type = typing.get_type_hints(args_type)["config"]
            saved = read_config(_config_of(found.resume), config_type)
            default = args_type(config=saved)
            return tyro.cli(args_type, description=description, args=args, default=default)
    return tyro.cli(args_type, description=description, args=args)


@dataclasses.dataclass
class _Resume:
    resume: pathlib.Path | None = None


def _config_of(folder):
    path = folder / "config.json"
    if not path.exists():
        msg = f"--resume {folder}: no run there (no config.json)."
        raise ValueError(msg)
    return path


def begin(args: TrainArgs) -> tuple[Any, pathlib.Path | None]:
    """Set the number of devices; the configuration, and the run folder where one is given.

    Raises:
      ValueError: less than an epoch between checkpoints; both `out` and `resume`; no run in the
        folder to resume.
    """
    check_least("checkpoint_every", args.checkpoint_every, 1)
    check_least("num_devices", args.num_devices, 1)
    if args.num_devices is not None:
        jax.config.update("jax_num_cpu_devices", args.num_devices)
    if args.resume is None:
        return args.config, args.out
    if args.out is not None:
        msg = f"--out {args.out} --resume {args.resume}: write one of them."
        raise ValueError(msg)
    _config_of(args.resume)
    return args.config, args.resume


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
    Without a terminal to write to, the script works on.

    Args:
      main: the script.
      args_type: the dataclass of its arguments, `main`'s only one.
      description: the help's first part, the script's docstring.
      after_interrupt: what to do after an interruption.
    """
    with_stderr()
    interruption.install()
    try:
        main(parse(args_type, description))
    except BaseException as error:
        # JAX may have made an error of its own of the exception that a signal raised.
        if isinstance(error, KeyboardInterrupt) or (
            interruption.name is not None and isinstance(error, Exception)
        ):
            leave(f"\ninterrupted; {after_interrupt}")
        if isinstance(error, (ValueError, OSError, ImportError, MemoryError, NotFiniteError)):
            sys.exit(f"error: {error}")
        raise


# -------------------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def hold_folder(
    config: Any, folder: pathlib.Path, resume: bool, free: Free = longer
) -> Iterator[None]:
    """`open_folder`, and until the end no other process may hold it.

    The lock is the operating system's, on the file `lock`; it ends with the process however that
    ends. A file system without locks does without.

    Args:
      config: as for `open_folder`; so are the others.
      folder: the run folder.
      resume: whether anything may be in it.
      free: what may differ.

    Raises:
      BlockingIOError: another process holds the folder.
    """
    _check_free(folder, resume)
    with open(folder / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            msg = (
                f"run folder {folder} is in use by {file.read() or 'another process'}; wait for "
                "its end, or write another --out."
            )
            raise BlockingIOError(msg) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        open_folder(config, folder, resume, free)
        yield


def open_folder(
    config: Any,
    folder: pathlib.Path,
    resume: bool,
    free: Free = longer,
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
      ValueError: the folder holds a run of another configuration, or a damaged `config.json`.
    """
    path, new = _check_free(folder, resume), dataclasses.asdict(config)
    if path.exists():
        old = dataclasses.asdict(read_config(path, type(config)))
        changes = differences(old, new, free)
        if changes:
            msg = f"run folder {folder} holds another training ({changes}); write another --out."
            raise ValueError(msg)
    replace(path, json.dumps(new, indent=1))


def _check_free(folder, resume):
    """Make the folder, or see that a run may be in it; the path of its configuration."""
    path = folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    inside = {entry.name for entry in folder.iterdir()} - {_aside(path).name, LOCK}
    if inside and not resume:
        if path.name in inside:
            msg = f"exists; write --resume {folder} to continue it, or another --out."
        else:
            msg = f"holds files but no run (no {path.name}); write another --out."
        msg = f"run folder {folder} {msg}"
        raise FileExistsError(msg)
    return path


def replace(path: pathlib.Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
      OSError: it cannot be written; the file that was there stays.
    """
    aside = _aside(path)
    try:
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        msg = f"{path} could not be written: {error.strerror}; make room, or write another folder."
        raise OSError(msg) from error


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
