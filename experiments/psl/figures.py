"""Figures 6 and 7 of the paper, with the authors' curves, and their table.

`authors_curves.csv` in `experiments/psl/results/` holds the means and
standard deviations over 10 seeds, epoch by epoch, of the authors' own runs (published on the branch
`pr-AAAI24-scripts` of KnetNLPModels.jl; measurements, to 4 decimals).
"""

import math
import os
import pathlib
import textwrap

from matplotlib.figure import Figure

from experiments._lib.figures import band, panel, save
from experiments._lib.tables import (
    markdown,
    mean_std,
    plus_minus,
    read_named,
    read_texts,
    series,
    std,
)

COLOURS = {  # Okabe and Ito's, told apart by the colour blind
    "LeNet_NLL": "#0072B2",
    "LeNet_PSL": "#D55E00",
    "PSNet_NLL": "#009E73",
    "PSNet_PSL": "#CC79A7",
}
DATASETS = {"MNIST": (6, (85, 100)), "CIFAR10": (7, (10, 65))}  # number, accuracies shown
BATCHES = (20, 100)
AUTHORS = pathlib.Path(__file__).parent / "results" / "authors_curves.csv"
AUTHORS_SEEDS = 10
NAME = r"((?:LeNet|PSNet)_(?:NLL|PSL)-(?:MNIST|CIFAR10)-\d+)-seeds\d+-\d+\.csv"

# ------------------------------------------------------------------------------------- figures 6, 7


def load(results_dir: str | os.PathLike) -> dict[str, list[dict]]:
    """Rows of each setting, such as `LeNet_PSL-CIFAR10-20`, joined over its files of seeds."""
    return {name: rows for (name,), rows in read_named(results_dir, NAME).items()}


def load_authors(path: str | os.PathLike) -> dict[str, dict[int, tuple[float, float]]]:
    """The authors' `{setting: {epoch: (mean, std)}}`, of the test accuracy."""
    settings: dict[str, dict[int, tuple[float, float]]] = {}
    for row in read_texts(path):
        name = f"{row['pair']}-{row['dataset']}-{row['batch_size']}"
        values = float(row["mean_test_accuracy"]), float(row["std"])
        settings.setdefault(name, {})[int(row["epoch"])] = values
    return settings


def draw(results_dir: str | os.PathLike, authors_csv: str | os.PathLike | None = None) -> None:
    """Figures 6 and 7 and the table, into `results_dir`, from the settings whose rows are there.

    Args:
      results_dir: holds `LeNet_PSL-CIFAR10-20-seeds0-2.csv` and the like.
      authors_csv: the authors' curves; default those in the repository.
    """
    results_dir = pathlib.Path(results_dir)
    ours, theirs = load(results_dir), load_authors(authors_csv or AUTHORS)
    for dataset, (number, limits) in DATASETS.items():
        figure = Figure(figsize=(10, 4.8))
        missing = []
        for ax, batch_size in zip(figure.subplots(1, 2, sharey=True), BATCHES):
            for pair, colour in COLOURS.items():
                name = f"{pair}-{dataset}-{batch_size}"
                label = pair.replace("_", "-")
                if name in theirs:
                    epochs = sorted(theirs[name])
                    means = [100 * theirs[name][e][0] for e in epochs]
                    only = f"{label} (the authors' only)" if name not in ours else None
                    ax.plot(epochs, means, "--", color=colour, linewidth=1, label=only)
                if name in ours:
                    epochs, accuracy = series(ours[name], "test_accuracy")
                    count = f"{len(accuracy)} seed{'s' * (len(accuracy) > 1)}"
                    band(ax, epochs, 100 * accuracy, color=colour, label=f"{label} ({count})")
                else:
                    missing.append(f"{label} at {batch_size}")
            y = "test accuracy (%)" if batch_size == BATCHES[0] else ""
            panel(ax, f"minibatches of {batch_size}", "epoch", y)
            ax.plot([], [], "--", color="black", linewidth=1, label="the authors' mean, 10 seeds")
            ax.set_ylim(limits)
            ax.legend(frameon=False, loc="lower right", fontsize=9)
        figure.suptitle(
            f"Figure {number} again: {dataset} (mean ± one standard deviation)", y=0.975
        )
        if missing:
            note = f"Not measured here yet: {', '.join(missing)}."
            note = "\n".join(textwrap.wrap(note, 150))
            figure.text(0.5, 0.012, note, ha="center", fontsize=8.5, color="0.35")
        figure.subplots_adjust(0.07, 0.17, 0.985, 0.86, wspace=0.05)
        save(figure, results_dir / f"figure{number}_{dataset.lower()}.png")
    print(table(results_dir, authors_csv))


def table(results_dir: str | os.PathLike, authors_csv: str | os.PathLike | None = None) -> str:
    """Accuracy after the last epoch, ours and the authors', as Markdown; also into `table.md`."""
    results_dir = pathlib.Path(results_dir)
    ours, theirs = load(results_dir), load_authors(authors_csv or AUTHORS)
    rows = []
    names = [f"{p}-{d}-{b}" for d in DATASETS for b in BATCHES for p in COLOURS]
    for name in filter(ours.get, names):
        epochs, accuracy = series(ours[name], "test_accuracy")
        final, last = 100 * accuracy[:, -1], int(epochs[-1])
        theirs_at_last, difference, errors = ["not there"] * 3
        if last in theirs.get(name, {}):
            mean, spread = (100 * x for x in theirs[name][last])
            theirs_at_last = f"{plus_minus(mean, spread)} ({AUTHORS_SEEDS})"
            difference = f"{final.mean() - mean:+.2f}"
            error = math.sqrt(float(std(final)) ** 2 / len(final) + spread**2 / AUTHORS_SEEDS)
            errors = f"{(final.mean() - mean) / error:+.1f}"
            errors = "one seed" if math.isnan(error) else errors
        pair, dataset, batch_size = name.split("-")
        rows.append(
            {
                "setting": f"{pair.replace('_', '-')}, {dataset}, {batch_size}",
                "epoch": last,
                "ours, % (seeds)": f"{mean_std(final)} ({len(final)})",
                "the authors', % (seeds)": theirs_at_last,
                "difference": difference,
                "in standard errors": errors,
            }
        )
    missing = [name.replace("_", "-", 1) for name in names if name not in ours]
    lines = [
        markdown(rows),
        "",
        "Test accuracy, mean ± standard deviation over seeds. The last column is the difference of "
        "the means over √(s₁²/n₁ + s₂²/n₂): within ±2 there is no sign of one.",
    ]
    if missing:
        lines += ["", f"Not measured here yet: {', '.join(missing)}."]
    text = "\n".join(lines) + "\n"
    (results_dir / "table.md").write_text(text)
    return text
