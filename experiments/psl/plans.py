"""Which worker holds and computes what, and what it costs: a table and a picture.

Section 5.4 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned
neural network training*, G-2023-36.

    python -m experiments.psl.plans                          # 10 classes on 8 workers
    python -m experiments.psl.plans --preset cifar10 --classes 64 --workers 8 --bandwidth 12.5e6
    python -m experiments.psl.plans --picture plan.png       # and a picture of the chosen plan
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

import psjax
from experiments._lib.command import run_script
from experiments._lib.figures import save

IMAGES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "mnist-53780": (28, 28, 1)}


@dataclasses.dataclass
class Args:
    """The cheapest plan for a PSNet, beside data parallelism, score exchange and subnets."""

    preset: str = "mnist"
    """Size of the PSNet: digits, mnist, mnist-53780 or cifar10."""
    classes: int = 10
    """Number of classes; each has the preset's own weights of one class."""
    workers: int = 8
    batch_size: int = 100
    """Samples of all workers at a step."""
    slots: int | None = None
    """Slots of a label in a batch. Default: as equally many samples of each label need."""
    bandwidth: float = 125e6
    """Bytes a second of one worker; 125e6 is 1 Gbit/s."""
    flops: float = 1e11
    """Operations a second of one worker."""
    memory: float | None = None
    """Bytes of one worker for weights, gradients and Adam's moments. Default: no limit."""
    picture: pathlib.Path | None = None
    """PNG to draw: who holds which classes, who computes which pairs."""


def main(args: Args) -> psjax.plan.Plan:
    """Print the table, draw the picture, return the plan."""
    net = psjax.models.psnet(args.preset)
    shape = (1, *IMAGES.get(args.preset, (32, 32, 3)))
    costs = psjax.plan.best(
        net,
        args.classes,
        args.workers,
        inputs=jax.ShapeDtypeStruct(shape, jnp.float32),
        batch_size=args.batch_size,
        bandwidth=args.bandwidth,
        flops=args.flops,
        memory=args.memory,
        slots=args.slots,
    )
    plan = costs.best
    print(costs)
    print()
    print(plan)
    if args.picture is not None:
        draw(plan, args.picture)
    return plan


def draw(plan: psjax.plan.Plan, path: pathlib.Path) -> None:
    """Left the classes that each worker holds, right the worker or workers of each pair."""
    W, C = plan.num_workers, plan.num_classes
    home = np.array_split(np.arange(C), W)
    held = np.zeros((W, C))
    for w in range(W):
        own = plan.classes[w][plan.classes[w] < C]
        held[w, own] = 1
        held[w, home[w]] += 2
    workers: dict[tuple[int, int], list[int]] = {}
    for w, t, a, b in np.argwhere(plan.pairs):
        pair = int(plan.classes[w, t, a]), int(plan.classes[w, t, b])
        workers.setdefault(pair, []).append(int(w))
    first = np.full((C, C), np.nan)
    for pair, sharing in workers.items():
        first[pair] = sharing[0]
    figure = Figure(figsize=(10, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    kinds = ("#f2f2f2", "#9ecae1", "#fdd0a2", "#2171b5")
    left.imshow(held, cmap=ListedColormap(kinds), vmin=-0.5, vmax=3.5, aspect="auto")
    left.set(xlabel="class", ylabel="worker", xticks=range(C), yticks=range(W))
    left.set_title(f"who holds what: {plan.kind}, {C} classes on {W} workers")
    words = ("no", "fetched for a step", "at home, not used", "at home and used")
    handles = [Patch(color=c, label=word) for c, word in zip(kinds, words) if word != "no"]
    used = {float(x) for x in held.ravel()}
    handles = [h for h, x in zip(handles, (1.0, 2.0, 3.0)) if x in used]
    left.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3)
    colours = _colours(W)
    right.imshow(first, cmap=ListedColormap(colours), vmin=-0.5, vmax=W - 0.5)
    for (k, j), sharing in workers.items() if C <= 20 else ():
        w, more = sharing[0], sharing[1:]
        text = f"{w}" + (f"{',' if len(more) == 1 else '-'}{more[-1]}" if more else "")
        right.text(j, k, text, ha="center", va="center", fontsize=8)
    right.set(xlabel="the other class j", ylabel="label k", xticks=range(C), yticks=range(C))
    right.set_title("which worker has the element $h_{kj}$")
    if C > 20:
        for axes in (left, right):
            axes.set_xticks(range(0, C, 5))
        right.set_yticks(range(0, C, 5))
    for axes in (left, right):
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    left.set_xticks(np.arange(C + 1) - 0.5, minor=True)
    left.set_yticks(np.arange(W + 1) - 0.5, minor=True)
    left.grid(which="minor", color="white", linewidth=2)
    left.tick_params(which="minor", length=0)
    save(figure, path)


def _colours(n):
    """Pale colours, neighbours told apart."""
    from matplotlib import colormaps

    return [tuple(0.45 + 0.55 * x for x in colormaps["hsv"](i / n)[:3]) for i in range(n)]


if __name__ == "__main__":
    run_script(main, Args, __doc__, "nothing to continue, write the same command.")
