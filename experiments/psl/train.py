"""Train a PSNet through its element losses (the default: on digits, in under two minutes).

P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural network
training*, G-2023-36.

    python -m experiments.psl.train                                      # 90 elements, Adam, digits
    python -m experiments.psl.train --compute fused                      # the same gradient, faster
    python -m experiments.psl.train --dataset mnist --compute blocks --seeds 3
    python -m experiments.psl.train --devices shard_map --num-devices 2
    python -m experiments.psl.train --resume runs/psl-digits-...         # after an interruption

The run folder gets config.json, metrics.csv, learning_curve.png and checkpoints/.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from experiments._lib import command, figures
from experiments._lib.tables import mean_at_end
from experiments.psl import run, training


@dataclasses.dataclass
class Args(command.TrainArgs):
    """Train a classifier with a partially-separable loss."""

    config: Annotated[training.Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=training.Config
    )
    out: pathlib.Path | None = None
    """Run folder; must not exist. Default: runs/psl-<dataset>-<model>-<loss>-<compute>-<time>."""


def main(args: Args) -> pathlib.Path:
    """Train, draw the learning curve, return the run folder."""
    command.begin(args)
    c = args.config
    title = f"{c.model} trained on {c.dataset}: loss {c.loss}, computed by {c.compute}"
    draw = lambda rows, path: figures.learning_curve(rows, path, title)
    words = "psl", c.dataset, c.model, c.loss, c.compute
    folder, rows = command.train_in_folder(args, run.train, draw, *words)
    print(f"test accuracy {mean_at_end(rows, 'test_accuracy')}; run folder {folder}")
    print("Next: python -m experiments.ist.train trains the second paper's subnets;")
    print("python -m experiments lists all programs.")
    return folder


if __name__ == "__main__":
    command.run_script(main, Args, __doc__, "continue with --resume and the run folder.")
