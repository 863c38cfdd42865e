"""Figure 2 of the IST paper: its formulas as printed, and what a cluster sends and computes.

    python -m experiments.ist.cost

writes `figure2.csv` and `figure2.png` to `runs/results/ist/`, with `--commit-results` to
`experiments/ist/results/`, in a few seconds; nothing is trained.
The paper: B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using
Independent Subnet Training*, arXiv:1910.02120, section 4.2.
"""

import dataclasses
import math
import os
import pathlib

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments._lib.command import run_script
from experiments._lib.figures import panel, save
from experiments._lib.folder import results_folder
from experiments._lib.tables import write_rows
from psjax import cost

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass
class Args:
    """Defaults are the paper's."""

    widths: tuple[int, ...] = (1000, 4000, 4000, 4000, 200)
    """Features, neurons of each hidden layer, labels."""
    batch_size: int = 512
    """Samples of a gradient step: of a subnet, or of data parallel altogether."""
    local_steps: int = 10
    """Gradient steps a round (J)."""
    machines: int = 16
    """Of how many machines the axis goes."""
    out: pathlib.Path | None = None
    """Folder of figure2.csv and figure2.png. Default: runs/results/ist."""
    commit_results: bool = False
    """Write to experiments/ist/results."""


CURVES = {  # name: (colour, dashes, label); Okabe and Ito's colours
    "data_parallel_printed": ("#D55E00", "--", "data parallel, as printed"),
    "ist_printed": ("#0072B2", "--", "IST, as printed"),
    "ist_printed_ends_once": ("#56B4E9", ":", "IST, as the text says (ends once)"),
    "data_parallel": ("#D55E00", "-", "data parallel, ring all-reduce"),
    "local_sgd": ("#009E73", "-", "local SGD, ring all-reduce"),
    "ist": ("#0072B2", "-", "IST, sharded weights, SGD"),
    "ist_adam": ("#CC79A7", "-", "IST, sharded weights, Adam"),
}


def costs(args: Args, machines: int) -> dict[str, cost.Cost]:
    """Of every curve, at a number of machines."""
    plain = args.widths, args.batch_size, machines
    local = *plain, args.local_steps
    whole = cost.data_parallel(*plain)
    return {
        "data_parallel_printed": cost.printed_data_parallel(*plain),
        "ist_printed": cost.printed_independent_subnets(*local),
        "ist_printed_ends_once": cost.printed_independent_subnets(*local, ends_once=True),
        # the samples of one step are divided over the machines, as in the paper
        "data_parallel": whole._replace(flops=whole.flops / machines, samples=args.batch_size),
        "local_sgd": cost.local_sgd(*local),
        "ist": cost.independent_subnets(*local),
        "ist_adam": cost.independent_subnets(*local, moments=2),
    }


def rows(args: Args) -> list[dict]:
    """The table: a row for each number of machines and curve, in floats, operations, samples."""
    return [
        {"machines": n, "curve": name, **c._asdict()}
        for n in range(1, args.machines + 1)
        for name, c in costs(args, n).items()
    ]


def draw(table: list[dict], args: Args, path: str | os.PathLike) -> None:
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for name, (colour, dashes, label) in CURVES.items():
        curve = [row for row in table if row["curve"] == name]
        n = [row["machines"] for row in curve]
        style = {"color": colour, "linestyle": dashes, "linewidth": 1.7, "label": label}
        axes[0].plot(n, [row["floats"] or math.nan for row in curve], **style)
        if name not in ("ist_adam", "local_sgd"):  # a sample's work as with SGD, in data parallel
            axes[1].plot(n, [row["flops"] for row in curve], **style)
            axes[2].plot(n, [row["flops"] / row["samples"] for row in curve], **style)
    panel(axes[0], "Traffic of a gradient step", "machines", "floats sent, all machines together")
    panel(axes[1], "Work of a gradient step", "machines", "FLOPs, all machines together")
    panel(axes[2], "Work of a sample", "machines", "FLOPs of a step / its samples")
    for ax in axes:
        ax.set_yscale("log")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    widths = "-".join(map(str, args.widths))
    figure.suptitle(
        f"Figure 2 again: layers {widths}, batch {args.batch_size}, J = {args.local_steps} local "
        "steps\n(n machines: IST and local SGD see n batches a step, data parallel one)"
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)


def main(args: Args) -> None:
    out = results_folder(RESULTS, args.commit_results, args.out)
    table = rows(args)
    write_rows(out / "figure2.csv", table, digits="")
    draw(table, args, out / "figure2.png")
    print(out / "figure2.png")


if __name__ == "__main__":
    run_script(main, Args, __doc__, "nothing to continue, write the same command.")
