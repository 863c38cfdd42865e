"""Checkpoints of a training state in a run folder, by orbax: save, restore the newest good one."""

import os
import pathlib
import warnings
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


class Checkpoints:
    """A series of checkpoints under `folder`; orbax writes each to one side and renames it."""

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        self.folder = pathlib.Path(folder).resolve()
        self.keep = keep

    def _open(self):
        policies: Any = ocp.training.preservation_policies
        folder: Any = self.folder
        keep = policies.LatestN(self.keep)
        return ocp.training.Checkpointer(folder, preservation_policy=keep)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        with self._open() as checkpointer:
            return sorted(c.step for c in checkpointer.checkpoints)

    def save(self, step: int, state: Any) -> None:
        """Write a checkpoint; on failure the earlier ones stay, and the error says where.

        Raises:
          OSError: the disk is full or cannot be written.
        """
        try:
            with self._open() as checkpointer:
                checkpointer.save(step, state, overwrite=True)
        except Exception as error:  # orbax and tensorstore raise their own kinds
            last = self.steps()
            msg = (
                f"checkpoint of epoch {step} could not be saved under {self.folder}: {error}. The "
                f"last good one is that of epoch {last[-1] if last else 'none'}; make room and "
                "continue with --resume."
            )
            raise OSError(msg) from error

    def restore(self, like: Any, report) -> tuple[int, Any] | None:
        """The newest checkpoint that can be read, or None; `report(line)` is told of damaged ones.

        Args:
          like: a state of the same structure; shapes and dtypes must agree.
          report: called with one line for each checkpoint passed over.

        Raises:
          ValueError: checkpoints are there and none of them can be read.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        steps = self.steps()
        for step in reversed(steps):
            try:
                with self._open() as checkpointer, warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    return step, checkpointer.load(step, abstract)
            except Exception as error:  # damaged files raise whatever tensorstore meets
                line = str(error).splitlines()[0][:160]
                report(f"checkpoint of epoch {step} is damaged ({line}); trying the one before.")
        if steps:
            msg = f"none of the checkpoints of epochs {steps} under {self.folder} can be read."
            raise ValueError(msg)
        return None
