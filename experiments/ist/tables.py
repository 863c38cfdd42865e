"""Tables 1 and 3 of the IST paper from trainings of this repository, on a modelled cluster.

Every worker is one core of the machine on which the steps were timed: the time of its local steps,
alone. The network is the formulas of `psjax.cost`: the floats a worker sends, 4 bytes each, over
its link of 1 Gbit/s. Nothing overlaps, a message costs no latency, gathering and scattering a
worker's weights in its own memory no time.
"""

import math
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments._lib.tables import markdown, mean_std, paste, read_mixed, read_named, series, std
from experiments.ist import figures
from psjax import cost

BATCH = 128
FEATURES = 4096
GIGABIT = 1e9 / 8  # bytes a second
STEPS_FILE = "steps.csv"
WORKERS = (2, 4, 8)
ACCURACIES = (0.80, 0.90, 0.95)
METHODS = {  # those of table 3
    "data-parallel": "data parallel",
    "local-sgd": "local SGD",
    "ist": "IST",
    "data-parallel-dropout": "data parallel, dropout 1 − 1/n",
    "ist-fixed": "IST, subnets never redrawn",
    "ist-none": "IST without normalisation",
}
TRAVELLING = "IST, statistics that travelled, not calibrated"
TIMED = ("data-parallel", "local-sgd", "ist")  # those of table 1
PAPER_ACCURACIES = (0.63, 0.69, 0.75)
PAPER_SECONDS = {  # table 1: rows the accuracies, columns 2, 4, 8 workers
    (2, "data-parallel"): ((118, 269, 450), (294, 584, 923), (759, 1708, 2417)),
    (2, "local-sgd"): ((68, 130, 235), (171, 278, 441), (444, 742, 1110)),
    (2, "ist"): ((35, 28, 24), (87, 55, 59), (231, 167, 192)),
    (3, "data-parallel"): ((376, 1228, 1922), (1503, 2939, 4823), (4534, 9340, 14886)),
    (3, "local-sgd"): ((182, 586, 1115), (740, 1270, 2589), (2032, 4107, 6539)),
    (3, "ist"): ((76, 141, 300), (298, 283, 541), (812, 664, 1161)),
}
PAPER_FINAL = {  # table 3, %
    (2, "data-parallel"): 79.38,
    (2, "local-sgd"): 79.98,
    (2, "ist"): 81.53,
    (3, "data-parallel"): 79.50,
    (3, "local-sgd"): 79.92,
    (3, "ist"): 83.27,
}
NAME = r"(\d)layer-([a-z-]+)-n(\d+)-J(\d+)-seeds\d+-\d+\.csv"


class Size(NamedTuple):
    """A network."""

    depth: int
    width: int
    labels: int
    features: int = FEATURES

    @property
    def hidden(self) -> tuple[int, ...]:
        return (self.width,) * (self.depth - 1)

    @property
    def name(self) -> str:
        return "-".join(map(str, (self.features, *self.hidden, self.labels)))


# What was trained, and the paper's own sizes.
SIZES = (Size(2, 1024, 10), Size(3, 1024, 10), Size(2, 4096, 35), Size(3, 8192, 35))


class Key(NamedTuple):
    """A setting, without its seeds."""

    depth: int
    """Dense layers."""
    method: str
    """One of `METHODS`."""
    workers: int
    local_steps: int

    @property
    def name(self) -> str:
        return f"{self.depth}layer-{self.method}-n{self.workers}-J{self.local_steps}"


def steps_of(method: str) -> int:
    """Steps between two exchanges where a table has one column for a method."""
    return 1 if method.startswith("data-parallel") else 10


def label(method: str, local_steps: int) -> str:
    return METHODS[method] + ("" if method.startswith("data") else f", J = {local_steps}")


# ---------------------------------------------------------------------------------------- the model


