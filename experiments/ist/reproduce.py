"""Tables 1 and 3 and figures 3 and 4 of the IST paper again, at a size that two cores can train.

B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent
Subnet Training*, arXiv:1910.02120, section 6, on spoken_digit: dense networks with 1024 neurons in
every hidden layer, the paper's batch of 128 a worker, SGD with its learning rate 1e-2.

    python -m experiments.ist.reproduce                     # all, about two hours on one core
    python -m experiments.ist.reproduce --only steps        # time single local steps, a minute
    python -m experiments.ist.reproduce --only '2layer-*'   # the 2-layer networks
    python -m experiments.ist.reproduce --only '*-ist-n8-J10' --seeds 10
    python -m experiments.ist.reproduce --plot              # tables and figures, nothing is run

Every setting continues where it was interrupted, and one that is done is not run again. What was
measured goes to `runs/results/ist/`, which begins as a copy of `experiments/ist/results/`; with
`--commit-results` to the latter. Several processes may share the settings; for times
that mean something give each one core (`taskset -c 0`), and `steps` a quiet one.
"""

import dataclasses
import fnmatch
import functools
import itertools
import math
import pathlib
import shutil
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

import psjax
from experiments._lib.command import run_script
from experiments._lib.folder import open_folder, results_folder
from experiments._lib.loop import NotFiniteError
from experiments._lib.tables import read_rows, write_rows
from experiments.benchmarks import timing
from experiments.ist import run, tables, training
from experiments.ist.tables import METHODS, Key, steps_of

RESULTS = pathlib.Path(__file__).parent / "results"
STEPS = "steps"
WIDTH = 1024
PATIENCE = 20  # reports without a lower training loss, the end of "while loss keeps improving"
EPOCHS = {  # at most; a subnet's epoch costs 1/n of the work, and more of them are needed
    "whole": {1: 40, 2: 40, 4: 60, 8: 80},
    "ist": {2: 60, 4: 120, 8: 300},
}


def _settings() -> dict[str, tuple[Key, int]]:
    """All with their seeds, the most important first: table 3, then what table 1 has beyond it."""
    grid = itertools.product
    first = [Key(depth, m, n, steps_of(m)) for n, depth, m in grid((2, 8), (2, 3), METHODS)]
    rest = [Key(depth, "data-parallel", 1, 1) for depth in (2, 3)]
    for depth, n in grid((2, 3), (2, 8, 4)):
        rest += [Key(depth, m, n, j) for j, m in grid((10, 5, 50), ("ist", "local-sgd"))]
        rest.append(Key(depth, "data-parallel", n, 1))
    rest += [Key(2, "ist", n, 1) for n in (2, 8, 4)]
    later = {key.name: (key, 3) for key in rest}
    table3 = {key.name: (key, 5) for key in first}
    return {**table3, **{name: x for name, x in later.items() if name not in table3}}


SETTINGS = _settings()


@dataclasses.dataclass
class Args:
    """Train the settings of tables 1 and 3, time local steps, or draw what was measured."""

    only: tuple[str, ...] = ()
    """Settings to run, such as 3layer-ist-n8-J10, with * for anything, or steps; default all."""
    seeds: int | None = None
    """Trainings a setting; default 5 for those of table 3, 3 for the others."""
    first_seed: int = 0
    epochs: int | None = None
    """At most; default 40 to 300, see EPOCHS."""
    width: int = WIDTH
    """Neurons of every hidden layer."""
    dataset: str = "spoken_digit"
    data_dir: str | None = None
    """Where TFDS keeps its sets. Default: TFDS_DATA_DIR, else TFDS's own."""
    repeats: int = 9
    """Of every timing."""
    out: pathlib.Path = pathlib.Path("runs/reproduce-ist")
    """Where run folders go."""
    results: pathlib.Path | None = None
    """Where rows, tables and figures go. Default: runs/results/ist."""
    plot: bool = False
    """Run nothing; tables and figures from what was measured; where they are written to --results
    or with --commit-results, the tables also into README.md of the folder above."""
    commit_results: bool = False
    """Write to experiments/ist/results."""

    @functools.cached_property
    def where(self) -> pathlib.Path:
        """The folder of the results."""
        return results_folder(RESULTS, self.commit_results, self.results)


def config_of(setting: tuple[Key, int], args: Args) -> training.Config:
    """The training of one setting."""
    key, seeds = setting
    n, divided = key.workers, key.method.startswith("ist")
    return training.Config(
        dataset=args.dataset,
        method="ist" if key.method == "ist-none" else key.method,
        subnets=n,
        local_steps=key.local_steps,
        depth=key.depth,
        width=args.width,
        # Both accuracies come from one training: statistics that travel do not change the weights.
        normalization={"ist": "travelling", "ist-none": "none"}.get(key.method, "batch"),
        epochs=args.epochs or EPOCHS["ist" if divided else "whole"][n],
        seeds=args.seeds or seeds,
        first_seed=args.first_seed,
    )


