"""Very many labels in independent subnets: the paper's Table 2 on Bibtex, Amazon-670k's shapes.

B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent
Subnet Training*, arXiv:1910.02120, section 6: a network of two layers, sparse features -> hidden
neurons -> labels; the hidden neurons are divided, so that a subnet has 1/n of both layers.

    python -m experiments.ist.extreme --data PATH/TO/Bibtex       # trains; the folder of train.txt
    python -m experiments.ist.extreme --plot                      # bibtex.png again, no training
    python -m experiments.ist.extreme --amazon-shapes             # one round, its memory and time
    python -m experiments.ist.extreme --amazon-shapes --width 1024

The first writes `bibtex.csv`, a row an epoch and seed, and `bibtex.md` while it trains, and
continues where it was interrupted; at its end it draws `bibtex.png` from the CSV, which is all that
the second does. The third adds a row to `amazon_shapes.csv` and `amazon_shapes.md`; a size a
process, for memory's peak is the process's. All go to `runs/results/ist/`, which begins as a copy
of `experiments/ist/results/`; with `--commit-results` to the latter.

Data sets: K. Bhatia, K. Dahiya, H. Jain, P. Kar, A. Mittal, Y. Prabhu, M. Varma, *The extreme
classification repository*, 2016, http://manikvarma.org/downloads/XC/XMLRepository.html.
"""

import dataclasses
import functools
import itertools
import pathlib
import sys
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import psjax
from experiments._lib import loop
from experiments._lib.command import run_script
from experiments._lib.folder import open_folder, replace, results_folder
from experiments._lib.loop import NotFiniteError
from experiments._lib.program import over_seeds
from experiments._lib.tables import markdown, read_mixed, read_rows, write_rows
from experiments.ist import amazon, figures, run, training
from experiments.ist.sparse import ROW, Rows, divide, load, make_model, round_fn

RESULTS = pathlib.Path(__file__).parent / "results"
K = 5  # the largest k of P@k
OPTIONS = ("part", "width", "subnets", "local_steps", "optimizer", "learning_rate")  # in the CSV
METRICS = ("P@1", "P@3", "P@5", "nDCG@1", "nDCG@3", "nDCG@5", "PSP@1", "PSP@3", "PSP@5")
RATES = {  # tried where none is given
    "sgd": (0.1, 0.3, 1.0, 3.0),
    "momentum": (0.01, 0.03, 0.1, 0.3),
    "adam": (1e-3, 3e-3, 1e-2, 3e-2),
}
PAPER = """\
| Amazon-670k, the paper's Table 2 | P@1, % | P@3, % | P@5, % |
|---|---|---|---|
| data parallel, 512 neurons, 4 machines | 38.61 | 34.54 | 31.64 |
| IST, 512 neurons, 4 machines | 39.62 | 36.04 | 33.13 |
| IST, 1024 neurons, 8 machines | 40.89 | 36.85 | 33.92 |
"""


@dataclasses.dataclass
class Args:
    """Train a network with very many labels in independent subnets."""

    data: pathlib.Path | None = None
    """Folder with train.txt and test.txt in the repository's format, such as Bibtex's."""
    amazon_shapes: bool = False
    """One round with Amazon-670k's shapes and synthetic rows; no data needed."""
    width: int = 512
    """Hidden neurons; with --data also twice as many, on twice as many subnets."""
    subnets: int | None = None
    """n. Default: 4, the paper's for 512 neurons; with --amazon-shapes 8."""
    local_steps: int | None = None
    """J, steps between two exchanges. Default: 5; with --amazon-shapes 2."""
    batch_size: int = 128
    """Samples of one worker's step."""
    optimizer: str | None = None
    """sgd, momentum (0.9) or adam. Default: adam; with --amazon-shapes sgd, which has no state."""
    learning_rates: tuple[float, ...] = ()
    """To choose from on the validation part; --amazon-shapes takes the first. Default: four."""
    epochs: int = 30
    seeds: int = 5
    """Trainings a setting, for mean and standard deviation."""
    validation_seeds: int = 2
    """Trainings for each learning rate."""
    out: pathlib.Path | None = None
    """Folder of the CSV, the table and the picture. Default: runs/results/ist."""
    commit_results: bool = False
    """Write to experiments/ist/results."""
    runs: pathlib.Path = pathlib.Path("runs/extreme")
    """Where run folders go."""
    plot: bool = False
    """Train nothing; the picture again, from the CSV. Of --data, here by default Bibtex, only the
    name matters."""

    def __post_init__(self):
        if self.plot and self.amazon_shapes:
            msg = "--plot --amazon-shapes: a round has no curve; write --plot alone."
            raise ValueError(msg)
        if self.plot and self.data is None:
            self.data = pathlib.Path("Bibtex")
        if self.amazon_shapes == (self.data is not None):
            msg = "write --data FOLDER, of train.txt and test.txt, or --amazon-shapes."
            raise ValueError(msg)
        self.subnets = self.subnets or (8 if self.amazon_shapes else 4)
        self.local_steps = self.local_steps or (2 if self.amazon_shapes else 5)
        self.optimizer = self.optimizer or ("sgd" if self.amazon_shapes else "adam")
        if self.optimizer not in RATES:
            msg = f"--optimizer {self.optimizer}: write one of {', '.join(RATES)}."
            raise ValueError(msg)
        self.learning_rates = self.learning_rates or RATES[self.optimizer]

    @property
    def options(self) -> dict[str, Any]:
        """What a training's configuration takes as it is."""
        names = ("width", "subnets", "local_steps", "batch_size", "optimizer")
        return {name: getattr(self, name) for name in names}

    @functools.cached_property
    def where(self) -> pathlib.Path:
        """The folder of the results."""
        return results_folder(RESULTS, self.commit_results, self.out)


