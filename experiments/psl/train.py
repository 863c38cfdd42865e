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

from experiments import _run
from experiments.psl import figures, run, training


@dataclasses.dataclass
class Args(_run.TrainArgs):
    """Train a classifier with a partially-separable loss."""

    config: Annotated[training.Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=training.Config
    )
    out: pathlib.Path | None = None
    """Run folder; must not exist. Default: runs/psl-<dataset>-<model>-<loss>-<compute>-<time>."""


def main(args: Args) -> pathlib.Path:
    """Train, draw the learning curve, return the run folder."""
    config, folder = _run.begin(args)
    if folder is None:
        folder = _run.new_folder("psl", config.dataset, config.model, config.loss, config.compute)
    rows = run.train(
        config,
        folder,
        resume=args.resume is not None,
        checkpoint_every=args.checkpoint_every,
        data_dir=args.data_dir,
    )
    title = f"{config.model} on {config.dataset}, {config.loss} by {config.compute}"
    figures.learning_curve(rows, folder / "learning_curve.png", title)
    print(f"test accuracy {_run.mean_at_end(rows, 'test_accuracy')}; run folder {folder}")
    return folder


if __name__ == "__main__":
    _run.run_script(main, Args, __doc__, "continue with --resume and the run folder.")
