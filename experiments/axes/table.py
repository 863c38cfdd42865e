"""What `psjax.infer_axes` finds in every model of the registry, as a table.

    python -m experiments.axes
    python -m experiments.axes --models gpt resnet18-batchnorm --out /tmp/axes

The models are those of `tests/axes/registry.py`, and `tests/axes/missed.py` looks for what was
missed. A line is written as soon as a model is done: the
axes of each kind; whether `psjax.check_axes` proves them; fixed dimensions that can be permuted
after all; what is fixed and why; and milliseconds, each the median of three, with JAX's caches
empty as at a first call. Both files, `models.csv` and `models.md`, are written anew every time, to
`runs/results/axes/`; with `--commit-results` to `experiments/axes/results/`.
"""

import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import pathlib
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from tqdm import tqdm

import psjax
from experiments._lib.config import check_choice, check_positive
from experiments._lib.folder import replace, results_folder
from experiments._lib.machine import processor
from experiments._lib.tables import markdown, write_rows

REPEATS = 3
RESULTS = pathlib.Path(__file__).parent / "results"
KINDS = ("hidden", "output", "input", "normalised")


@dataclasses.dataclass
class Args:
    """Find the axes of the models of the registry, and measure what was found."""

    models: tuple[str, ...] = ()
    """Names of models; default: all."""
    out: pathlib.Path | None = None
    """Folder of models.csv and models.md. Default: runs/results/axes."""
    commit_results: bool = False
    """Write over experiments/axes/results."""
    limit: float = 20.0
    """Give up the search for a model's axes after so many seconds."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A model's line; the columns of the CSV.

    `wrong` and `missed` say what, or are empty; so is `failed`, why there are no axes at all.
    """

    model: str
    hidden: int | None = None
    normalised: int | None = None
    output: int | None = None
    input: int | None = None
    wrong: str = ""
    missed: str = ""
    unknown: str = ""
    fixed: str = ""
    infer_ms: float | None = None
    trace_ms: float | None = None
    failed: str = ""


def registry() -> tuple[dict[str, Any], Callable[..., list[str]]]:
    """The models by name, and what looks for axes that were missed."""
    try:
        from tests.axes.missed import missed
        from tests.axes.registry import CASES
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("tests"):
            raise
        msg = (
            "the models are in tests/axes/registry.py, which is not here; run the command in the "
            "root of a checkout of psjax."
        )
        raise ImportError(msg) from error
    return CASES, missed


def measure(name: str, make: Callable[[], Any], limit: float, missed) -> Row:
    """A model's line.

    Args:
      name: of the model.
      make: returns `(apply, params, inputs)`.
      limit: seconds.
      missed: `(apply, params, inputs) -> descriptions` of axes that were missed.
    """
    apply, params, inputs = make()
    try:
        with _at_most(limit):
            axes = psjax.infer_axes(apply, params, *inputs)
    except TimeoutError:
        return Row(name, failed=f"infer_axes takes longer than {limit:g} s")
    infer_ms, trace_ms = _times(apply, params, inputs)
    kinds = collections.Counter(axis.kind for axis in axes.axes.values())
    try:
        psjax.check_axes(apply, axes, params, *inputs)
        wrong = ""
    except ValueError as error:
        wrong = str(error)
    return Row(
        name,
        **{kind: kinds[kind] for kind in KINDS},  # pyright: ignore[reportArgumentType]
        wrong=wrong,
        missed="; ".join(missed(apply, params, inputs)),
        unknown=", ".join(f"{name} {times}" for name, times in axes.unknown.items()),
        fixed=_why(axes),
        infer_ms=infer_ms,
        trace_ms=trace_ms,
    )


def _why(axes):
    """The reasons with their primitives, and how many dimensions each fixes."""
    reasons: collections.Counter[str] = collections.Counter()
    for own in axes.fixed:
        primitive = own.reason.primitive
        reasons[own.reason.text + (f" ({primitive})" if primitive else "")] += 1
    return "; ".join(f"{number} {reason}" for reason, number in reasons.most_common())


def _times(apply, params, inputs):
    """Milliseconds of `infer_axes` and of tracing alone, which take turns."""
    calls = (
        lambda: psjax.infer_axes(apply, params, *inputs),
        lambda: jax.make_jaxpr(apply)(params, *inputs),
    )
    seconds: list[list[float]] = [[], []]
    for _ in range(REPEATS):
        for call, own in zip(calls, seconds):
            jax.clear_caches()
            start = time.perf_counter()
            call()
            own.append(time.perf_counter() - start)
    return [1e3 * statistics.median(own) for own in seconds]


