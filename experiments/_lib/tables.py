"""Rows as CSV and as Markdown, and what is said of them: series by seed, means and deviations."""

import contextlib
import csv
import io
import math
import os
import pathlib
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from experiments._lib.folder import replace

INTEGERS = ("epoch", "seed", "round", "samples", "left_out")


def write_rows(path: pathlib.Path, rows: Sequence[dict], digits: str = ".6g") -> None:
    """A CSV of the rows, all with the columns of the first one; `digits` of what is a float."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([list(rows[0])] if rows else [])
    for row in rows:
        writer.writerow(format(v, digits) if isinstance(v, float) else v for v in row.values())
    replace(path, text.getvalue() or "\n")


def read_rows(path: str | os.PathLike) -> list[dict]:
    """Rows of a metrics CSV, numbers as numbers; none where there is no file."""
    return [
        {k: int(v) if k in INTEGERS else float(v) for k, v in row.items()}
        for row in read_texts(path)
    ]


def read_named(folder: str | os.PathLike, pattern: str) -> dict[tuple[str, ...], list[dict]]:
    """Rows of the CSVs in a folder whose whole names fit a regular expression.

    Files whose names have the same groups are joined, such as those of other seeds.
    """
    found: dict[tuple[str, ...], list[dict]] = {}
    for path in sorted(pathlib.Path(folder).glob("*.csv")):
        if (match := re.fullmatch(pattern, path.name)) and (rows := read_rows(path)):
            found.setdefault(match.groups(), []).extend(rows)
    return found


def read_mixed(path: str | os.PathLike) -> list[dict]:
    """Rows of a CSV, numbers as numbers, what is none as it is; none where there is no file."""

    def value(text):
        with contextlib.suppress(ValueError):
            return int(text) if text.isdigit() else float(text)
        return text

    return [{k: value(v) for k, v in row.items()} for row in read_texts(path)]


def read_texts(path: str | os.PathLike) -> list[dict[str, str]]:
    """Rows of a CSV as they stand there; none where there is no file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def markdown(rows: Sequence[dict[str, Any]], numbers: Collection[str] = ()) -> str:
    """A table.

    Args:
      rows: cells by the names of their columns, all with the columns of the first one.
      numbers: columns that stand to the right.
    """
    if not rows:
        return ""
    line = lambda cells: f"| {' | '.join(map(str, cells))} |"
    rules = ["--:" if name in numbers else "---" for name in rows[0]]
    head = [line(rows[0]), f"|{'|'.join(rules)}|"]
    return "\n".join([*head, *(line(row.values()) for row in rows)])


def paste(readme: pathlib.Path, name: str, text: str) -> None:
    """Put a text between `<!-- name -->` and `<!-- /name -->`."""
    whole = readme.read_text()
    before, found, rest = whole.partition(f"<!-- {name} -->\n")
    _, ends, after = rest.partition(f"<!-- /{name} -->")
    if not found or not ends:
        msg = f"{readme}: no <!-- {name} --> with <!-- /{name} --> after it."
        raise ValueError(msg)
    replace(readme, f"{before}{found}\n{text}\n{ends}{after}")


# ------------------------------------------------------------------------------------- over seeds


def series(rows: list[dict], column: str) -> tuple[np.ndarray, np.ndarray]:
    """A column by seed, `(epochs [E], values [seeds, E])`: the epochs that every seed has.

    A row that is there twice counts once.
    """
    values = {(row["seed"], row["epoch"]): row[column] for row in reversed(rows)}
    seeds = sorted({seed for seed, _ in values})
    epochs = [e for e in sorted({e for _, e in values}) if all((s, e) in values for s in seeds)]
    return np.array(epochs), np.array([[values[s, e] for e in epochs] for s in seeds])


def std(values: np.ndarray, axis: int = 0):
    """Standard deviation of a sample; NaN of a single one."""
    n = values.shape[axis]
    return np.std(values, axis, ddof=1) if n > 1 else np.full_like(values.mean(axis), np.nan)


def plus_minus(mean: float, spread: float, digits: int = 2) -> str:
    return f"{mean:.{digits}f}" + ("" if math.isnan(spread) else f" ± {spread:.{digits}f}")


def mean_std(values: np.ndarray, digits: int = 2) -> str:
    return plus_minus(float(values.mean()), float(std(values)), digits)


def mean_at_end(rows: list[dict], column: str) -> str:
    """Mean over the seeds in the last epoch, and with two seeds or more the standard deviation."""
    last = np.array([row[column] for row in rows if row["epoch"] == rows[-1]["epoch"]])
    spread = f" +- {std(last):.4f} ({len(last)} seeds)" if len(last) > 1 else ""
    return f"{last.mean():.4f}{spread}"
