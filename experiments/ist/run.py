"""Trainings in a run folder: a row a report and seed, and subnets that are left out of a round."""

import os
from typing import Any

import jax
import numpy as np

from experiments._lib import loop
from experiments._lib.loop import NotFiniteError
from experiments.ist import training


def train(
    config: training.Config,
    folder: str | os.PathLike,
    *,
    data_dir: str | None = None,
    report=loop.say,
    **how: Any,
) -> list[dict]:
    """Train as `config` says, in a run folder; returns the metrics, a row a report and seed.

    Every round follows from the state and (seed, round) alone. For the rows see `Rounds`.

    Args:
      config: the training.
      folder: the run folder.
      data_dir: where TFDS keeps its sets.
      report: told, a line at a time, what a person should know.
      **how: to resume, when to save and when to stop, as for `experiments._lib.loop.train`, which
        says what may be raised too.
    """
    config = training.resolve(config, data_dir)
    make = lambda: Rounds(training.build(config, data_dir), report)
    return loop.train(config, folder, make, report=report, **how)


class Rounds(loop.Training):
    """A step of the loop is an epoch that is reported (see `experiments.ist.training`).

    A row has the `epoch`, `seed`, `round` and `samples` (n J B each round) so far; since the row
    before it, `train_loss` (mean over the local steps of the subnets that stayed finite) and
    `left_out` (subnets of a round that did not); what the evaluation of the whole network finds,
    `test_accuracy` and with `--normalization travelling` `test_accuracy_uncalibrated`; and the
    `seconds` of the rounds so far, of all seeds together, without compilation and evaluation.
    """

    cure = "a lower --learning-rate, or --clip"

    def __init__(self, program: training.Program, say=loop.say):
        self.program, self.say, self.stream = program, say, program.stream
        self.state, self.total = program.state, program.stream.epochs

    def steps(self, start):
        return self.stream.reports(start)

    def prepare(self, state, start):
        state, _ = self.advance(state, start, start)  # no round
        return jax.block_until_ready(state)

    def advance(self, state, before, step):
        first, last = self.stream.rounds(before), self.stream.rounds(step)
        indices, count = self.stream(first, max(last, first + 1)), last - first
        args = self.program.seeds, indices, np.int32(first), np.int32(count), self.program.train
        state, metrics = self.program.rounds(state, *args)
        metrics = jax.tree.map(np.asarray, metrics)
        loss, finite = (metrics[name][:, :count] for name in ("loss", "finite"))
        return state, (loss, finite, metrics["sound"])

    def report(self, state, before, step, metrics, rows, seconds):
        (loss, finite, sound), seeds = metrics, self.stream.seeds
        first, done = self.stream.rounds(before), self.stream.rounds(step)
        _check_finite(finite, sound, seeds, first, step)
        found = self.program.evaluate(state["params"])
        for line in left_out(finite, seeds, first):
            self.say(f"epoch {step}, {line}")
        return [
            {
                "epoch": step,
                "seed": seed,
                "round": done,
                "samples": done * self.stream.samples_a_round,
                "train_loss": float(loss[s][finite[s]].mean()),
                **found[s],
                "left_out": int(np.sum(~finite[s])),
                "seconds": seconds,
            }
            for s, seed in enumerate(seeds)
        ]


def left_out(finite, seeds, first: int, most: int = 5) -> list[str]:
    """A line a seed that says in which rounds which subnets were left out, the first ones by name.

    Args:
      finite: bool `[seeds, rounds, n]`.
      seeds: their numbers.
      first: number of the first of the rounds.
      most: so many are named.
    """
    lines = []
    for seed, own in zip(seeds, finite, strict=True):
        places = [f"subnet {e} in round {first + r}" for r, e in np.argwhere(~own)]
        if places:
            more = f" and {len(places) - most} more" if len(places) > most else ""
            named = ", ".join(places[:most])
            lines.append(f"seed {seed}: NaN or Inf, left out of its round: {named}{more}.")
    return lines


def _check_finite(finite, sound, seeds, first, epoch):
    """Stop where nobody is left: a round in which no worker stayed finite, or NaN in the state."""
    nobody = ~finite.any(axis=2)  # [seeds, rounds]
    if sound.all() and not nobody.any():
        return
    bad = [(np.argmax(row) if row.any() else len(row) - 1, s) for s, row in enumerate(nobody)]
    place, s = min((place, s) for place, s in bad if nobody[s].any() or not sound[s])
    where = f"round {first + place} (epoch {epoch}), seed {seeds[s]}"
    msg = f"{where}: every worker became NaN or Inf"
    raise NotFiniteError(msg)
