"""Figures 6 and 7 of the paper: LeNet and PSNet, NLL and PSL, MNIST and CIFAR10, batch 20 and 100.

P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural
network training*, G-2023-36, section 7, as the authors ran it (their scripts say what
the text leaves open): sigmoid networks with average pooling, Xavier-uniform weights, Adam 1e-3
whose state is kept, the training set in its own order and never reshuffled, 50 epochs, and PSL as
the *squared* exponential.

    python -m experiments.psl.reproduce              # all 16 settings, about 2.5 hours on 2 cores
    python -m experiments.psl.reproduce --only LeNet_PSL-CIFAR10-20 --seeds 10
    python -m experiments.psl.reproduce --plot       # figures and table from what was measured

Every setting continues where it was interrupted. Rows and figures go to `runs/results/psl/`, which
begins as a copy of `experiments/psl/results/`; with `--commit-results` to the latter.
"""

import dataclasses
import itertools
import pathlib
import sys

from experiments._lib.command import run_script
from experiments._lib.folder import results_folder
from experiments._lib.tables import paste, write_rows
from experiments.psl import run, training

RESULTS = pathlib.Path(__file__).parent / "results"
EPOCHS = 50
NETWORKS = {"LeNet": "lenet", "PSNet": "psnet"}
LOSSES = {"NLL": "nll", "PSL": "psl-squared"}
DATASETS = {"MNIST": "mnist", "CIFAR10": "cifar10"}
SETTINGS = {
    f"{network}_{loss}-{dataset}-{batch_size}": (network, loss, dataset, batch_size)
    for dataset, network, loss, batch_size in itertools.product(
        DATASETS, NETWORKS, LOSSES, (100, 20)
    )
}


def authors_form(model: str, dataset: str, batch_size: int, **own) -> training.Config:
    """A training as the authors ran it, but for its own options."""
    # The network whose weight count the paper prints.
    preset = "mnist-53780" if (model, dataset) == ("psnet", "mnist") else None
    fixed = {"preset": preset, "compute": "fused", "learning_rate": 1e-3, "order": "dataset"}
    return training.Config(dataset, model, batch_size=batch_size, **fixed, **own)


def config_of(name: str, seeds: int, first_seed: int = 0, epochs: int = EPOCHS) -> training.Config:
    """The training of one setting."""
    network, loss, dataset, batch_size = SETTINGS[name]
    own = {"loss": LOSSES[loss], "epochs": epochs, "seeds": seeds, "first_seed": first_seed}
    return authors_form(NETWORKS[network], DATASETS[dataset], batch_size, **own)


@dataclasses.dataclass
class Args:
    """Train the 16 settings of the paper's figures 6 and 7, or draw what was measured."""

    only: tuple[str, ...] = ()
    """Settings to run, such as PSNet_PSL-MNIST-100; default all."""
    seeds: int = 3
    """Trainings a setting."""
    first_seed: int = 0
    epochs: int = EPOCHS
    out: pathlib.Path = pathlib.Path("runs/reproduce")
    """Where run folders go."""
    plot: bool = False
    """Run nothing; the figures and the table from what was measured."""
    commit_results: bool = False
    """Write to experiments/psl/results, and the table into README.md."""


def main(args: Args) -> None:
    unknown = sorted(set(args.only) - set(SETTINGS))
    if unknown:
        msg = f"--only {' '.join(unknown)}: no such setting; write some of {', '.join(SETTINGS)}."
        raise SystemExit(msg)
    results = results_folder(RESULTS, args.commit_results)
    if args.plot:
        from experiments.psl import figures

        figures.draw(results)
        readme = results.parent / "README.md"
        if args.commit_results and readme.exists():
            paste(readme, "table", (results / "table.md").read_text())
        return
    for name in args.only or SETTINGS:
        last = args.first_seed + args.seeds - 1
        folder = args.out / f"{name}-seeds{args.first_seed}-{last}"
        config = config_of(name, args.seeds, args.first_seed, args.epochs)
        rows = run.train(config, folder, resume=folder.exists(), checkpoint_every=1)
        if args.epochs == EPOCHS:
            write_rows(results / f"{name}-seeds{args.first_seed}-{last}.csv", rows)
            print(f"{name}: done", file=sys.stderr)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
