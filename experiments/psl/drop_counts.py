"""Drops of accuracy, spikes of the gradient: what is counted as one, and in which variants."""

import dataclasses
import pathlib

import numpy as np
from matplotlib.figure import Figure

from experiments._lib.figures import panel, save
from experiments._lib.tables import markdown, mean_std, read_named, series, std
from experiments.psl import figures, reproduce

VARIANTS = {
    "psl-squared": ("PSL squared (the authors')", {"loss": "psl-squared"}),
    "psl": ("PSL", {"loss": "psl"}),
    "nll": ("NLL", {"loss": "nll"}),
    "one-vs-each": ("one-vs-each", {"loss": "one-vs-each"}),
    "bounded": ("PSL squared, tangent beyond e⁴", {"loss": "psl-squared", "margin_bound": 4.0}),
    "clip": ("PSL squared, gradient clipped", {"loss": "psl-squared"}),
    "b2-0.99": ("PSL squared, Adam b2 = 0.99", {"loss": "psl-squared", "b2": 0.99}),
}
LEAST, NOISE, LARGE, SPIKE = 1.0, 5.0, 5.0, 50.0
DEFINITION = (
    "A drop: the test accuracy falls, from one epoch to the next, by more than "
    f"{LEAST:g} point and by more than {NOISE:g} times the median absolute change between epochs "
    "of that run; falls in consecutive epochs are one drop, and their sum is its depth. Large: "
    f"deeper than {LARGE:g} points. A spike: an epoch whose largest gradient norm is over "
    f"{SPIKE:g} times its median."
)


