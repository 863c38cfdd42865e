"""Times of programs that take turns, and ratios of them."""

import csv
import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Program:
    """A jitted `(state, *args) -> state, anything` whose state is donated, as a call."""

    fn: Any
    state: Any
    args: tuple[Any, ...]

    def __call__(self):
        self.state, _ = jax.block_until_ready(self.fn(self.state, *self.args))


def take_turns(calls: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, np.ndarray]:
    """Seconds of every call, `{name: [repeats]}`.

    Every round calls each program once, every other round in the opposite order, so that a
    machine that slows down slows all of them down. One round before the first is not counted.

    Args:
      calls: functions that return when their work is done.
      repeats: rounds.
    """
    seconds = {name: np.zeros(repeats) for name in calls}
    for turn in range(-1, repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = time.perf_counter()
            calls[name]()
            if turn >= 0:
                seconds[name][turn] = time.perf_counter() - start
    return seconds


HEADER = f"{'figure':68} {'goal':>5} {'ratio':>6}  {'quartiles':>13} {'':>9} {'reference':>9}"


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A figure of the table, `value / reference`, and what it should be at most.

    `low` and `high` are the quartiles of the ratio round by round: what the machine's noise leaves
    open.
    """

    figure: str
    goal: float | None
    ratio: float
    low: float | None
    high: float | None
    value: float
    reference: float
    unit: str

    @classmethod
    def between(cls, figure, goal, value, reference, unit):
        return cls(figure, goal, value / reference, None, None, value, reference, unit)

    @classmethod
    def of(cls, figure, goal, seconds, reference):
        """Of the medians of two programs' seconds, `[repeats]` each."""
        low, high = np.quantile(seconds / reference, (0.25, 0.75)).tolist()
        ms, ms_reference = (1e3 * float(np.median(s)) for s in (seconds, reference))
        return cls(figure, goal, ms / ms_reference, low, high, ms, ms_reference, "ms")

    def __str__(self):
        goal = "" if self.goal is None else f"{self.goal:.4g}"
        spread = "" if self.low is None else f"{self.low:.3f}-{self.high:.3f}"
        missed = "" if self.goal is None or self.ratio <= self.goal else "  missed"
        return (
            f"{self.figure:68} {goal:>5} {self.ratio:6.3f}  {spread:>13} {self.value:9.2f} "
            f"{self.reference:9.2f} {self.unit}{missed}"
        )


def write(path: pathlib.Path, rows: list[Ratio]) -> None:
    """The table as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(field.name for field in dataclasses.fields(Ratio))
        for row in rows:
            cells = dataclasses.astuple(row)
            writer.writerow(f"{x:.4g}" if isinstance(x, float) else x for x in cells)
