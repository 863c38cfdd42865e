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
import signal
import sys
import time
from typing import Annotated

import jax
import tyro

from experiments._run import NotFiniteError, saved_config
from experiments.ist import figures, run, training


@dataclasses.dataclass
class Args:
    """Train a network in independent subnets."""

    config: Annotated[training.Config, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=training.Config
    )
    out: pathlib.Path | None = None
    """Run folder; must not exist. Default: runs/ist-<dataset>-<model>-<method>-<time>."""
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
    config = training.resolve(config, args.data_dir)
    if folder is None:
        words = ("ist", str(config.dataset), config.model, config.method)
        folder = pathlib.Path("runs") / "-".join((*words, time.strftime("%Y%m%d-%H%M%S")))
    rows = run.train(
        config,
        folder,
        resume=args.resume is not None,
        checkpoint_every=args.checkpoint_every,
        data_dir=args.data_dir,
    )
    title = f"{config.model} on {config.dataset}, {config.method}, {config.subnets} workers"
    figures.learning_curve(rows, folder / "learning_curve.png", title)
    calibrated = _mean(rows, "test_accuracy")
    if config.normalization == "travelling":
        calibrated += f" (uncalibrated {_mean(rows, 'test_accuracy_uncalibrated')})"
    print(f"test accuracy {calibrated}; run folder {folder}")
    return folder


def _mean(rows, column):
    """Of the last epoch's rows, a seed each."""
    last = [row[column] for row in rows if row["epoch"] == rows[-1]["epoch"]]
    mean = sum(last) / len(last)
    std = (sum((x - mean) ** 2 for x in last) / max(len(last) - 1, 1)) ** 0.5
    return f"{mean:.4f}" + (f" +- {std:.4f} ({len(last)} seeds)" if len(last) > 1 else "")


def _stop(signum, _):
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; continue with --resume and the run folder.")
    except (ValueError, OSError, ImportError, NotFiniteError) as error:
        sys.exit(f"error: {error}")
