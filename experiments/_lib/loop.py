"""The loop of every training: progress bar, rows of metrics, checkpoints, exact resume.

A training counts its steps, epochs or rounds, from 1. It says from which state it starts, how a
state becomes that of a later step, and what is reported there. All of it follows from the state and
the step's number, so that a training which was interrupted at any moment and resumed ends with the
same parameters, bit for bit, as one that was not.
"""

import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from experiments._lib.checkpoint import Checkpoints
from experiments._lib.folder import hold_folder
from experiments._lib.signals import interruption
from experiments._lib.tables import read_rows, write_rows


class NotFiniteError(RuntimeError):
    """The loss became NaN or Inf."""


def say(line: str) -> None:
    """To whoever looks at the terminal."""
    print(line, file=sys.stderr, flush=True)


class Training:
    """What the loop asks of a training; each has its own subclass.

    Attributes:
      state: before the first step, or like it.
      total: number of the last step.
      unit: what a step is called.
      headline: column of the rows that the progress bar shows.
      cure: what to try where the training becomes NaN or Inf.
      silent: whether another process reports.
    """

    state: Any
    total: int
    unit = "epoch"
    headline = "test_accuracy"
    cure = "a lower --learning-rate"
    silent = False

    def steps(self, start: int) -> Sequence[int]:
        """The steps later than `start` whose states the loop sees."""
        return range(start + 1, self.total + 1)

    def prepare(self, state: Any, start: int) -> Any:
        """Compile, before the clock runs; the state as it was."""
        return state

    def advance(self, state: Any, before: int, step: int) -> tuple[Any, Any]:
        """The state after a step, from that after the step before, and its metrics."""
        raise NotImplementedError

    def reports(self, step: int) -> bool:
        """Whether there are rows of this step."""
        return True

    def report(self, state, before: int, step: int, metrics, rows, seconds: float) -> list[dict]:
        """Rows of metrics.csv that the step adds, each with its number under `unit`.

        Args:
          state: after the step.
          before: the step before it.
          step: its number.
          metrics: what `advance` has returned.
          rows: those so far.
          seconds: in `advance`, so far.

        Raises:
          NotFiniteError: NaN or Inf; says where.
        """
        raise NotImplementedError

    def saved(self, state: Any, step: int) -> Any:
        """What a checkpoint holds."""
        return state

    def loaded(self, saved: Any) -> Any:
        """The state, from what a checkpoint holds."""
        return saved


def train(
    config: Any,
    folder: str | os.PathLike,
    make: Callable[[], Training],
    keep: int = 3,
    *,
    resume: bool = False,
    checkpoint_every: int = 5,
    **how: Any,
) -> list[dict]:
    """`run` in a run folder that no other process may use meanwhile, and that gets `config.json`.

    Args:
      config: of the training, a dataclass; the folder may hold no other training.
      folder: the run folder.
      make: gives the training, as soon as the folder is held.
      keep: number of checkpoints that stay.
      resume: as for `run`; so are the others.
      checkpoint_every: epochs between checkpoints.
      **how: the rest.

    Raises:
      FileExistsError: something is in the folder and `resume` is False.
      BlockingIOError: another process trains in the folder.
      ValueError: the folder holds a run of another configuration.
      NotFiniteError: NaN or Inf; the last good checkpoint stays.
      OSError: a checkpoint or the rows cannot be written.
    """
    folder = pathlib.Path(folder)
    with hold_folder(config, folder, resume):
        checkpoints = Checkpoints(folder / "checkpoints", keep, config=config)
        cadence: Any = {"resume": resume, "checkpoint_every": checkpoint_every}
        return run(make(), folder, checkpoints, **cadence, **how)


def run(
    training: Training,
    folder: pathlib.Path,
    checkpoints: Checkpoints,
    *,
    resume: bool,
    checkpoint_every: int,
    stop: Callable[[list[dict]], bool | None] = lambda rows: None,
    report: Callable[[str], None] = say,
) -> list[dict]:
    """Train in a run folder that is held; returns the rows of metrics.csv.

    The folder gets `metrics.csv`, rewritten whole after every report, and `checkpoints/`.

    Args:
      training: what is trained.
      folder: the run folder.
      checkpoints: those in it.
      resume: continue from the newest good checkpoint; without one, from the start.
      checkpoint_every: a checkpoint at the first step at or after each multiple of this, and at
        the end.
      stop: told the rows after every report; if it returns True the training ends.
      report: told, a line at a time, what a person should know.

    Raises:
      NotFiniteError: NaN or Inf; the last good checkpoint stays.
      ValueError: no checkpoint can be read, or they are of another training.
      OSError: a checkpoint or the rows cannot be written.
    """
    state, rows, start, seconds = training.state, [], 0, 0.0
    saved = checkpoints.restore(training.saved(state, 0), report) if resume else None
    if saved is not None:
        start, state = saved[0], training.loaded(saved[1])
        rows = [r for r in read_rows(folder / "metrics.csv") if r[training.unit] <= start]
        seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
        if not training.silent:
            report(f"continuing after {training.unit} {start}.")
    steps = training.steps(start)
    if not steps:
        return rows
    state, before, every = training.prepare(state, start), start, checkpoint_every
    bar = tqdm(
        total=training.total,
        initial=start,
        unit=training.unit,
        desc=folder.name,
        disable=training.silent,
    )
    with bar:
        for step in steps:
            interruption.check()
            began = time.perf_counter()
            state, metrics = training.advance(state, before, step)
            seconds += time.perf_counter() - began
            last = step == training.total
            if training.reports(step):
                try:
                    new = training.report(state, before, step, metrics, rows, seconds)
                except NotFiniteError as error:
                    good = max(checkpoints.steps(), default=0)
                    msg = (
                        f"{error}. The last good checkpoint is that of {training.unit} {good}; try "
                        f"{training.cure}."
                    )
                    raise NotFiniteError(msg) from None
                rows += new
                if new:
                    write_rows(folder / "metrics.csv", rows)
                    mean = lambda column, own=new: math.fsum(r[column] for r in own) / len(own)
                    shown = {"loss": mean("train_loss"), "accuracy": mean(training.headline)}
                    bar.set_postfix({name: f"{value:.4f}" for name, value in shown.items()})
                last = bool(stop(rows)) or last
            if step // every > before // every or last:
                checkpoints.save(step, training.saved(state, step))
            bar.update(step - before)
            before = step
            if last:
                break
    return rows
