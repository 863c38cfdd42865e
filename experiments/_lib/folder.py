"""Run folders: made, locked, continued only by the same training; files written whole or not."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from experiments._lib.config import Free, differences, longer, read_config

LOCK = "lock"


def new_folder(*words: str) -> pathlib.Path:
    """A run folder under `runs/`, named after the training and the time."""
    return pathlib.Path("runs") / "-".join((*words, time.strftime("%Y%m%d-%H%M%S")))


def results_folder(
    tracked: pathlib.Path, commit: bool, asked: pathlib.Path | None = None
) -> pathlib.Path:
    """Where a program reads and writes its results; it says so.

    Args:
      tracked: the folder of the results that are in git, `experiments/<paper>/results`.
      commit: whether to write there, which `--commit-results` asks for.
      asked: another folder, which `--out` or `--results` asks for.

    Returns:
      Unless one of them is asked for, `runs/results/<paper>`, which begins as a copy of `tracked`.
    """
    if asked is not None or commit:
        folder = tracked if asked is None else asked
    else:
        folder = pathlib.Path("runs", "results", tracked.parent.name)
        for path in filter(pathlib.Path.is_file, tracked.rglob("*")):
            own = folder / path.relative_to(tracked)
            if not own.exists():
                own.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, own)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"results: {folder}", file=sys.stderr)
    return folder


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


def open_folder(config: Any, folder: pathlib.Path, resume: bool, free: Free = longer) -> None:
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
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text)
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        msg = f"{path} could not be written: {error.strerror}; make room, or write another folder."
        raise OSError(msg) from error


def _aside(path: pathlib.Path) -> pathlib.Path:
    return path.with_suffix(path.suffix + ".tmp")