def loss_stands_still(rows: list[dict], patience: int = PATIENCE) -> bool:
    """Whether none of the last `patience` reports had the lowest loss, mean over the seeds."""
    losses: dict[int, list[float]] = {}
    for row in rows:
        losses.setdefault(row["epoch"], []).append(row["train_loss"])
    means = [np.mean(losses[epoch]) for epoch in sorted(losses)]
    return len(means) - 1 - int(np.argmin(means)) >= patience


def train(setting: tuple[Key, int], args: Args) -> None:
    """A setting to its end; its rows into the results."""
    config = config_of(setting, args)
    last = config.first_seed + config.seeds - 1
    name = f"{setting[0].name}-seeds{config.first_seed}-{last}"
    folder = args.out / name
    if (folder / "done").exists():
        open_folder(config, folder, resume=True)  # refuses another training of this name
        print(f"{name}: done before", file=sys.stderr)
        return
    start = time.process_time()
    try:
        rows = run.train(
            config,
            folder,
            resume=folder.exists(),
            checkpoint_every=20,
            data_dir=args.data_dir,
            stop=loss_stands_still,
        )
    except NotFiniteError as error:
        print(f"{name}: {error}", file=sys.stderr)
        rows = read_rows(folder / "metrics.csv")
        # The tables show a training that diverged as NaN, from where it did.
        after = {"epoch": max((row["epoch"] for row in rows), default=0) + 1, "samples": 0}
        nan = {"train_loss": math.nan, "test_accuracy": math.nan}
        seeds = range(config.first_seed, config.first_seed + config.seeds)
        rows += [{**(rows[0] if rows else {}), **after, **nan, "seed": seed} for seed in seeds]
    if rows:
        kept = ("epoch", "seed", "samples", "train_loss", "test_accuracy")
        kept += tuple(c for c in rows[0] if c == "test_accuracy_uncalibrated")
        kept_rows = [{column: row[column] for column in kept} for row in rows]
        write_rows(args.where / "trainings" / f"{name}.csv", kept_rows)
    (folder / "done").touch()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # gigabytes, over all settings
    print(f"{name}: done, {time.process_time() - start:.0f} s of a core", file=sys.stderr)


# --------------------------------------------------------------------------------------- step times


def local_steps(size: tables.Size, workers: int, number: int):
    """A call that takes so many of one worker's local steps, on noise."""
    config = training.Config(dataset="digits", depth=size.depth, width=size.width)
    net = training.make_model(config, size.labels).subnet(workers)
    optimizer = training.make_optimizer(config)
    rng = np.random.default_rng(0)
    xs = jnp.asarray(rng.random((8, tables.BATCH, size.features), np.float32))
    ys = jnp.asarray(rng.integers(0, size.labels, (8, tables.BATCH)))

    def loss_fn(params, x, y):
        scores = net.apply({"params": params}, x, train=True)
        return psjax.losses.nll_with_integer_labels(scores, y).mean()

    def loss_and_grad(params, i):
        return jax.value_and_grad(loss_fn)(params, xs[i % 8], ys[i % 8])

    params, _ = timing.init(net, xs[0])
    steps = jax.jit(timing.steps_fn(loss_and_grad, optimizer), donate_argnums=0)
    return timing.Program(steps, (params, optimizer.init(params)), (jnp.arange(number),))


def time_steps(args: Args) -> list[dict]:
    """A row for every size and number of workers: seconds of a core a local step.

    Processor time of this process, so that other processes on the machine hardly matter; the
    programs of a size take turns.
    """
    rows = []
    for size in tables.SIZES:
        numbers = {n: int(np.clip(20 / tables.gflop(size, n), 2, 50)) for n in (1, 2, 4, 8)}
        calls = {str(n): local_steps(size, n, number) for n, number in numbers.items()}
        seconds = timing.take_turns(calls, args.repeats, clock=time.process_time)
        for n, number in numbers.items():
            low, median, high = np.quantile(seconds[str(n)] / number, (0.25, 0.5, 0.75)).tolist()
            row = {"seconds": median, "low": low, "high": high, "gflop": tables.gflop(size, n)}
            rows.append({**size._asdict(), "workers": n, **row})
            print(f"{size.name}, n = {n}: {1e3 * median:.2f} ms a step", file=sys.stderr)
    write_rows(args.where / tables.STEPS_FILE, rows)
    return rows


def chosen(only: tuple[str, ...]) -> list[str]:
    """The names that `--only` means, in the order of `SETTINGS`.

    Raises:
      ValueError: a name or pattern of nothing.
    """
    names = [STEPS, *SETTINGS]
    for pattern in only:
        if not fnmatch.filter(names, pattern):
            msg = f"--only {pattern}: no such setting; write some of {', '.join(names)}."
            raise ValueError(msg)
    return [n for n in names if not only or any(fnmatch.fnmatchcase(n, p) for p in only)]


def main(args: Args) -> None:
    names = chosen(args.only)
    if args.plot:
        results = args.where
        ours = args.commit_results or args.results is not None
        readme = results.parent / "README.md" if ours else None
        tables.draw(results, args.width, readme)
        return
    for name in names:
        if name == STEPS:
            time_steps(args)
        else:
            train(SETTINGS[name], args)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
