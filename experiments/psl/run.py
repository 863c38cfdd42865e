"""The loop around the compiled epoch: run folder, progress bar, CSV, checkpoints, exact resume."""

import math
import os
import pathlib
import sys

import jax
import numpy as np
from tqdm import tqdm

from experiments._checkpoint import Checkpoints
from experiments._run import NotFiniteError as NotFiniteError
from experiments._run import hold_folder
from experiments._run import read_rows as read_rows
from experiments._run import write_rows as write_rows
from experiments._signals import interruption
from experiments.psl import training

COLUMNS = (
    "epoch",
    "seed",
    "train_loss",
    "test_accuracy",
    "max_margin",
    "median_grad_norm",
    "max_grad_norm",
)


def train(
    config: training.Config,
    folder: str | os.PathLike,
    *,
    resume: bool = False,
    checkpoint_every: int = 5,
    data_dir: str | None = None,
    report=lambda line: print(line, file=sys.stderr, flush=True),
) -> list[dict]:
    """Train as `config` says, in a run folder; returns the metrics, a row an epoch and seed.

    The folder gets `config.json`, `metrics.csv` (rewritten whole after every epoch) and
    `checkpoints/`. A training that was interrupted at any moment and resumed ends with the same
    parameters, bit for bit, as one that was not: every epoch follows from the state and (seed,
    epoch) alone.

    Args:
      config: the training.
      folder: the run folder.
      resume: continue from the newest good checkpoint in `folder`; without one, from the start.
      checkpoint_every: epochs between checkpoints; there is always one at the end.
      data_dir: where TFDS keeps its sets.
      report: told, a line at a time, what a person should know.

    Raises:
      FileExistsError: something is in the folder and `resume` is False.
      BlockingIOError: another process trains in the folder.
      ValueError: the folder holds a run of another configuration.
      NotFiniteError: NaN or Inf in the loss, or in the state after an epoch, which is then not
        saved; the last good checkpoint stays.
      OSError: a checkpoint cannot be written.
    """
    folder = pathlib.Path(folder)
    with hold_folder(config, folder, resume):
        return _train(config, folder, resume, checkpoint_every, data_dir, report)


def _train(config, folder, resume, checkpoint_every, data_dir, report):
    program = training.build(config, data_dir)
    if config.compute != "fused":
        report(f"slots per sample in batches by label: {program.batches.padding_factor():.2f}")
    checkpoints = Checkpoints(folder / "checkpoints", config=config)
    state, rows, start = program.state, [], 0
    restored = checkpoints.restore(state, report) if resume else None
    if restored is not None:
        start, state = restored
        rows = [row for row in read_rows(folder / "metrics.csv") if row["epoch"] <= start]
        report(f"continuing after epoch {start}.")
    seeds = np.arange(config.first_seed, config.first_seed + config.seeds)
    with tqdm(total=config.epochs, initial=start, unit="epoch", desc=folder.name) as bar:
        for epoch in range(start + 1, config.epochs + 1):
            interruption.check()
            state, metrics = program.epoch(state, program.batches(epoch - 1), program.train)
            metrics = jax.tree.map(np.asarray, metrics)
            sound = np.asarray(training.sound(state))
            _check_finite(metrics, sound, rows, seeds, epoch, checkpoints)
            accuracy = np.asarray(program.accuracy(state["params"], program.test))
            for s, seed in enumerate(seeds):
                values = (
                    metrics["loss"][s].mean(),
                    accuracy[s],
                    metrics["max_margin"][s].max(),
                    np.median(metrics["grad_norm"][s]),
                    metrics["grad_norm"][s].max(),
                )
                rows.append(
                    dict(zip(COLUMNS, (epoch, int(seed), *map(float, values)), strict=True))
                )
            write_rows(folder / "metrics.csv", rows)
            if epoch % checkpoint_every == 0 or epoch == config.epochs:
                checkpoints.save(epoch, state)
            bar.set_postfix(loss=f"{metrics['loss'].mean():.4f}", accuracy=f"{accuracy.mean():.4f}")
            bar.update()
    return rows


def _check_finite(metrics, sound, rows, seeds, epoch, checkpoints):
    """Stop at the first loss that is not finite, or after the epoch where the state is not."""
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
    steps = checkpoints.steps()
    msg = (
        f"{what}; {margin}. The last good checkpoint is that of epoch {steps[-1] if steps else 0}; "
        "try a lower --learning-rate, --clip or --margin-bound."
    )
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
