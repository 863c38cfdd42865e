"""Checkpoints of a training state in a run folder, by orbax: save, restore the newest good one."""

import contextlib
import dataclasses
import logging
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from experiments._lib.config import Free, differences, longer, shown
from experiments._lib.signals import uninterrupted


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
      config: the training's configuration; a checkpoint carries it, and one that was saved with
        another is refused. None: not carried, not looked at.
      free: as in `experiments._lib.folder.open_folder`.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        keep: int = 3,
        unit: str = "epoch",
        everybody: Callable[[str, bool], bool] = lambda name, yes: yes,
        config: Any = None,
        free: Free = longer,
    ):
        self.folder = pathlib.Path(folder).resolve()
        self.keep = keep
        self.unit = unit
        self.everybody = everybody
        self.config = None if config is None else dataclasses.asdict(config)
        self.free = free

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
            with _quietly():
                self._save(step, state)
        except Exception as error:  # orbax and tensorstore raise their own kinds
            last = self.steps()
            msg = (
                f"checkpoint of {self.unit} {step} could not be saved under {self.folder}: "
                f"{_in_short(error)}. The last good one is that of {self.unit} "
                f"{last[-1] if last else 'none'}; make room and continue with --resume."
            )
            raise OSError(msg) from error

    def _save(self, step, state):
        about: dict[str, Any] = {"configuration": self.config}
        if jax.process_count() == 1:
            with uninterrupted(), self._open() as checkpointer:
                checkpointer.save(step, state, overwrite=True, custom_metadata=about)
            return
        # A Checkpointer whose save failed here would wait for the others, who wait for this one.
        # With overwrite=True all wait for ever, one time in some, where one could not be read.
        path = self.folder / str(step)
        if jax.process_index() == 0 and path.exists():
            self._remove(path)
        self.everybody(f"room for {step}", True)
        ocp.save(str(path), state, custom_metadata=about)
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
          ValueError: checkpoints are there and none of them can be read; or the newest that can be
            is of another training.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        steps = self.steps()
        self._tidy()
        for step in reversed(steps):
            how, state, another = "could not be read by another process", None, ""
            try:
                with _alone():
                    another = self._differences(step)
                    state = None if another else self._load(step, abstract)
            except Exception as error:  # damaged files raise whatever tensorstore meets
                how = f"is damaged ({_in_short(error)})"
            if another:  # for every process: they all read the same
                msg = (
                    f"checkpoint of {self.unit} {step} under {self.folder} is of another training "
                    f"({another}); remove it, or continue the training that it belongs to."
                )
                raise ValueError(msg)
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

    def _differences(self, step):
        """In words, how the training that saved it differs; nothing where it does not say."""
        if self.config is None:
            return ""
        carried = ocp.metadata(str(self.folder / str(step))).custom_metadata
        found = carried.get("configuration") if isinstance(carried, dict) else None
        return differences(found, self.config, self.free) if isinstance(found, dict) else ""

    def _load(self, step, abstract):
        if jax.process_count() > 1:
            return ocp.load(str(self.folder / str(step)), abstract)
        with self._open() as checkpointer:
            return checkpointer.load(step, abstract)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One process reads by itself: if it cannot, no other waits for it at orbax's barrier."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if jax.process_count() == 1:
            yield
            return
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        with ocp.Context(multiprocessing_options=alone):
            yield


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without orbax's own log: each of its threads would print the traceback of one failure."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def _in_short(error):
    """An error of orbax or tensorstore in one line; of the operating system's, its words."""
    words = str(error) or type(error).__name__
    number = re.search(r"os_error_code='(\d+)'", words)
    return os.strerror(int(number[1])) if number else shown(words.splitlines()[0])
