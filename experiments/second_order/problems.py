"""Sixteen partially-separable test functions, by psjax.quasi_newton and by SciPy.

    python -m experiments.second_order.problems
    python -m experiments.second_order.problems --sizes 1000 --problems ARWHEAD WOODS

Every method starts at the function's standard start and stops where the Euclidean norm of the
gradient is at most 1e-6 times the square root of the number of variables, in float64. SciPy's
methods get the same value, gradient and Hessian products, compiled. Seconds are without
compilation. A line of `problems.csv` is written as soon as a method is done, and methods that are
there already are not run again; `problems.png` is the performance profile of the steps and of the
seconds. Both are written to `runs/results/second_order/`, with `--commit-results` to
`experiments/second_order/results/`.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from scipy import optimize
from tqdm import tqdm

import psjax
from experiments._lib.command import run_script
from experiments._lib.config import check_choice, check_least, check_positive
from experiments._lib.figures import panel, save
from experiments._lib.folder import results_folder
from experiments._lib.machine import machine
from experiments._lib.tables import read_texts, write_rows
from experiments.second_order.functions import PROBLEMS, Problem

RESULTS = pathlib.Path(__file__).parent / "results"
STEPS_AT_ONCE = 50  # of a compiled call, between two looks at the clock
OURS: dict[str, dict[str, Any]] = {
    "exact": dict(update="exact"),
    "sr1": dict(update="sr1"),
    "sr1, from the Hessian": dict(update="sr1", start="hessian"),
    "bfgs": dict(update="bfgs"),
    "sr1, 3 pairs": dict(update="sr1", memory=3),
}
SCIPY = ("L-BFGS-B", "trust-ncg")
METHODS = (*OURS, *SCIPY)


@dataclasses.dataclass
class Args:
    """Minimise test functions of several sizes by several methods."""

    problems: tuple[str, ...] = tuple(PROBLEMS)
    """Names of functions."""
    sizes: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Numbers of variables."""
    methods: tuple[str, ...] = METHODS
    """Names of methods."""
    limit: float = 20.0
    """Seconds after which a method is stopped."""
    out: pathlib.Path | None = None
    """Folder of problems.csv and problems.png. Default: runs/results/second_order."""
    commit_results: bool = False
    """Write over experiments/second_order/results."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method found.

    Attributes:
      x: the point.
      steps: iterations, rejected ones included.
      gradients: evaluations of value and gradient of every element.
      products: products with a Hessian.
      seconds: without compilation.
    """

    x: jax.Array
    steps: int
    gradients: int
    products: int
    seconds: float


def by_psjax(problem: Problem, tolerance: float, limit: float, options: dict[str, Any]) -> Found:
    """`psjax.quasi_newton.minimize`, some steps at a time."""
    x = jnp.asarray(problem.start)
    selections, constants = problem.selections(x), problem.arguments()
    fit = jax.jit(
        psjax.quasi_newton.minimize(
            [kind.fn for kind in problem.kinds],
            in_axes=0,
            rtol=0.0,
            atol=tolerance,
            max_steps=STEPS_AT_ONCE,
            max_bytes=2**33,
            **options,
        )
    )
    first = fit.lower(x, selections, constants).compile()
    _, like = jax.eval_shape(fit, x, selections, constants)
    more = fit.lower(x, selections, constants, state=like.state).compile()
    info, steps, products, start = None, 0, 0, time.perf_counter()
    while True:
        if info is None:
            x, info = first(x, selections, constants)
        else:
            x, info = more(x, selections, constants, state=info.state)
        steps += int(info.steps)
        products += int(info.cg_steps.sum())
        seconds = time.perf_counter() - start
        if info.status != 1 or seconds > limit:
            return Found(x, steps, steps + 1, products, seconds)


def by_scipy(problem: Problem, tolerance: float, limit: float, method: str) -> Found:
    """SciPy's minimisers, with compiled functions."""
    x = jnp.asarray(problem.start)
    selections, constants = problem.selections(x), problem.arguments()
    parts = list(zip([kind.fn for kind in problem.kinds], selections, constants))

    @jax.jit
    def value_and_grad(x):
        found = [psjax.value_and_grad(fn, 0)(x, s, d) for fn, s, d in parts]
        return sum(value for value, _ in found), sum(grad for _, grad in found)

    @jax.jit
    def hessian_product(x, v):
        product = psjax.quasi_newton.hessian_operator
        return sum(product(fn, 0)(x, s, d)(v) for fn, s, d in parts)

    jax.block_until_ready((value_and_grad(x), hessian_product(x, x)))
    start = time.perf_counter()

    def stop(*_):
        if time.perf_counter() - start > limit:
            raise StopIteration

    numpy = lambda x: np.asarray(x, np.float64)
    own: dict[str, Any] = dict(options=dict(gtol=tolerance, maxiter=10**6))
    if method == "trust-ncg":
        own["hessp"] = lambda x, v: numpy(hessian_product(x, v))
    else:  # its tolerance is of the largest entry
        gtol = tolerance / np.sqrt(len(problem.start))
        own["options"] = dict(gtol=gtol, ftol=0.0, maxiter=10**6, maxfun=10**6)
    found = optimize.minimize(
        lambda x: tuple(map(numpy, value_and_grad(x))),
        problem.start,
        jac=True,
        method=method,
        callback=stop,
        **own,
    )
    seconds = time.perf_counter() - start
    products = int(found.get("nhev", 0))
    return Found(jnp.asarray(found.x), found.nit, found.nfev, products, seconds)


