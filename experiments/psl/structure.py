"""Figures 1, 3 and 5 of the paper: which weights each score depends on, without and under dropout.

P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural network
training*, G-2023-36, sections 5 and 6.1. The networks are those of the experiments, for MNIST; in
the paper they are small sketches.

    python -m experiments.psl.structure          # writes runs/results/psl/structure.png
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
from flax import linen as nn
from matplotlib.figure import Figure

import psjax
from experiments._lib.command import run_script
from experiments._lib.figures import save
from experiments._lib.folder import results_folder

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass
class Args:
    """Which weights each score depends on: LeNet, PSNet, and PSNet without its common layer."""

    classes: int = 10
    """Number of classes; each has the PSNet's own weights of one class."""
    out: pathlib.Path | None = None
    """PNG to write. Default: runs/results/psl/structure.png."""
    commit_results: bool = False
    """Write over experiments/psl/results/structure.png instead."""


def found(model: nn.Module) -> psjax.structure.Dependencies:
    """The dependencies of a model of MNIST images; nothing is computed."""
    images = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params = nn.unbox(variables)["params"]
    return psjax.structure.dependencies(lambda p, x: model.apply({"params": p}, x), params, images)


def main(args: Args) -> None:
    """Draw the three panels, print the counts."""
    net = psjax.models.psnet("mnist-53780").clone(num_classes=args.classes)
    lenet, psnet = found(psjax.models.lenet("mnist", args.classes)), found(net)
    trunk = {"Conv_0": 1.0}
    keep = psjax.dropout_mask(jax.random.key(0), psnet.like, layers=trunk)
    panels = [
        ("LeNet (figure 1)", lenet, None),
        ("PSNet (figure 3)", psnet, None),
        ("PSNet, its common convolution dropped (figure 5)", psnet, keep),
    ]
    figure = Figure(figsize=(7, 12.6), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.12)  # pyright: ignore[reportOptionalMemberAccess, reportCallIssue]
    for ax, (title, dependencies, mask) in zip(figure.subplots(3, 1), panels):
        psjax.structure.draw(dependencies, ax, keep=mask, title=title)
        print(f"{title}: {dependencies.count(mask)}")
    save(figure, args.out or results_folder(RESULTS, args.commit_results) / "structure.png")


if __name__ == "__main__":
    run_script(main, Args, __doc__, "nothing to continue, write the same command.")
