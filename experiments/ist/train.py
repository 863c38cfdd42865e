"""Train a network in independent subnets (the default: spoken digits, in under two minutes).

B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent
Subnet Training*, arXiv:1910.02120.

    python -m experiments.ist.train                                      # 4 subnets, 10 local steps
    python -m experiments.ist.train --method local-sgd                   # the whole network at each
    python -m experiments.ist.train --depth 3 --subnets 8 --normalization travelling
    python -m experiments.ist.train --dataset mnist --seeds 3 --optimizer adam-entry
    python -m experiments.ist.train --devices shard_map --num-devices 2
    python -m experiments.ist.train --resume runs/ist-spoken_digit-...   # after an interruption

The run folder gets config.json, metrics.csv, learning_curve.png and checkpoints/.
"""

import dataclasses
import pathlib
from typing import Annotated

import tyro

from experiments._lib import command
from experiments._lib.figures import learning_curve
from experiments._lib.tables import mean_at_end
from experiments.ist import figures, run, training


@dataclasses.dataclass
class Args(command.TrainArgs):
    """Train a network in independent subnets."""

    config: Annotated[training.Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=training.Config
    )
    out: pathlib.Path | None = None
    """Run folder; must not exist. Default: runs/ist-<dataset>-<model>-<method>-<time>."""


def main(args: Args) -> pathlib.Path:
    """Train, draw the learning curve, return the run folder."""
    command.begin(args)
    c = args.config = training.resolve(args.config, args.data_dir)
    title = f"{c.model} on {c.dataset}, {c.method}, {c.subnets} workers"
    words = {"over": "the subnets", "whose": " of the whole network"}
    draw = lambda rows, path: learning_curve(rows, path, title, **words, columns=figures.ACCURACIES)
    names = "ist", str(c.dataset), c.model, c.method
    folder, rows = command.train_in_folder(args, run.train, draw, *names)
    accuracy = mean_at_end(rows, "test_accuracy")
    if c.normalization == "travelling":
        uncalibrated = mean_at_end(rows, "test_accuracy_uncalibrated")
        accuracy += f" (uncalibrated {uncalibrated})"
    print(f"test accuracy {accuracy}; run folder {folder}")
    return folder


if __name__ == "__main__":
    command.run_script(main, Args, __doc__, "continue with --resume and the run folder.")
