"""Trainings in a run folder: a row an epoch and seed, and where a loss stops being a number."""

import math
import os
from typing import Any

import jax
import numpy as np

from experiments._lib import loop
from experiments._lib.loop import NotFiniteError
from experiments._lib.program import sound
from experiments.psl import training


def train(
    config: training.Config,
    folder: str | os.PathLike,
    *,
    data_dir: str | None = None,
    report=loop.say,
    **how: Any,
) -> list[dict]:
    """Train as `config` says, in a run folder; returns the metrics, a row an epoch and seed.

    Every epoch follows from the state and (seed, epoch) alone.

    Args:
      config: the training.
      folder: the run folder.
      data_dir: where TFDS keeps its sets.
      report: told, a line at a time, what a person should know.
      **how: to resume, and how often to save, as for `experiments._lib.loop.train`, which says
        what may be raised too.
    """

    def make():
        program = training.build(config, data_dir)
        if config.compute != "fused":
            report(
                f"padding: {program.batches.padding_factor():.2f} slots per sample "
                "(batches sorted by label; 1.00 would be none)"
            )
        return Epochs(config, program)

    return loop.train(config, folder, make, report=report, **how)


class Epochs(loop.Training):
    """A step of the loop is an epoch of all seeds."""

    cure = "a lower --learning-rate, --clip or --margin-bound"

    def __init__(self, config: training.Config, program: training.Program):
        self.program, self.state, self.total = program, program.state, config.epochs
        self.seeds = range(config.first_seed, config.first_seed + config.seeds)

    def advance(self, state, before, step):
        state, metrics = self.program.epoch(state, self.program.batches(before), self.program.train)
        return state, jax.tree.map(np.asarray, metrics)

    def report(self, state, before, step, metrics, rows, seconds):
        check_finite(metrics, np.asarray(sound(state)), rows, self.seeds, step)
        accuracy = np.asarray(self.program.accuracy(state["params"], self.program.test))
        return [
            {
                "epoch": step,
                "seed": seed,
                "train_loss": float(metrics["loss"][s].mean()),
                "test_accuracy": float(accuracy[s]),
                "max_margin": float(metrics["max_margin"][s].max()),
                "median_grad_norm": float(np.median(metrics["grad_norm"][s])),
                "max_grad_norm": float(metrics["grad_norm"][s].max()),
            }
            for s, seed in enumerate(self.seeds)
        ]


def check_finite(metrics, sound, rows, seeds, epoch) -> None:
    """Raises NotFiniteError at the first loss that is not finite, or where the state is not.

    Args:
      metrics: `loss` and `max_margin` of the epoch, `[seeds, steps]`.
      sound: whether a seed's state is finite after it, `[seeds]`.
      rows: of the epochs before.
      seeds: their numbers.
      epoch: its number.
    """
    finite = np.isfinite(metrics["loss"])  # [seeds, steps]
    if finite.all() and sound.all():
        return
    last = finite.shape[1] - 1
    bad = [(last if own.all() else np.argmin(own), s) for s, own in enumerate(finite)]
    step, s = min((step, s) for step, s in bad if not (finite[s].all() and sound[s]))
    loss = metrics["loss"][s, step]
    place = f"step {step + 1} of epoch {epoch}, seed {seeds[s]}"
    if finite[s, step]:
        what = f"NaN or Inf in the weights or the optimizer's state after {place} (loss {loss:.4g})"
    else:
        what = f"loss {loss} at {place}"
    margin = _largest_margin(metrics["max_margin"][s, : step + 1], rows, seeds[s])
    msg = f"{what}; {margin}"
    raise NotFiniteError(msg)


def _largest_margin(margins, rows, seed):
    """In words: of the last step where it is finite, else of the last such epoch."""
    known = np.flatnonzero(np.isfinite(margins))
    if len(known):
        return f"the largest margin of step {known[-1] + 1} was {margins[known[-1]]:.4g}"
    for row in reversed(rows):
        if row["seed"] == seed and math.isfinite(row["max_margin"]):
            return f"the largest margin of epoch {row['epoch']} was {row['max_margin']:.4g}"
    return "no margin until then was finite"
