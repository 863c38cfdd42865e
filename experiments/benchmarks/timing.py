"""What the benchmarks share: programs that take turns, ratios of their times, tables of them."""

import dataclasses
import importlib.util
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from tqdm import tqdm

from experiments._lib.config import check_least
from experiments._lib.folder import results_folder
from experiments._lib.tables import write_rows

RESULTS = pathlib.Path(__file__).parent / "results"


@dataclasses.dataclass
class Args:
    """Options that the benchmarks have in common."""

    repeats: int = 9
    """Rounds of the programs that take turns; the figures are medians over them."""
    out: pathlib.Path | None = None
    """CSV to write. Default: a file in runs/results/benchmarks."""
    commit_results: bool = False
    """Write over the CSV in experiments/benchmarks/results."""

    def __post_init__(self):
        check_least("repeats", self.repeats, 1)

    def path(self, name: str) -> pathlib.Path:
        """The CSV."""
        return self.out or results_folder(RESULTS, self.commit_results) / name


# ------------------------------------------------------------------------------------------- clocks


@dataclasses.dataclass
class Program:
    """A jitted `(state, *args) -> state, anything` whose state is donated, as a call."""

    fn: Any
    state: Any
    args: tuple[Any, ...]

    def __call__(self):
        self.state, _ = jax.block_until_ready(self.fn(self.state, *self.args))


def take_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] | None = None
) -> dict[str, np.ndarray]:
    """Seconds of every call, `{name: [repeats]}`.

    Every round calls each program once, every other round in the opposite order, so that a
    machine that slows down slows all of them down. One round before the first is not counted.

    Args:
      calls: functions that return when their work is done.
      repeats: rounds.
      clock: seconds; default: `time.perf_counter`.
    """
    clock = clock or time.perf_counter
    seconds = {name: np.zeros(repeats) for name in calls}
    for turn in range(-1, repeats):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            start = clock()
            calls[name]()
            if turn >= 0:
                seconds[name][turn] = clock() - start
    return seconds


def count_compilations(calls: Iterable[Callable[[], Any]]) -> int:
    """How many programs XLA compiles for these calls, one after the other."""
    seen = []

    def listen(event, duration_secs, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for call in calls:
        jax.block_until_ready(call())
    return len(seen)


# ----------------------------------------------------------------------------------------- programs


def init(net, *inputs):
    """Parameters of a network, and their axes."""
    variables = jax.jit(net.init)(jax.random.key(0), *inputs)
    return nn.unbox(variables)["params"], nn.get_partition_spec(variables)["params"]


def steps_fn(loss_and_grad, optimizer):
    """`(state, batches) -> state, losses`: training steps, one after the other.

    Args:
      loss_and_grad: `(params, batch) -> loss, grads`.
      optimizer: of optax; the state is `(params, opt_state)`.
    """

    def step(state, batch):
        params, opt_state = state
        loss, grads = loss_and_grad(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    return lambda state, batches: jax.lax.scan(step, state, batches)


def product(n: int) -> Callable[[], None]:
    """A product of two n x n matrices in float32: what this machine can do at the same moment."""
    a = jnp.asarray(np.random.default_rng(0).standard_normal((n, n), np.float32))
    fn = jax.jit(jnp.matmul)
    return lambda: jax.block_until_ready(fn(a, a))


# ------------------------------------------------------------------------------------------- ratios

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
    write_rows(path, [dataclasses.asdict(row) for row in rows], digits=".4g")


def report(tables: Iterable[Iterable[Ratio]], path: pathlib.Path | None) -> None:
    """Print the rows of all tables as they come, and write them to `path` each time."""
    print(HEADER)
    rows: list[Ratio] = []
    for table in tqdm(tables, desc="tables", disable=None):
        for row in table:
            tqdm.write(str(row))
            rows.append(row)
            if path is not None:
                write(path, rows)
    if path is not None:
        print(f"\nWritten to {path}.")


# ------------------------------------------------------------------------------------------ PyTorch


def find_torch(skip: bool) -> bool:
    """Whether to compare with PyTorch: not if it is to be skipped, or is not installed."""
    if not skip and importlib.util.find_spec("torch") is None:
        print("torch is not installed: no comparison with PyTorch.")
        return False
    return not skip
