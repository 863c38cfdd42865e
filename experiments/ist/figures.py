"""Figures of trainings in independent subnets: figures 3 and 4, table 2."""

import os

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments._lib.figures import band, panel, save
from experiments._lib.tables import series

ACCURACIES = {  # column: how it is called, its colour (Okabe and Ito's)
    "test_accuracy": ("calibrated", "#D55E00"),
    "test_accuracy_uncalibrated": ("with the statistics that travelled", "#009E73"),
}


# ----------------------------------------------------------------------------- figures 3, 4

COLOURS = {
    "one worker": "#000000",
    "data-parallel": "#D55E00",
    "local-sgd": "#009E73",
    "ist": "#0072B2",
}
DASHES = {1: "-.", 5: ":", 10: "-", 50: "--"}  # by local steps
MARKERS = {1: "o", 5: "v", 10: "s", 50: "D"}


def _dashes(line):
    """Data parallel and one worker have no choice of local steps."""
    return DASHES[line["local_steps"]] if line["method"] in ("ist", "local-sgd") else "-"


def figure3(path: str | os.PathLike, panels: dict[str, list[dict]]) -> None:
    """Speed-up of an epoch against one worker.

    Args:
      path: of the PNG.
      panels: of every network the lines: `label`, `method`, `local_steps`, and for 2, 4 and 8
        workers the speed-up with the network (`wired`) and without (`alone`).
    """
    figure = Figure(figsize=(10, 7.6), layout="constrained")
    workers = (2, 4, 8)
    for ax, (name, lines) in zip(figure.subplots(2, 2).flat, panels.items()):
        for line in lines:
            colour, j = COLOURS[line["method"]], line["local_steps"]
            style = {"color": colour, "linestyle": _dashes(line), "marker": MARKERS[j]}
            ax.plot(
                workers, line["wired"], linewidth=1.6, markersize=4, label=line["label"], **style
            )
        for method in ("data-parallel", "ist"):  # the same for every J, and for local SGD
            alone = next(line["alone"] for line in lines if line["method"] == method)
            whose = "IST" if method == "ist" else "data parallel, local SGD"
            style = {"color": COLOURS[method], "alpha": 0.3, "linewidth": 5}
            ax.plot(workers, alone, label=f"{whose}: compute alone", zorder=0, **style)
        ax.axhline(1, color="0.5", linewidth=0.8)
        panel(ax, name, "workers", "speed-up of an epoch against one worker")
        ax.set(xscale="log", yscale="log")
        ax.set_xticks(workers, [str(n) for n in workers])
        ax.minorticks_off()
        low, high = ax.get_ylim()
        ticks = [t for e in range(-3, 4) for t in (10.0**e, 3 * 10.0**e) if low <= t <= high]
        ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
    figure.suptitle(
        "Figure 3 again: compute measured on one core a worker, network modelled at 1 Gbit/s"
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def figure4(path: str | os.PathLike, panels: dict[str, list[dict]]) -> None:
    """Test accuracy against modelled time, samples and bytes, mean over seeds and band.

    Args:
      path: of the PNG.
      panels: of every network the lines: `label`, `method`, `local_steps`, `accuracy [seeds, E]`
        in %, and `seconds`, `samples`, `bytes`, `[E]` each.
    """
    if not panels:
        return
    figure = Figure(figsize=(13, 4.4 * len(panels) + 0.4), layout="constrained")
    grid = figure.subplots(len(panels), 3, sharey=True, squeeze=False)
    axes_of = {
        "seconds": "seconds (compute + network at 1 Gbit/s)",
        "samples": "samples, all workers together",
        "bytes": "bytes sent, all workers together",
    }
    for row, (name, lines) in zip(grid, panels.items()):
        for ax, (column, text) in zip(row, axes_of.items()):
            for line in lines:
                if column == "bytes" and not line["bytes"].any():
                    continue  # one worker sends nothing
                colour, dashes = COLOURS[line["method"]], _dashes(line)
                style = {"color": colour, "linestyle": dashes, "label": line["label"]}
                band(ax, line[column], line["accuracy"], **style)
            panel(ax, name, text, "test accuracy (%)" if column == "seconds" else "")
            ax.set_xscale("log")
    named = {}
    for ax in grid[:, 0]:
        named |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle("Figure 4 again: mean ± one standard deviation over seeds")
    save(figure, path)


# --------------------------------------------------------------------------------------- table 2

SETTINGS = {  # of `experiments.ist.extreme`: colour and dashes
    "data parallel": (COLOURS["data-parallel"], "-"),
    "IST": (COLOURS["ist"], "-"),
    "IST twice as wide": ("#CC79A7", "--"),
}


def table2(path: str | os.PathLike, lines: dict[str, dict], title: str) -> None:
    """Precision at 1 against the epoch, mean over seeds and band, a line a setting.

    Args:
      path: of the PNG.
      lines: of every setting the `label`, the `rows`, an epoch and seed each, and the `epoch` that
        the table is of, which gets a dot; None where the training is not there yet.
      title: above it.
    """
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    ax = figure.subplots()
    seeds, dotted = 1, None
    for name, line in lines.items():
        epochs, precision = series(line["rows"], "P@1")
        seeds = max(seeds, len(precision))
        colour, dashes = SETTINGS[name]
        marker = "." if len(epochs) == 1 else None
        style = {"color": colour, "linestyle": dashes, "marker": marker, "label": line["label"]}
        band(ax, epochs, 100 * precision, **style)
        if line["epoch"] is not None:
            mean = 100 * precision.mean(0)[epochs == line["epoch"]]
            (dotted,) = ax.plot(line["epoch"], mean, "o", color=colour, markersize=7)
    if dotted is not None:
        label = "epoch of the table, chosen on the validation part"
        ax.plot([], [], "o", color="0.4", markersize=7, label=label)
    panel(ax, "", "epoch (samples of all workers together)", "P@1 on the test set (%)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="lower right")
    spread = "one seed" if seeds == 1 else f"mean ± one standard deviation, {seeds} seeds"
    figure.suptitle(f"{title}: {spread}")
    save(figure, path)