@dataclasses.dataclass(frozen=True)
class Config(training.Config):
    """One training; `width` is that of the hidden layer."""

    data: str = ""
    """Name and checksum of the data set."""
    part: str = "test"
    """validation: a fifth of the training set is kept back and evaluated; test: trains on all."""


# ----------------------------------------------------------------------------------------- training


def best_labels_fn(net, size: int = 500):
    """`(params [seeds, ...], held_out, sample) -> [seeds, N, 5]`, best first, jitted.

    `held_out` and `sample` are ids and values, `[N, width]` and `[batches, B, width]`; with the
    sample, of the training set, the whole network is calibrated.
    """

    def one(params, held_out, sample):
        statistics = psjax.ist.calibrate(net, params, sample)
        variables = {"params": params, "batch_stats": statistics}
        n = len(held_out[0])
        index = jnp.minimum(jnp.arange(-(-n // size) * size), n - 1).reshape(-1, size)
        best = lambda i: net.apply(variables, *(x[i] for x in held_out), K, method="top_k")
        return jax.lax.map(best, index).reshape(-1, K)[:n]

    return jax.jit(
        lambda params, held_out, sample: over_seeds(lambda p: one(p, held_out, sample))(params)
    )


def scores(best: np.ndarray, held_out: Rows, counts: np.ndarray, num_points: int) -> dict:
    """All metrics of the predictions `[N, 5]`; counts and points are the training set's."""
    labels, L = held_out.arrays["labels"], held_out.num_labels
    found = {
        "P": psjax.metrics.precision_at_k(best, labels, L, K),
        "nDCG": psjax.metrics.ndcg_at_k(best, labels, L, K),
        "PSP": psjax.metrics.propensity_scored_precision_at_k(
            best, labels, psjax.metrics.propensities(counts, num_points), K
        ),
    }
    return {name: float(found[(m := name.split("@"))[0]][int(m[1]) - 1]) for name in METRICS}


def train(
    config: Config,
    train: Rows,
    held_out: Rows,
    folder: pathlib.Path,
    written: Callable[[list[dict]], Any] = lambda rows: None,
    checkpoint_every: int = 5,
) -> list[dict]:
    """Train as `config` says, or continue, in a run folder; returns the metrics.

    As `experiments.ist.run.train`: every round follows from the state and (seed, round) alone, and
    an interrupted training ends with the same parameters as one that was not.

    Args:
      config: the training.
      train: what it trains on.
      held_out: what every report's metrics are of.
      folder: the run folder.
      written: called with the rows so far, an epoch and seed each.
      checkpoint_every: epochs between checkpoints.

    Raises:
      NotFiniteError: NaN or Inf in the parameters, or in all subnets of a round.
    """
    rows = read_rows(folder / "metrics.csv")
    last = rows[-1]["epoch"] if rows else 0
    if last > config.epochs:
        msg = f"{folder} has {last} epochs; write --epochs {last} or more, or another --runs."
        raise ValueError(msg)
    if last == config.epochs:
        open_folder(config, folder, resume=True)  # refuses another training of this name
        written(rows)
        return rows
    make = lambda: Labels(build(config, train, held_out))
    how: dict = {"resume": True, "checkpoint_every": checkpoint_every, "stop": written}
    loop.train(config, folder, make, 1, **how)
    return read_rows(folder / "metrics.csv")  # as a later call returns them


class Labels(run.Rounds):
    """Rounds whose rows have `METRICS` in place of an accuracy."""

    headline = "P@1"
    cure = "lower --learning-rates"


def build(config: Config, train: Rows, held_out: Rows) -> training.Program:
    """The model and the compiled functions of a training."""
    stream = training.make_stream(config, len(train))
    net, optimizer = make_model(train, config.hidden[0]), training.make_optimizer(config)

    def initial(seed):
        params = nn.unbox(net.init(jax.random.key(seed), *ROW))["params"]
        return {"params": params, "opt_state": optimizer.init(params)}

    seeds = jnp.asarray(stream.seeds, jnp.int32)
    state = jax.jit(lambda seeds: jax.lax.map(initial, seeds))(seeds)
    inputs = lambda arrays, *at: tuple(jnp.asarray(arrays[k][at]) for k in ("ids", "values"))
    index = training.calibration_sample(len(train), config.calibration_batches)
    sample, queries = inputs(train.arrays, index), inputs(held_out.arrays)
    labels = train.arrays["labels"]
    counts = np.bincount(labels[labels < train.num_labels], minlength=train.num_labels)
    rounds = training.rounds_fn(config, round_fn(config, net))
    best_labels = best_labels_fn(net)

    def evaluate(params):
        best = np.asarray(best_labels(params, queries, sample))
        return [scores(b, held_out, counts, len(train)) for b in best]

    data = jax.device_put(train.arrays)
    return training.Program(net, state, stream, rounds, evaluate, seeds, data)


# ------------------------------------------------------------------------------------------ Table 2


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A setting of the table with what the validation part chose, and its test rows so far."""

    name: str
    config: Config
    epoch: int
    rows: list[dict]


def settings(args: Args, data: str) -> dict[str, Config]:
    """Table 2's three: data parallel, subnets, subnets at twice the width."""
    base = Config(data=data, epochs=args.epochs, seeds=args.seeds, **args.options)
    wide = {"width": 2 * args.width, "subnets": 2 * base.subnets}
    return {
        "data parallel": dataclasses.replace(base, method="data-parallel"),
        "IST": base,
        "IST twice as wide": dataclasses.replace(base, **wide),
    }


def best_epoch(rows: list[dict]) -> tuple[float, int]:
    """The largest P@1, mean over the seeds, and the first epoch with it."""
    epochs = dict.fromkeys(row["epoch"] for row in rows)
    mean = {e: np.mean([row["P@1"] for row in rows if row["epoch"] == e]) for e in epochs}
    epoch = max(mean, key=lambda e: (mean[e], -e))
    return float(mean[epoch]), epoch


def reported(rows: list[dict], epoch: int) -> int:
    """The first epoch of the rows from this one on: with more points rounds end in others."""
    return min(row["epoch"] for row in rows if row["epoch"] >= epoch)


def table_2(args: Args) -> list[Chosen]:
    """Choose rate and epoch of every setting on the validation part, then train on everything."""
    assert args.data is not None
    whole, test = load(args.data)
    name = args.data.resolve().name
    checksum = 0
    for part, key in itertools.product((whole, test), ("ids", "values", "labels")):
        checksum = zlib.crc32(part.arrays[key].tobytes(), checksum)
    part, validation = divide(whole)
    print(
        f"{name}: {len(whole)} training points, of which {len(validation)} are kept back to choose "
        f"on; {len(test)} test points, {whole.num_features} features, {whole.num_labels} labels",
        file=sys.stderr,
    )
    out = args.where
    done, chosen = [], []

    def fit(setting, config, train_on, held_out):
        words = (config.method, f"{config.width}x{config.subnets}", f"J{config.local_steps}")
        words += (config.optimizer, f"{config.learning_rate:g}", config.part)
        before = {"setting": setting, **{name: getattr(config, name) for name in OPTIONS}}
        own = lambda rows: [{**before, **row} for row in rows]
        write = lambda rows: write_rows(out / f"{name.lower()}.csv", done + own(rows))
        rows = train(config, train_on, held_out, args.runs / "-".join((name, *words)), write)
        done.extend(own(rows))
        return rows

    for setting, config in settings(args, f"{name} {checksum:08x}").items():
        tried = {}
        for rate in args.learning_rates:
            own = dataclasses.replace(config, learning_rate=rate, part="validation")
            own = dataclasses.replace(own, seeds=args.validation_seeds)
            try:
                tried[rate] = best_epoch(fit(setting, own, part, validation))
            except NotFiniteError as error:
                print(error, file=sys.stderr)
        if not tried:
            msg = f"{setting}: NaN or Inf with every learning rate; write lower --learning-rates."
            raise NotFiniteError(msg)
        rate = max(tried, key=lambda rate: tried[rate])
        config = dataclasses.replace(config, learning_rate=rate)
        rows = fit(setting, config, whole, test)
        epoch = reported(rows, tried[rate][1])
        chosen.append(Chosen(setting, config, epoch, [r for r in rows if r["epoch"] == epoch]))
        replace(out / f"{name.lower()}.md", table(args, name, chosen))
    return chosen


def table(args: Args, name: str, chosen: list[Chosen]) -> str:
    """What was measured, in Markdown, beside the paper's."""
    columns = [m for m in METRICS if m != "nDCG@1"]  # which is P@1 where every point has a label
    rows = []
    for own in chosen:
        c = own.config
        workers = "subnets" if c.divided else "workers"
        cells = {"setting": f"{own.name}, {c.width} neurons, {c.subnets} {workers}"}
        cells |= {"learning rate": f"{c.learning_rate:g}", "epochs": own.epoch}
        for m in columns:
            values = 100 * np.array([row[m] for row in own.rows])
            spread = values.std(ddof=min(1, len(values) - 1))
            cells[f"{m}, %"] = f"{values.mean():.2f} ± {spread:.2f}"
        rows.append(cells)
    return (
        f"# Table 2 in small: {name}\n\n{markdown(rows)}\n\n"
        f"Test set of {name}, mean ± standard deviation over {args.seeds} seeds; P and nDCG: "
        "precision and discounted gain at k, PSP: precision weighted by propensity. Batches of "
        f"{args.batch_size} a worker, {args.optimizer}, {args.local_steps} local steps between "
        "exchanges in subnets; data parallel averages the gradients at every step. The whole "
        "network is calibrated with training points before it predicts. Learning rate, of "
        f"{', '.join(f'{rate:g}' for rate in args.learning_rates)}, and epochs, at most "
        f"{args.epochs}, are those of the largest P@1 on a fifth of the training set, kept back "
        f"({args.validation_seeds} seeds); then all of it was trained on. Nothing was chosen on "
        "the test set.\n\n"
        "The paper's numbers are **of another data set**, Amazon-670k with its 670 091 labels: the "
        f"order of the rows can be compared, the values cannot.\n\n{PAPER}"
    )


def draw(results: pathlib.Path, name: str) -> pathlib.Path:
    """P@1 by epoch of every setting's test rows, from a data set's CSV into the PNG beside it.

    Raises:
      FileNotFoundError: nothing was measured of this data set.
      ValueError: nothing on its test set yet.
    """
    path = results / f"{name.lower()}.csv"
    if not path.exists():
        msg = f"{path}: no such file; train with --data FOLDER first."
        raise FileNotFoundError(msg)
    measured: dict[str, list[dict]] = {}
    for row in read_mixed(path):
        measured.setdefault(row["setting"], []).append(row)
    lines = {}
    for setting, rows in measured.items():
        if not (tested := [row for row in rows if row["part"] == "test"]):
            continue  # interrupted before
        width, n, rate = (tested[0][k] for k in ("width", "subnets", "learning_rate"))
        tried = [r for r in rows if (r["part"], r["learning_rate"]) == ("validation", rate)]
        epoch, last = best_epoch(tried)[1], max(row["epoch"] for row in tested)
        lines[setting] = {
            "label": f"{setting}, {width} neurons, "
            f"{n} {'subnets' if setting.startswith('IST') else 'workers'}",
            "rows": tested,
            "epoch": reported(tested, epoch) if epoch <= last else None,
        }
    if not lines:
        msg = f"{path}: no rows of the test set; continue with --data FOLDER."
        raise ValueError(msg)
    picture = path.with_suffix(".png")
    figures.table2(picture, lines, f"Table 2 in small, {name}")
    return picture


# ------------------------------------------------------------------------------------------ command


def main(args: Args) -> None:
    out = args.where
    if args.amazon_shapes:
        config = training.Config(**args.options, learning_rate=args.learning_rates[0])
        amazon.one_round(config, out)
        print(out / "amazon_shapes.md")
        return
    assert args.data is not None
    name = args.data.resolve().name
    if not args.plot:
        table_2(args)
        print((out / f"{name.lower()}.md").read_text())
    print(draw(out, name))


if __name__ == "__main__":
    run_script(main, Args, __doc__)
