"""The loop around the compiled rounds: run folder, progress bar, CSV, checkpoints, exact resume."""

import os
import pathlib
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from experiments._checkpoint import Checkpoints
from experiments._run import NotFiniteError, hold_folder, read_rows, write_rows
from experiments._signals import interruption
from experiments.ist import training


def train(
    config: training.Config,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    checkpoint_every: int = 5,
    data_dir: str | None = None,
    stop=lambda rows: False,
    report=lambda line: print(line, file=sys.stderr, flush=True),
) -> list[dict]:
    """Train as `config` says, in a run folder; returns the metrics, a row a report and seed.

    The folder gets `config.json`, `metrics.csv` (rewritten whole after every epoch) and
    `checkpoints/`. A training that was interrupted at any moment and resumed ends with the same
    parameters, bit for bit, as one that was not: every round follows from the state and (seed,
    round) alone.

    A row has the `epoch` (see `experiments.ist.training`), `seed`, `round` and `samples` (n J B
    each round) so far; since the row before it, `train_loss` (mean over the local steps of the
    subnets that stayed finite) and `left_out` (subnets of a round that did not); `test_accuracy`
    of the whole network, and with `--normalization travelling` `test_accuracy_uncalibrated`; and
    the `seconds` of the rounds so far, of all seeds together, without compilation and evaluation.

    Args:
      config: the training.
      folder: the run folder.
      resume: continue from the newest good checkpoint in `folder`; without one, from the start.
      checkpoint_every: epochs between checkpoints; there is always one at the end.
      data_dir: where TFDS keeps its sets.
      stop: told the rows after every report, whether to end before `config.epochs`.
      report: told, a line at a time, what a person should know.

    Raises:
      FileExistsError: the folder exists and `resume` is False.
      BlockingIOError: another process trains in the folder.
      ValueError: the folder holds a run of another configuration.
      NotFiniteError: every worker became NaN or Inf; the last good checkpoint stays.
      OSError: a checkpoint cannot be written.
    """
    folder, config = pathlib.Path(folder), training.resolve(config, data_dir)
    with hold_folder(config, folder, resume):
        return _train(config, folder, resume, checkpoint_every, data_dir, stop, report)


def _train(config, folder, resume, checkpoint_every, data_dir, stop, report):
    program = training.build(config, data_dir)
    stream, state, rows, start, seconds = program.stream, program.state, [], 0, 0.0
    checkpoints = Checkpoints(folder / "checkpoints", config=config)
    restored = checkpoints.restore(state, report) if resume else None
    if restored is not None:
        start, state = restored
        rows = [row for row in read_rows(folder / "metrics.csv") if row["epoch"] <= start]
        seconds = rows[-1]["seconds"] if rows else 0.0
        report(f"continuing after epoch {start}.")

    def rounds(state, first, last):
        indices = stream(first, max(last, first + 1))
        numbers = np.int32(first), np.int32(last - first)
        return program.rounds(state, program.seeds, indices, *numbers, program.train)

    done = stream.rounds(start)
    state, _ = rounds(state, done, done)  # compiles; no round, the state as it was
    jax.block_until_ready(state)
    saved = start
    with tqdm(total=config.epochs, initial=start, unit="epoch", desc=folder.name) as bar:
        for epoch in stream.reports(start):
            interruption.check()
            first, done, before = done, stream.rounds(epoch), time.perf_counter()
            state, metrics = rounds(state, first, done)
            metrics = jax.tree.map(np.asarray, metrics)
            seconds += time.perf_counter() - before
            loss, finite = (metrics[name][:, : done - first] for name in ("loss", "finite"))
            _check_finite(finite, metrics["sound"], stream.seeds, first, epoch, checkpoints)
            accuracy = program.accuracy(
                state["params"], program.test, program.train, program.sample
            )
            accuracy = jax.tree.map(np.asarray, accuracy)
            found = [
                {name: float(values[s]) for name, values in accuracy.items()}
                for s in range(len(stream.seeds))
            ]
            rows += report_rows(stream, epoch, done, loss, finite, found, seconds)
            for line in left_out(finite, stream.seeds, first):
                report(f"epoch {epoch}, {line}")
            write_rows(folder / "metrics.csv", rows)
            last = epoch == config.epochs or stop(rows)
            if epoch >= saved + checkpoint_every or last:
                checkpoints.save(epoch, state)
                saved = epoch
            mean = accuracy["test_accuracy"].mean()
            bar.set_postfix(loss=f"{loss[finite].mean():.4f}", accuracy=f"{mean:.4f}")
            bar.update(epoch - bar.n)
            if last:
                break
    return rows


def report_rows(stream, epoch, done, loss, finite, found, seconds) -> list[dict]:
    """What a report says, a row a seed; the columns are those of `train`.

    Args:
      stream: of the training, a `training.Stream`.
      epoch: the report's.
      done: rounds so far.
      loss: of the workers since the last report, `[seeds, rounds, n]`.
      finite: which of the workers stayed finite, bool like `loss`.
      found: columns of the evaluation, `{name: value}` a seed.
      seconds: of the rounds so far.
    """
    return [
        {
            "epoch": epoch,
            "seed": seed,
            "round": done,
            "samples": done * stream.samples_a_round,
            "train_loss": float(loss[s][finite[s]].mean()),
            **found[s],
            "left_out": int(np.sum(~finite[s])),
            "seconds": seconds,
        }
        for s, seed in enumerate(stream.seeds)
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


def _check_finite(finite, sound, seeds, first, epoch, checkpoints):
    """Stop where nobody is left: a round in which no worker stayed finite, or NaN in the state."""
    nobody = ~finite.any(axis=2)  # [seeds, rounds]
    if sound.all() and not nobody.any():
        return
    bad = [(np.argmax(row) if row.any() else len(row) - 1, s) for s, row in enumerate(nobody)]
    place, s = min((place, s) for place, s in bad if nobody[s].any() or not sound[s])
    last = checkpoints.steps()
    msg = (
        f"round {first + place} (epoch {epoch}), seed {seeds[s]}: every worker became NaN or Inf. "
        f"The last good checkpoint is that of epoch {last[-1] if last else 0}; try a lower "
        "--learning-rate, or --clip."
    )
    raise NotFiniteError(msg)
