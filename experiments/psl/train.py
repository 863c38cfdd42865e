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
import signal
import sys
import time
from typing import Annotated

import jax
import tyro

from experiments._run import saved_config
from experiments.psl import figures, run, training


@dataclasses.dataclass
class Args:
    """Train a classifier with a partially-separable loss."""

    config: Annotated[training.Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=training.Config
    )
    out: pathlib.Path | None = None
    """Run folder; must not exist. Default: runs/psl-<dataset>-<model>-<loss>-<compute>-<time>."""
    resume: pathlib.Path | None = None
    """Run folder to continue, with its own configuration; --epochs may be larger."""
    checkpoint_every: int = 5
    """Epochs between checkpoints."""
    num_devices: int | None = None
    """Virtual devices of the CPU, to try --devices pmap or shard_map without an accelerator."""
    data_dir: str | None = None
    """Where TFDS keeps its sets. Default: TFDS_DATA_DIR, else TFDS's own."""


def main(args: Args) -> pathlib.Path:
    """Train, draw the learning curve, return the run folder."""
    if args.num_devices is not None:
        jax.config.update("jax_num_cpu_devices", args.num_devices)
    config, folder = args.config, args.out
    if args.resume is not None:
        if folder is not None:
            msg = f"--out {folder} --resume {args.resume}: write one of them."
            raise ValueError(msg)
        folder, config = args.resume, saved_config(args.resume, config)
    if folder is None:
        words = ("psl", config.dataset, config.model, config.loss, config.compute)
        folder = pathlib.Path("runs") / "-".join((*words, time.strftime("%Y%m%d-%H%M%S")))
    rows = run.train(
        config,
        folder,
        resume=args.resume is not None,
        checkpoint_every=args.checkpoint_every,
        data_dir=args.data_dir,
    )
    title = f"{config.model} on {config.dataset}, {config.loss} by {config.compute}"
    figures.learning_curve(rows, folder / "learning_curve.png", title)
    last = [row["test_accuracy"] for row in rows if row["epoch"] == config.epochs]
    mean = sum(last) / len(last)
    std = (sum((x - mean) ** 2 for x in last) / max(len(last) - 1, 1)) ** 0.5
    spread = f" +- {std:.4f} ({len(last)} seeds)" if len(last) > 1 else ""
    print(f"test accuracy {mean:.4f}{spread}; run folder {folder}")
    return folder


def _stop(signum, _):
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; continue with --resume and the run folder.")
    except (ValueError, OSError, ImportError, run.NotFiniteError) as error:
        sys.exit(f"error: {error}")
