"""Command lines: read, continued, ended in one line where the user can mend what is wrong."""

import dataclasses
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments._lib.config import check_least, read_config
from experiments._lib.folder import new_folder
from experiments._lib.loop import NotFiniteError
from experiments._lib.signals import interruption, leave, with_stderr


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


def begin(args: TrainArgs) -> None:
    """Check what trainings have in common, and set the number of devices.

    Raises:
      ValueError: less than an epoch between checkpoints; both `out` and `resume`; no run in the
        folder to resume.
    """
    check_least("checkpoint_every", args.checkpoint_every, 1)
    check_least("num_devices", args.num_devices, 1)
    if args.num_devices is not None:
        jax.config.update("jax_num_cpu_devices", args.num_devices)
    if args.resume is not None:
        check_one_folder(args.out, args.resume)
        _config_of(args.resume)


def check_one_folder(out: pathlib.Path | None, resume: pathlib.Path | None) -> None:
    """Raises ValueError if there are both."""
    if out is not None and resume is not None:
        msg = f"--out {out} --resume {resume}: write one of them."
        raise ValueError(msg)


def train_in_folder(
    args: TrainArgs,
    train: Callable[..., list[dict]],
    draw: Callable[[list[dict], pathlib.Path], None],
    *words: str,
) -> tuple[pathlib.Path, list[dict]]:
    """A training as the command line asks for it, and its learning curve: run folder and rows.

    Args:
      args: after `begin`.
      train: `run.train` of an experiment.
      draw: `(rows, path)`, makes the picture of them.
      *words: of the run folder's name, where none is given.
    """
    folder = args.resume or args.out or new_folder(*words)
    rows = train(
        args.config,
        folder,
        resume=args.resume is not None,
        checkpoint_every=args.checkpoint_every,
        data_dir=args.data_dir,
    )
    draw(rows, folder / "learning_curve.png")
    return folder, rows


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