@contextlib.contextmanager
def _at_most(seconds):
    """A TimeoutError after so many seconds."""

    def stop(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ------------------------------------------------------------------------------------------ writing


def as_markdown(rows: list[Row], command: str, skipped: list[str]) -> str:
    """The table for readers, with what made it."""
    done = [row for row in rows if row.infer_ms is not None]
    total = lambda kind: sum(getattr(row, kind) or 0 for row in rows)
    kinds = ", ".join(f"{total(kind)} {kind}" for kind in KINDS)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax"))
    lines = [
        "# Axes found in models that nobody wrote for it",
        "",
        f"`{command}`, {versions}, Python {platform.python_version()}, one CPU ({processor()}).",
        "",
        f"{len(rows)} models, {sum(map(total, KINDS))} axes: {kinds}. "
        f"Wrong axes: {sum(bool(row.wrong) for row in rows)} models. "
        f"Missed axes: {sum(bool(row.missed) for row in rows)} models. "
        f"No answer: {sum(bool(row.failed) for row in rows)} models.",
    ]
    if skipped:
        lines += ["", f"Left out for want of a package: {', '.join(skipped)}."]
    if done:
        slowest = max(done, key=lambda row: row.infer_ms or 0.0)
        median = statistics.median(row.infer_ms or 0.0 for row in done)
        lines += [
            "",
            f"`infer_axes` takes {median:.0f} ms (median), at most {slowest.infer_ms:.0f} "
            f"({slowest.model}). Milliseconds are medians of {REPEATS} with JAX's caches empty; "
            "tracing alone in brackets.",
        ]
    lines += [
        "",
        "- *wrong*: what `check_axes` says against the axes; 0 where it proves them.",
        "- *missed*: fixed dimensions whose rows could be permuted without a change of the "
        "results; 0 where every permutation that was tried changed them.",
        "- *fixed, and why*: number of dimensions, and the reason with its primitive.",
        "",
    ]
    table = []
    for row in rows:
        cells = {"model": row.model, **{k: getattr(row, k) for k in _COLUMNS}}
        fixed = row.fixed + (f"; no rule: {row.unknown}" if row.unknown else "")
        ms = "" if row.infer_ms is None else f"{row.infer_ms:.0f} ({row.trace_ms:.0f})"
        none = "0" if row.infer_ms is not None else ""
        cells |= {"wrong": row.wrong or none, "missed": row.missed or none}
        cells |= {"fixed, and why": row.failed or fixed, "ms": ms}
        text = {k: "" if cell is None else str(cell) for k, cell in cells.items()}
        table.append({k: cell.replace("|", "/") for k, cell in text.items()})
    return "\n".join([*lines, markdown(table, numbers=(*_COLUMNS, "ms"))]) + "\n"


_COLUMNS = ("hidden", "normalised", "output", "input")


# ------------------------------------------------------------------------------------------ command


def main(args: Args) -> None:
    """Measure the models and write the table."""
    check_positive("limit", args.limit)
    cases, missed = registry()
    for name in args.models:
        check_choice("models", name, cases)
    jax.config.update("jax_disable_most_optimizations", True)  # what is compiled runs a few times
    out = results_folder(RESULTS, args.commit_results, args.out)
    chosen = ("--models", *args.models) if args.models else ()
    command = " ".join(("python -m experiments.axes", *chosen))
    rows: list[Row] = []
    skipped: list[str] = []
    with tqdm(args.models or list(cases), unit="model") as bar:
        for name in bar:
            bar.set_description(name)
            case = cases[name]
            if case.needs is not None and importlib.util.find_spec(case.needs) is None:
                bar.write(f"{name}: left out, {case.needs} is not installed", file=sys.stdout)
                skipped.append(name)
                continue
            row = measure(name, case.make, args.limit, missed)
            for what in ("failed", "wrong", "missed", "unknown"):
                if getattr(row, what):
                    bar.write(f"{name}: {what}: {getattr(row, what)}", file=sys.stdout)
            rows.append(row)
            write_rows(out / "models.csv", [dataclasses.asdict(row) for row in rows], digits=".1f")
            replace(out / "models.md", as_markdown(rows, command, skipped))
    print(f"{len(rows)} models, written to {out}.")