def gflop(size: Size, workers: int) -> float:
    """Billions of operations of a worker's local step, in the matrix products alone."""
    hidden = tuple(-(-width // workers) for width in size.hidden)
    widths = (size.features, *hidden, size.labels)
    return cost.data_parallel(widths, BATCH, 1).flops / 1e9


def sent(size: Size, method: str, workers: int, local_steps: int) -> float:
    """Bytes of a gradient step on average, all workers together; SGD, normalised layers."""
    widths = (size.features, *size.hidden, size.labels)
    vectors = 2 * sum(size.hidden)  # a scale and a shift of every hidden neuron
    plain = widths, BATCH, workers
    if method == "ist":
        return 4 * cost.independent_subnets(*plain, local_steps, split_vectors=vectors).floats
    if method == "local-sgd":
        return 4 * cost.local_sgd(*plain, local_steps, vectors=vectors).floats
    return 4 * cost.data_parallel(*plain, vectors=vectors).floats


class Times:
    """Seconds of a gradient step, from the measured steps.

    Args:
      rows: of `steps.csv`.
    """

    def __init__(self, rows: list[dict]):
        size = lambda row: Size(*(int(row[name]) for name in Size._fields))
        self.seconds = {(size(r), int(r["workers"])): float(r["seconds"]) for r in rows}

    def compute(self, size: Size, method: str, workers: int) -> float:
        """One worker's step on its batch."""
        return self.seconds[size, workers if method == "ist" else 1]

    def network(self, size: Size, method: str, workers: int, local_steps: int) -> float:
        """A worker's share of what is sent, over its link."""
        return sent(size, method, workers, local_steps) / workers / GIGABIT

    def speedup(self, size: Size, method: str, workers: int, local_steps: int, wired=True) -> float:
        """Of an epoch against one worker; without the network, were it infinitely fast."""
        step = self.compute(size, method, workers)
        if wired:
            step += self.network(size, method, workers, local_steps)
        return workers * self.seconds[size, 1] / step


def read_steps(results: pathlib.Path) -> Times | None:
    rows = read_mixed(results / STEPS_FILE)
    return Times(rows) if rows else None


def load(results: str | os.PathLike) -> dict[Key, list[dict]]:
    """Rows of every setting, joined over its files of seeds."""
    found = read_named(pathlib.Path(results, "trainings"), NAME)
    return {Key(int(d), method, int(n), int(j)): rows for (d, method, n, j), rows in found.items()}


# --------------------------------------------------------------------------------------- the tables


def samples_to(rows: list[dict], accuracy: float) -> tuple[np.ndarray, int]:
    """Samples by the first report with so high a test accuracy, of the seeds that had one.

    Returns:
      The samples, and of how many seeds there are rows.
    """
    reached: dict[int, int] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        if row["test_accuracy"] >= accuracy - 1e-9:
            reached.setdefault(row["seed"], row["samples"])
    return np.array(list(reached.values()), float), len({row["seed"] for row in rows})


def final(rows: list[dict], column: str, epoch: int | None = None) -> np.ndarray:
    """Of every seed at its last report, or the last one by `epoch`, %."""
    last: dict[int, dict] = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        if epoch is None or row["epoch"] <= epoch or row["seed"] not in last:
            last[row["seed"]] = row
    return 100 * np.array([last[seed][column] for seed in sorted(last)])


def table3(trained: dict[Key, list[dict]]) -> str:
    """Final accuracy, as Markdown."""
    columns = [(depth, n) for depth in (2, 3) for n in (2, 8)]
    paper = {1: 2, 3: 3}  # after which column those of the paper come, and of which depth
    lines = []
    shown = [(method, "test_accuracy", name) for method, name in METHODS.items()]
    shown.insert(3, ("ist", "test_accuracy_uncalibrated", TRAVELLING))
    for method, column, name in shown:
        cells = {"method": name}
        for i, (depth, n) in enumerate(columns):
            rows, cell = trained.get(Key(depth, method, n, steps_of(method))), "not run"
            if rows is not None and column in rows[0]:
                values, end = final(rows, column), series(rows, column)[0][-1]
                cell = f"{mean_std(values, 1)} ({len(values)}; {end})"
            cells[f"{depth}-layer, {n} workers"] = cell
            if i in paper:
                known = PAPER_FINAL.get((paper[i], method)) if column == "test_accuracy" else None
                cell = "" if known is None else f"{known:.1f}"
                cells[f"the paper, {paper[i]}-layer, 2 workers"] = cell
        lines.append(cells)
    lines = [
        markdown(lines),
        "",
        "Test accuracy in %, mean ± standard deviation over seeds (seeds; epochs, until the loss "
        "stops improving or at most those above). Local SGD and IST with J = 10.",
    ]
    return "\n".join(lines) + "\n"


def table1(
    trained: dict[Key, list[dict]],
    times: Times | None,
    sizes: dict[int, Size],
    accuracies: tuple[float, ...] = ACCURACIES,
) -> str:
    """Time, samples and bytes to reach accuracies, some of `ACCURACIES`, as Markdown."""
    parts = []
    for depth, size in sizes.items():
        keys = sorted({(TIMED.index(k.method), k.local_steps) for k in trained if _timed(k, depth)})
        if not keys:
            continue
        parts.append(f"**{depth}-layer, {size.name}**")
        quantities = ["samples", "bytes"] if times is None else ["time", "samples", "bytes"]
        for quantity in quantities:
            lines = []
            for accuracy in accuracies:
                i = ACCURACIES.index(accuracy)
                for place, local_steps in keys:
                    method = TIMED[place]
                    cells = {"accuracy": f"{accuracy:.2f}", "method": label(method, local_steps)}
                    for n in (1, *WORKERS):
                        key = Key(depth, method, n, local_steps)
                        name = "1 worker" if n == 1 else f"{n} workers"
                        cells[name] = _cell(trained, key, accuracy, quantity, times, size)
                    for n, seconds in zip(WORKERS, PAPER_SECONDS[depth, method][i]):
                        cell = f"{seconds} ({PAPER_ACCURACIES[i]:.2f})"
                        if quantity == "time":
                            usual = local_steps == steps_of(method)
                            cells[f"the paper's, {n}"] = cell if usual else ""
                    lines.append(cells)
            parts.append(f"{UNITS[quantity]}:\n\n{markdown(lines)}")
    parts.append(
        "By the first report (at most one an epoch, at the end of a round) with so high a test "
        "accuracy; mean ± standard deviation over the seeds that reached it, whose number stands "
        "in brackets where not all did; a dash: none. Data parallel of 1 worker is plain SGD."
        "  The paper's, on its own data and "
        "machines, are to the accuracy in brackets; it does not say which J."
    )
    return "\n\n".join(parts) + "\n"


UNITS = {
    "time": "Seconds (compute measured + network modelled at 1 Gbit/s)",
    "samples": "Thousands of samples, n · 128 a gradient step",
    "bytes": "Megabytes sent, all workers together",
}


def _timed(key: Key, depth: int) -> bool:
    return key.depth == depth and key.method in TIMED and key.workers in WORKERS


def _cell(trained, key: Key, accuracy, quantity, times, size) -> str:
    _, method, n, local_steps = key
    if n == 1 and method != "data-parallel":
        return ""
    if key not in trained:
        return "not run"
    samples, seeds = samples_to(trained[key], accuracy)
    if not len(samples):
        return "—"
    few = "" if len(samples) == seeds else f" [{len(samples)} of {seeds}]"
    steps = samples / (n * BATCH)
    if quantity == "samples":
        return _number(samples / 1e3) + few
    if quantity == "bytes":
        return _number(steps * sent(size, method, n, local_steps) / 1e6) + few
    compute = steps * times.compute(size, method, n)
    network = steps * times.network(size, method, n, local_steps)
    return (
        f"{_number(compute + network)} ({_round(compute.mean())} + {_round(network.mean())}){few}"
    )


def _number(values: np.ndarray) -> str:
    spread = float(std(values))
    text = _round(float(values.mean()))
    return text if math.isnan(spread) else f"{text} ± {_round(spread)}"


def _round(value: float) -> str:
    """Three digits, or the whole number where it has more."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table_of_steps(times: Times) -> str:
    """What was timed, as Markdown."""
    rows = []
    for size in SIZES:
        cells = {"network": size.name}
        for n in (1, *WORKERS):
            seconds = times.seconds.get((size, n))
            rate = "" if seconds is None else f" ({gflop(size, n) / seconds:.0f} GFLOP/s)"
            cell = "not run" if seconds is None else f"{1e3 * seconds:.3g}{rate}"
            cells["one worker" if n == 1 else f"{n} subnets"] = cell
        rows.append(cells)
    note = "Milliseconds of one core, a local step of one worker on a batch of 128."
    return f"{markdown(rows)}\n\n{note}\n"


# ------------------------------------------------------------------------------------------- output


def draw(results: str | os.PathLike, width: int, readme: pathlib.Path | None = None) -> None:
    """Tables and figures from whatever is in `results`, the tables also into the README.

    Args:
      results: holds `steps.csv` and `trainings/`.
      width: of the hidden layers that were trained.
      readme: into which the tables are pasted, where it exists.
    """
    results = pathlib.Path(results)
    trained, times = load(results), read_steps(results)
    sizes = {depth: Size(depth, width, 10) for depth in (2, 3)}
    if times is not None and not all((size, 1) in times.seconds for size in sizes.values()):
        msg = f"{results / STEPS_FILE} has no steps of width {width}; write the --width it has."
        raise ValueError(msg)
    texts: dict[str, str] = {}
    short: dict[str, str] = {}  # for the README, where it is another
    if trained:
        texts = {"table3": table3(trained), "table1": table1(trained, times, sizes)}
        short = {**texts, "table1": table1(trained, times, sizes, ACCURACIES[-1:])}
    if times is not None:
        texts["steps"] = table_of_steps(times)
        figures.figure3(results / "figure3.png", _speedups(times))
        figures.figure4(results / "figure4.png", _curves(trained, times, sizes))
    for name, text in texts.items():
        (results / f"{name}.md").write_text(text)
        print(text)
        if readme is not None and readme.exists():
            paste(readme, name, short.get(name, text))


def _speedups(times: Times) -> dict[str, list[dict[str, Any]]]:
    """Of every size the lines of figure 3."""
    panels = {}
    for size in SIZES:
        if not all((size, n) in times.seconds for n in (1, *WORKERS)):
            continue
        lines = panels[size.name] = []
        for method, local_steps in (
            ("data-parallel", (1,)),
            ("local-sgd", (10, 50)),
            ("ist", (5, 10, 50)),
        ):
            for steps in local_steps:
                speed = lambda wired, m=method, j=steps, s=size: [
                    times.speedup(s, m, n, j, wired) for n in WORKERS
                ]
                line = {"method": method, "local_steps": steps, "label": label(method, steps)}
                lines.append({**line, "wired": speed(True), "alone": speed(False)})
    return panels


def _curves(trained, times: Times, sizes) -> dict[str, list[dict[str, Any]]]:
    """Of every depth at the most workers trained the lines of figure 4."""
    panels = {}
    for depth, size in sizes.items():
        most = max((k.workers for k in trained if _timed(k, depth)), default=None)
        if most is None:
            continue
        keys = [k for k in trained if _timed(k, depth) and k.workers == most]
        keys.sort(key=lambda k: (TIMED.index(k.method), k.local_steps))
        one = Key(depth, "data-parallel", 1, 1)
        keys = [one, *keys] if one in trained else keys
        lines = panels[f"{depth}-layer, {size.name}, {most} workers"] = []
        for key in keys:
            _, accuracy = series(trained[key], "test_accuracy")
            _, samples = series(trained[key], "samples")
            n = key.workers
            steps = samples[0] / (n * BATCH)
            step = times.compute(size, key.method, n)
            step += times.network(size, key.method, n, key.local_steps)
            method = "one worker" if n == 1 else key.method
            line = {"method": method, "local_steps": key.local_steps}
            axes = {
                "seconds": steps * step,
                "samples": samples[0],
                "bytes": steps * sent(size, key.method, n, key.local_steps),
            }
            name = "one worker" if n == 1 else label(key.method, key.local_steps)
            name += f" ({len(accuracy)} seeds)"
            lines.append({**line, "label": name, "accuracy": 100 * accuracy, **axes})
    return panels