def find_drops(accuracy) -> list[tuple[int, float]]:
    """Drops in the accuracies of one run, one an epoch: `[(index, depth in points)]`.

    Args:
      accuracy: fractions in [0, 1].
    """
    falls = -100 * np.diff(accuracy)
    if not len(falls):
        return []
    least = max(LEAST, NOISE * float(np.median(np.abs(falls))))
    drops: list[tuple[int, float]] = []
    before = None
    for i in np.flatnonzero(falls > least):
        if before is not None and i == before + 1:
            drops[-1] = (drops[-1][0], drops[-1][1] + float(falls[i]))
        else:
            drops.append((int(i) + 1, float(falls[i])))
        before = i
    return drops


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is counted of a variant; arrays have an entry a seed."""

    epochs: int
    per_100: np.ndarray
    """Drops per 100 epochs."""
    large_per_100: np.ndarray
    last: np.ndarray
    """Test accuracy after the last epoch, %."""
    best: np.ndarray
    """Test accuracy after the best epoch, %."""
    drops: int
    drops_with_spike: int
    spikes: int
    """Epochs with a spike."""
    first: int | None
    """The earliest epoch with a drop."""
    largest: float
    """Largest gradient norm over the median of its epoch."""

    def drop_cells(self) -> dict[str, str]:
        """Columns of the tables: how often."""
        return {
            "seeds × epochs": f"{len(self.last)} × {self.epochs}",
            "drops in 100 epochs": mean_std(self.per_100, 1),
            "large ones": mean_std(self.large_per_100, 1),
        }

    def spike_cells(self) -> dict[str, str]:
        """Columns of the tables: beside spikes or not."""
        return {
            "drops in an epoch with a spike": f"{self.drops_with_spike} of {self.drops}",
            "epochs with a spike": f"{self.spikes} of {len(self.last) * self.epochs}",
        }


def summarise(rows: list[dict]) -> Summary:
    """Count the drops and spikes of all seeds of a variant."""
    epochs, accuracy = series(rows, "test_accuracy")
    largest, median = (series(rows, f"{x}_grad_norm")[1] for x in ("max", "median"))
    spikes = largest > SPIKE * median
    drops = [find_drops(a) for a in accuracy]
    changes = max(len(epochs) - 1, 1)
    return Summary(
        epochs=len(epochs),
        per_100=np.array([100 * len(d) / changes for d in drops]),
        large_per_100=np.array([100 * sum(x > LARGE for _, x in d) / changes for d in drops]),
        last=100 * accuracy[:, -1],
        best=100 * accuracy.max(1),
        drops=sum(map(len, drops)),
        drops_with_spike=sum(bool(spikes[s, i]) for s, d in enumerate(drops) for i, _ in d),
        spikes=int(spikes.sum()),
        first=min((int(epochs[i]) for d in drops for i, _ in d), default=None),
        largest=float(np.max(largest / median)),
    )


def load(results: pathlib.Path) -> dict[str, dict[str, Summary]]:
    """`{setting: {variant: summary}}` of everything measured, in the order of `VARIANTS`."""
    found = read_named(results, r"drops-(\w+-\w+-\d+)-(.+)\.csv")
    settings = dict.fromkeys(setting for setting, _ in found)
    return {
        s: {v: summarise(found[s, v]) for v in VARIANTS if (s, v) in found}
        for s in settings
        if any((s, v) in found for v in VARIANTS)
    }


def describe(setting: str) -> str:
    model, dataset, batch_size = setting.split("-")
    model = {"lenet": "LeNet", "psnet": "PSNet"}[model]
    dataset = {"mnist": "MNIST", "cifar10": "CIFAR10"}.get(dataset, dataset)
    return f"{model}, {dataset}, batches of {batch_size}"


def settings_table(results: pathlib.Path) -> str:
    """Drops and spikes of every setting that `reproduce` has measured, as a Markdown table."""
    rows, measured = [], figures.load(results)
    for name in filter(measured.get, reproduce.SETTINGS):
        s = summarise(measured[name])
        network, loss, dataset, batch_size = reproduce.SETTINGS[name]
        rows.append(
            {
                "setting": f"{network}-{loss}, {dataset}, {batch_size}",
                **s.drop_cells(),
                "the first in epoch": "" if s.first is None else s.first,
                **s.spike_cells(),
                "largest gradient / median": f"{s.largest:.3g}",
            }
        )
    return markdown(rows)


def draw_frequency(results: pathlib.Path) -> None:
    """`drops_frequency.png`: drops in 100 epochs and last accuracy of every variant and setting."""
    settings = load(results)
    if not settings:
        return
    heights = [1.1 + 0.36 * len(variants) for variants in settings.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(
        len(settings), 2, squeeze=False, width_ratios=(1.3, 1), height_ratios=heights
    )
    for (left, right), (setting, variants) in zip(axes, settings.items()):
        y = np.arange(len(variants))
        for offset, name, colour, field in (
            (-0.19, f"deeper than {LEAST:g} point", "#56B4E9", "per_100"),
            (0.19, f"deeper than {LARGE:g} points", "#D55E00", "large_per_100"),
        ):
            values = [getattr(s, field) for s in variants.values()]
            errors = np.nan_to_num([std(v) for v in values])
            left.barh(
                y + offset,
                [v.mean() for v in values],
                0.36,
                xerr=errors,
                color=colour,
                label=name,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        last = [s.last for s in variants.values()]
        errors = np.nan_to_num([std(v) for v in last])
        right.errorbar([v.mean() for v in last], y, xerr=errors, fmt="o", color="black", capsize=2)
        for i, values in enumerate(last):
            right.plot(values, [i] * len(values), "|", color="0.55", markersize=9, zorder=0)
        seeds = sorted({len(s.last) for s in variants.values()})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        panel(left, f"{describe(setting)} (seeds: {count})", "drops in 100 epochs", "")
        panel(right, "after the last epoch, mean ± std", "test accuracy (%)", "")
        left.set_yticks(y, [VARIANTS[v][0] for v in variants])
        right.set_yticks(y, [])
        right.grid(axis="y", alpha=0)
        for ax in (left, right):
            ax.set_ylim(len(y) - 0.4, -0.6)
            ax.set_axisbelow(True)
        left.set_xlim(left=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, results / "drops_frequency.png")