def measure(problem: Problem, method: str, limit: float) -> dict[str, Any]:
    """The columns of one method on one function."""
    tolerance = 1e-6 * len(problem.start) ** 0.5
    if method in OURS:
        found = by_psjax(problem, tolerance, limit, OURS[method])
    else:
        found = by_scipy(problem, tolerance, limit, method)
    value, gradient = jax.jit(jax.value_and_grad(problem.value))(found.x)
    norm = float(jnp.linalg.norm(gradient))
    return {
        "converged": bool(norm <= 2 * tolerance),  # rounding
        "steps": found.steps,
        "gradients": found.gradients,
        "products": found.products,
        "seconds": found.seconds,
        "value": float(value),
        "gradient_norm": norm,
    }


# ------------------------------------------------------------------------------------------ figure


def profile(costs: dict[str, list[float]]) -> dict[str, np.ndarray]:
    """Of every method its costs divided by the best method's, sorted; infinite: not converged."""
    table = np.array(list(costs.values()))
    best = table.min(axis=0)
    ratios = table / np.where(np.isfinite(best), best, 1.0)
    return {name: np.sort(row) for name, row in zip(costs, ratios)}


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Performance profiles (Dolan, Moré 2002) of steps and of seconds."""
    methods = [m for m in METHODS if any(row["method"] == m for row in rows)]
    cases = sorted({(row["problem"], row["n"]) for row in rows})
    by_case = {(row["problem"], row["n"], row["method"]): row for row in rows}
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    columns = {"steps": "Steps", "seconds": "Seconds, without compilation"}
    for ax, (column, title) in zip(figure.subplots(1, 2), columns.items()):
        costs = {}
        for method in methods:
            own = [by_case.get((*case, method)) for case in cases]
            costs[method] = [
                max(float(row[column]), 1e-9) if row and row["converged"] == "True" else np.inf
                for row in own
            ]
        for method, ratios in profile(costs).items():
            share = np.arange(1, len(ratios) + 1) / len(ratios)
            style = "--" if method in SCIPY else "-"
            end = [*ratios[np.isfinite(ratios)], 1e6]
            shares = [*share[np.isfinite(ratios)]]
            ax.step(end, [*shares, shares[-1] if shares else 0], style, where="post", label=method)
        ax.set(xscale="log", xlim=(1, 100), ylim=(0, 1.02))
        panel(ax, title, "times the best method's", "share of the functions solved")
    figure.axes[1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{len(cases)} functions and sizes")
    save(figure, path)


# ------------------------------------------------------------------------------------------ command


def main(args: Args) -> None:
    """Measure what is not there yet, and draw."""
    check_positive("limit", args.limit)
    for name in args.problems:
        check_choice("problems", name, PROBLEMS)
    for name in args.methods:
        check_choice("methods", name, METHODS)
    for n in args.sizes:
        check_least("sizes", n, 8)
    out = results_folder(RESULTS, args.commit_results, args.out)
    path = out / "problems.csv"
    rows: list[dict[str, Any]] = [dict(row) for row in read_texts(path)]
    done = {(row["problem"], row["n"], row["method"]) for row in rows}
    cells = [(p, n, m) for n in args.sizes for p in args.problems for m in args.methods]
    cells = [cell for cell in cells if (cell[0], str(cell[1]), cell[2]) not in done]
    print(machine("scipy"))
    with tqdm(cells, unit="method") as bar:
        for name, n, method in bar:
            bar.set_description(f"{name} {n} {method}")
            row = {"problem": name, "n": n, "method": method}
            with jax.enable_x64(True):
                rows.append(row | measure(PROBLEMS[name](n), method, args.limit))
            write_rows(path, rows)
            jax.clear_caches()
    rows = [dict(row) for row in read_texts(path)]
    draw(rows, out / "problems.png")
    print(f"{len(cells)} measured; written to {out}.")


if __name__ == "__main__":
    run_script(main, Args, __doc__)
