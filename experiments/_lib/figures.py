"""Figures: saved small, panels and bands that look alike, the learning curve."""

import io
import os
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from experiments._lib.tables import series, std


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG of 256 colours, 1200 pixels wide for a figure 10 inches wide."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, facecolor="white")
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)


def band(ax, epochs, values, **style) -> None:
    """Mean over seeds, `values [seeds, epochs]`, and a band of one standard deviation each way."""
    mean, spread = values.mean(0), std(values)
    (line,) = ax.plot(epochs, mean, linewidth=1.6, **style)
    if len(values) > 1:
        ax.fill_between(
            epochs, mean - spread, mean + spread, color=line.get_color(), alpha=0.2, linewidth=0
        )


def panel(ax, title: str, x: str, y: str) -> None:
    """Words around the axes, a pale grid, and no frame above and to the right."""
    ax.set(title=title, xlabel=x, ylabel=y)
    ax.grid(alpha=0.25, linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def learning_curve(
    rows: list[dict],
    path: str | os.PathLike,
    title: str,
    over: str = "the epoch",
    whose: str = "",
    columns: Mapping[str, tuple[str, str]] | None = None,
) -> None:
    """Training loss and test accuracy against the epoch; of several seeds mean and band.

    Args:
      rows: of a training, an epoch and seed each.
      path: of the PNG.
      title: above both panels.
      over: what the loss is a mean over.
      whose: the accuracy's owner, in words.
      columns: of the accuracies, those that there are: what it is called, and its colour (Okabe
        and Ito's). Default: `test_accuracy` alone.
    """
    columns = columns or {"test_accuracy": ("", "#D55E00")}
    columns = {name: x for name, x in columns.items() if name in rows[0]}
    epochs, loss = series(rows, "train_loss")
    seeds = len(loss)
    label = "one seed" if seeds == 1 else f"mean ± one standard deviation, {seeds} seeds"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = "o" if len(epochs) == 1 else None
    band(left, epochs, loss, color="#0072B2", label=label, marker=marker)
    for column, (name, colour) in columns.items():
        own = label if len(columns) == 1 else f"{name}, {label}"
        values = 100 * series(rows, column)[1]
        band(right, epochs, values, color=colour, label=own, marker=marker)
    panel(left, "Training loss", "epoch", f"loss per sample (mean over {over})")
    panel(right, f"Test accuracy{whose}", "epoch", "test accuracy (%)")
    if loss.min() > 0 and loss.max() > 50 * loss.min():
        left.set_yscale("log")
        left.set_ylim(bottom=0.8 * loss.mean(0).min())  # mean - std may well be negative
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    figure.suptitle(title)
    save(figure, path)
