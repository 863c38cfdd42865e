"""Checkpoints of a training state in a run folder, by orbax: save, restore the newest good one."""

import contextlib
import os
import pathlib
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end; the second of them at once.

    An interrupted save of orbax may wait five minutes for itself, and asyncio, which it runs in,
    may swallow a Ctrl-C altogether.
    """
    if threading.current_thread() is not threading.main_thread():  # who is never interrupted
        yield
        return
    came = []

    def later(number, frame):
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    def restore():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    known = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    handlers = {n: handler for n, handler in known.items() if handler is not None}
    for number in handlers:
        signal.signal(number, later)
    try:
        yield
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])


class Checkpoints:
    """A series of checkpoints under `folder`; orbax writes each to one side and renames it.

    With many processes every one of them saves and restores, its own shards of global arrays, and
    a failure of one is its own: it raises there, and does not wait for the others. What one of them
    cannot read all pass over.

    Args:
      folder: where they are, the same for all processes.
      keep: how many of the newest are kept.
      unit: what a step is called in messages.
      everybody: with many processes, `(name, yes) -> bool`, whether all of them say yes.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int = 3,
        unit: str = "epoch",
        everybody: Callable[[str, bool], bool] = lambda name, yes: yes,
    ):
        self.folder = pathlib.Path(folder).resolve()
        self.keep = keep
        self.unit = unit
        self.everybody = everybody

    def _open(self):
        policies: Any = ocp.training.preservation_policies
        folder: Any = self.folder
        keep = policies.LatestN(self.keep)
        return ocp.training.Checkpointer(folder, preservation_policy=keep)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first: the renamed ones."""
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def save(self, step: int, state: Any) -> None:
        """Write a checkpoint; on failure the earlier ones stay, and the error says where.

        Raises:
          OSError: the disk is full or cannot be written.
        """
        try:
            self._save(step, state)
        except Exception as error:  # orbax and tensorstore raise their own kinds
            last = self.steps()
            msg = (
                f"checkpoint of {self.unit} {step} could not be saved under {self.folder}: {error}."
                f" The last good one is that of {self.unit} {last[-1] if last else 'none'}; make "
                "room and continue with --resume."
            )
            raise OSError(msg) from error

    def _save(self, step, state):
        if jax.process_count() == 1:
            with uninterrupted(), self._open() as checkpointer:
                checkpointer.save(step, state, overwrite=True)
            return
        # A Checkpointer whose save failed here would wait for the others, who wait for this one.
        # With overwrite=True all wait for ever, one time in some, where one could not be read.
        path = self.folder / str(step)
        if jax.process_index() == 0 and path.exists():
            self._remove(path)
        self.everybody(f"room for {step}", True)
        ocp.save(str(path), state)
        if jax.process_index() == 0:
            for old in self.steps()[: -self.keep]:
                self._remove(self.folder / str(old))

    @staticmethod
    def _remove(path):
        """First under another name, so that no half of it is ever taken for a checkpoint."""
        aside = path.with_name(f"{path.name}.old")
        os.replace(path, aside)
        shutil.rmtree(aside)

    def restore(self, like: Any, report) -> tuple[int, Any] | None:
        """The newest checkpoint that can be read, or None; `report(line)` is told of damaged ones.

        Args:
          like: a state of the same structure; shapes and dtypes must agree. The result has its
            shardings, whatever they were when it was saved.
          report: called with one line for each checkpoint passed over.

        Raises:
          ValueError: checkpoints are there and none of them can be read.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        steps = self.steps()
        self._tidy()
        for step in reversed(steps):
            how, state = "could not be read by another process", None
            try:
                state = self._load(step, abstract)
            except Exception as error:  # damaged files raise whatever tensorstore meets
                words = str(error) or type(error).__name__
                how = f"is damaged ({words.splitlines()[0][:160]})"
            if self.everybody(f"restored {step}", state is not None):
                return step, state
            report(f"checkpoint of {self.unit} {step} {how}; trying the one before.")
        if steps:
            msg = (
                f"none of the checkpoints of {self.unit}s {steps} under {self.folder} can be read."
            )
            raise ValueError(msg)
        return None

    def _tidy(self):
        """Remove what a process that died left half written, or half removed."""
        if jax.process_count() > 1 and jax.process_index() == 0:
            for pattern in ("*.orbax-checkpoint-tmp", "*.old"):
                for path in self.folder.glob(pattern):
                    shutil.rmtree(path)

    def _load(self, step, abstract):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if jax.process_count() > 1:
                # Alone: who cannot read would leave the others waiting at orbax's barrier.
                me = jax.process_index()
                alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
                with ocp.Context(multiprocessing_options=alone):
                    return ocp.load(str(self.folder / str(step)), abstract)
            with self._open() as checkpointer:
                return checkpointer.load(step, abstract)
