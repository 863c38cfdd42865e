"""Why the accuracy drops suddenly under PSL, and what prevents it.

P. Raynaud, D. Orban, J. Bigeon, G-2023-36, section 7: "the training of LeNet-PSL exhibits high
standard deviation errors. Raw results indicate consistent drops in accuracy (down to 20%) [...].
Investigating this behavior is a topic for future research."

The mechanism looked for here: the loss of a sample is 1/p - 1 with p the probability of its label
(of doubled scores, as the authors ran it), so its gradient is that of NLL times 1/p, without a
bound. Once a network fits its training set, one sample that it gets confidently wrong has a
gradient G = 1000 times the usual or more. Adam turns any such outlier into the same kick,
1/sqrt(1 - b2) = 32 learning rates in every coordinate, and its second moment, now too large, keeps
the steps below half their length for 2 ln(G sqrt(1 - b2) / 2) / (1 - b2) steps, some epochs. Each
variant takes one link out of this chain.

    python -m experiments.psl.drops                              # LeNet, CIFAR10, batches of 20
    python -m experiments.psl.drops --model psnet --dataset mnist
    python -m experiments.psl.drops --trace psl-squared          # one drop, step by step
    python -m experiments.psl.drops --kicks --dataset mnist --variants psl-squared nll
    python -m experiments.psl.drops --plot                       # figures and drops.md again

About 3 seconds an epoch and seed on one core (LeNet, CIFAR10, batches of 20). A training that was
interrupted goes on where it was; what `reproduce` has already measured is not run again.
"""

import dataclasses
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from tqdm import tqdm

import psjax
from experiments._run import run_script
from experiments.psl import figures, reproduce, run, training

VARIANTS = {
    "psl-squared": ("PSL squared (the authors')", {"loss": "psl-squared"}),
    "psl": ("PSL", {"loss": "psl"}),
    "nll": ("NLL", {"loss": "nll"}),
    "one-vs-each": ("one-vs-each", {"loss": "one-vs-each"}),
    "bounded": ("PSL squared, tangent beyond e⁴", {"loss": "psl-squared", "margin_bound": 4.0}),
    "clip": ("PSL squared, gradient clipped", {"loss": "psl-squared"}),
    "b2-0.99": ("PSL squared, Adam b2 = 0.99", {"loss": "psl-squared", "b2": 0.99}),
}
CLIP_FACTOR = 10  # times the median gradient norm of the first epoch
LEAST, NOISE, LARGE, SPIKE = 1.0, 5.0, 5.0, 50.0
DEFINITION = (
    "A drop: the test accuracy falls, from one epoch to the next, by more than "
    f"{LEAST:g} point and by more than {NOISE:g} times the median absolute change between epochs "
    "of that run; falls in consecutive epochs are one drop, and their sum is its depth. Large: "
    f"deeper than {LARGE:g} points. A spike: an epoch whose largest gradient norm is over "
    f"{SPIKE:g} times its median."
)


@dataclasses.dataclass
class Args:
    """Count the drops of accuracy under variants of PSL, or trace one of them."""

    model: str = "lenet"
    """lenet or psnet."""
    dataset: str = "cifar10"
    batch_size: int = 20
    epochs: int = 50
    seeds: int = 3
    first_seed: int = 0
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which to train."""
    trace: str | None = None
    """Train only this variant, with --first-seed, past its first drop, recording every step."""
    kicks: bool = False
    """Train the variants with --first-seed, recording in every epoch the largest step."""
    plot: bool = False
    """Train nothing; draw the figures and write drops.md."""
    out: pathlib.Path = pathlib.Path("runs/drops")
    """Where run folders go."""
    results: pathlib.Path = reproduce.RESULTS
    """Where rows, figures and drops.md go."""
    data_dir: str | None = None

    @property
    def setting(self) -> str:
        return f"{self.model}-{self.dataset}-{self.batch_size}"


# ----------------------------------------------------------------------------------------- training


def config_of(args: Args, variant: str) -> training.Config:
    """The training of a variant, otherwise the authors' form; for `clip` a first epoch is run."""
    config = training.Config(
        dataset=args.dataset,
        model=args.model,
        preset="mnist-53780" if (args.model, args.dataset) == ("psnet", "mnist") else None,
        compute="fused",
        batch_size=args.batch_size,
        epochs=args.epochs,
        seeds=args.seeds,
        first_seed=args.first_seed,
        learning_rate=1e-3,
        order="dataset",
        **VARIANTS[variant][1],
    )
    if variant != "clip":
        return config
    first = dataclasses.replace(config, epochs=1, seeds=1, first_seed=0)
    folder = args.out / f"{args.setting}-first-epoch"
    (row,) = run.train(first, folder, resume=folder.exists(), data_dir=args.data_dir)
    # Two digits, so that every machine finds the same.
    return dataclasses.replace(config, clip=float(f"{CLIP_FACTOR * row['median_grad_norm']:.2g}"))


def collect(args: Args, variant: str) -> list[dict]:
    """Rows of a variant, of each seed its longest run: from `results`, run folders, `reproduce`."""
    path = args.results / f"drops-{args.setting}-{variant}.csv"
    folders = args.out.glob(f"{args.setting}-{variant}-seeds*/metrics.csv")
    sources = [run.read_rows(p) for p in [path, *sorted(folders)] if p.exists()]
    loss = {"psl-squared": "psl-squared", "nll": "nll"}.get(variant)
    for name, (network, its_loss, dataset, batch_size) in reproduce.SETTINGS.items():
        same = reproduce.NETWORKS[network], reproduce.DATASETS[dataset], batch_size
        if (
            same == (args.model, args.dataset, args.batch_size)
            and reproduce.LOSSES[its_loss] == loss
        ):
            sources.append(figures.load(reproduce.RESULTS).get(name, []))
    longest: dict[int, list[dict]] = {}
    for rows in sources:
        for seed in {row["seed"] for row in rows}:
            own = [row for row in rows if row["seed"] == seed]
            if len(own) > len(longest.get(seed, ())):
                longest[seed] = own
    rows = [row for own in longest.values() for row in own]
    rows.sort(key=lambda row: (row["epoch"], row["seed"]))
    if rows:
        run.write_rows(path, rows)
    return rows


def train(args: Args, variant: str) -> None:
    """Train the seeds of a variant that are not there yet."""
    last: dict[int, int] = {}
    for row in collect(args, variant):
        last[row["seed"]] = max(row["epoch"], last.get(row["seed"], 0))
    asked = range(args.first_seed, args.first_seed + args.seeds)
    missing = [seed for seed in asked if last.get(seed, 0) < args.epochs]
    if not missing:
        return
    config = dataclasses.replace(
        config_of(args, variant), first_seed=missing[0], seeds=missing[-1] - missing[0] + 1
    )
    folder = args.out / f"{args.setting}-{variant}-seeds{missing[0]}-{missing[-1]}"
    try:
        run.train(config, folder, resume=folder.exists(), data_dir=args.data_dir)
    except run.NotFiniteError as error:  # also a result; the rows until then stay
        print(f"{folder.name}: {error}", file=sys.stderr)
    finally:
        collect(args, variant)


# ----------------------------------------------------------------------------------------- analysis


def find_drops(accuracy) -> list[tuple[int, float]]:
    """Drops in the accuracies of one run, one an epoch: `[(index, depth in points)]`.

    Args:
      accuracy: fractions in [0, 1].
    """
    falls = -100 * np.diff(accuracy)
    if not len(falls):
        return []
    least = max(LEAST, NOISE * float(np.median(np.abs(falls))))
    drops: list[tuple[int, float]] = []
    before = None
    for i in np.flatnonzero(falls > least):
        if before is not None and i == before + 1:
            drops[-1] = (drops[-1][0], drops[-1][1] + float(falls[i]))
        else:
            drops.append((int(i) + 1, float(falls[i])))
        before = i
    return drops


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is counted of a variant; arrays have an entry a seed."""

    epochs: int
    per_100: np.ndarray
    """Drops per 100 epochs."""
    large_per_100: np.ndarray
    last: np.ndarray
    """Test accuracy after the last epoch, %."""
    best: np.ndarray
    """Test accuracy after the best epoch, %."""
    drops: int
    drops_with_spike: int
    spikes: int
    """Epochs with a spike."""
    first: int | None
    """The earliest epoch with a drop."""
    largest: float
    """Largest gradient norm over the median of its epoch."""


def summarise(rows: list[dict]) -> Summary:
    """Count the drops and spikes of all seeds of a variant."""
    epochs, accuracy = figures.series(rows, "test_accuracy")
    largest, median = (figures.series(rows, f"{x}_grad_norm")[1] for x in ("max", "median"))
    spikes = largest > SPIKE * median
    drops = [find_drops(a) for a in accuracy]
    changes = max(len(epochs) - 1, 1)
    return Summary(
        epochs=len(epochs),
        per_100=np.array([100 * len(d) / changes for d in drops]),
        large_per_100=np.array([100 * sum(x > LARGE for _, x in d) / changes for d in drops]),
        last=100 * accuracy[:, -1],
        best=100 * accuracy.max(1),
        drops=sum(map(len, drops)),
        drops_with_spike=sum(bool(spikes[s, i]) for s, d in enumerate(drops) for i, _ in d),
        spikes=int(spikes.sum()),
        first=min((int(epochs[i]) for d in drops for i, _ in d), default=None),
        largest=float(np.max(largest / median)),
    )


def load(results: pathlib.Path) -> dict[str, dict[str, Summary]]:
    """`{setting: {variant: summary}}` of everything measured, in the order of `VARIANTS`."""
    settings: dict[str, dict[str, Summary]] = {}
    for path in sorted(results.glob("drops-*.csv")):
        match = re.fullmatch(r"drops-(\w+-\w+-\d+)-(.+)\.csv", path.name)
        if match and match[2] in VARIANTS and (rows := run.read_rows(path)):
            settings.setdefault(match[1], {})[match[2]] = summarise(rows)
    return {s: {v: found[v] for v in VARIANTS if v in found} for s, found in settings.items()}


def describe(setting: str) -> str:
    model, dataset, batch_size = setting.split("-")
    model = {"lenet": "LeNet", "psnet": "PSNet"}[model]
    dataset = {"mnist": "MNIST", "cifar10": "CIFAR10"}.get(dataset, dataset)
    return f"{model}, {dataset}, batches of {batch_size}"


def mean_std(values: np.ndarray, digits: int) -> str:
    return figures.plus_minus(float(values.mean()), float(figures.std(values)), digits)


def table(results: pathlib.Path) -> str:
    """Drops, their price and their spikes, as Markdown; also into `drops.md`."""
    lines = ["# Drops of accuracy", "", DEFINITION]
    for setting, variants in load(results).items():
        lines += [
            "",
            f"## {describe(setting)}",
            "",
            "| variant | seeds × epochs | drops in 100 epochs | large ones | last accuracy, % "
            "| best accuracy, % | drops in an epoch with a spike | epochs with a spike |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for variant, s in variants.items():
            n = len(s.last)
            cells = [
                VARIANTS[variant][0],
                f"{n} × {s.epochs}",
                mean_std(s.per_100, 1),
                mean_std(s.large_per_100, 1),
                mean_std(s.last, 2),
                mean_std(s.best, 2),
                f"{s.drops_with_spike} of {s.drops}",
                f"{s.spikes} of {n * s.epochs}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## All settings of figures 6 and 7", "", *settings_lines(results)]
    if len(steps := kicks_lines(results)) > 2:
        lines += ["", "## Steps, root mean square in learning rates", "", *steps]
    for path in sorted(results.glob("drops_trace-*.csv")):
        title, _ = trace_title(path)
        lines += ["", f"**{title}.** {trace_summary(run.read_rows(path))}"]
    text = "\n".join(lines) + "\n"
    (results / "drops.md").write_text(text)
    return text


def settings_lines(results: pathlib.Path) -> list[str]:
    """Drops and spikes of every setting that `reproduce` has measured, as a Markdown table."""
    lines = [
        "| setting | seeds × epochs | drops in 100 epochs | large ones | the first in epoch "
        "| drops in an epoch with a spike | epochs with a spike | largest gradient / median |",
        "|---|---|---|---|---|---|---|---|",
    ]
    measured = figures.load(results)
    for name in reproduce.SETTINGS:
        if name not in measured:
            continue
        s = summarise(measured[name])
        network, loss, dataset, batch_size = reproduce.SETTINGS[name]
        cells = [
            f"{network}-{loss}, {dataset}, {batch_size}",
            f"{len(s.last)} × {s.epochs}",
            mean_std(s.per_100, 1),
            mean_std(s.large_per_100, 1),
            "" if s.first is None else str(s.first),
            f"{s.drops_with_spike} of {s.drops}",
            f"{s.spikes} of {len(s.last) * s.epochs}",
            f"{s.largest:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw_frequency(results: pathlib.Path) -> None:
    """`drops_frequency.png`: drops in 100 epochs and last accuracy of every variant and setting."""
    settings = load(results)
    if not settings:
        return
    heights = [1.1 + 0.36 * len(variants) for variants in settings.values()]
    figure = Figure(figsize=(10, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(
        len(settings), 2, squeeze=False, width_ratios=(1.3, 1), height_ratios=heights
    )
    for (left, right), (setting, variants) in zip(axes, settings.items()):
        y = np.arange(len(variants))
        for offset, name, colour, field in (
            (-0.19, f"deeper than {LEAST:g} point", "#56B4E9", "per_100"),
            (0.19, f"deeper than {LARGE:g} points", "#D55E00", "large_per_100"),
        ):
            values = [getattr(s, field) for s in variants.values()]
            errors = np.nan_to_num([figures.std(v) for v in values])
            left.barh(
                y + offset,
                [v.mean() for v in values],
                0.36,
                xerr=errors,
                color=colour,
                label=name,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
        last = [s.last for s in variants.values()]
        errors = np.nan_to_num([figures.std(v) for v in last])
        right.errorbar([v.mean() for v in last], y, xerr=errors, fmt="o", color="black", capsize=2)
        for i, values in enumerate(last):
            right.plot(values, [i] * len(values), "|", color="0.55", markersize=9, zorder=0)
        seeds = sorted({len(s.last) for s in variants.values()})
        count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        figures.panel(left, f"{describe(setting)} (seeds: {count})", "drops in 100 epochs", "")
        figures.panel(right, "after the last epoch, mean ± std", "test accuracy (%)", "")
        left.set_yticks(y, [VARIANTS[v][0] for v in variants])
        right.set_yticks(y, [])
        right.grid(axis="y", alpha=0)
        for ax in (left, right):
            ax.set_ylim(len(y) - 0.4, -0.6)
            ax.set_axisbelow(True)
        left.set_xlim(left=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figures.save(figure, results / "drops_frequency.png")


# -------------------------------------------------------------------------------------------- trace


def adam_metrics(config: training.Config, num_classes: int):
    """`step -> loss, nll, worst, gradient, root_v, moved`, of a step with Adam.

    `nll` is the mean and `worst` the largest negative log-likelihood of the batch's samples, of
    doubled scores where the loss is the squared one; `gradient` is the gradient's norm; `root_v`
    the mean over coordinates of Adam's sqrt(v_hat); `moved` the root mean square of the update in
    learning rates.
    """
    net = training.make_model(config, num_classes)
    slope = 2 if config.loss == "psl-squared" else 1

    def metrics(step: training.Step):
        nu = optax.tree.get(step.opt_state, "nu")
        count = optax.tree.get(step.opt_state, "count")
        weights = sum(x.size for x in jax.tree.leaves(step.params))
        roots = sum(jnp.sum(jnp.sqrt(x)) for x in jax.tree.leaves(nu))
        images = step.batch["image"]
        scores = net.apply({"params": step.params}, images.reshape(-1, *images.shape[-3:]))
        labels, weight = (step.batch[name].ravel() for name in ("label", "weight"))
        nll = optax.softmax_cross_entropy_with_integer_labels(slope * scores, labels)
        return {
            "loss": step.loss,
            "nll": jnp.sum(weight * nll) / jnp.sum(weight),
            "worst": jnp.max(jnp.where(weight > 0, nll, 0)),
            "gradient": optax.tree.norm(step.grads),
            "root_v": roots / weights / jnp.sqrt(1 - config.b2**count),
            "moved": optax.tree.norm(step.updates) / math.sqrt(weights) / config.learning_rate,
        }

    return metrics


def build(config: training.Config, data_dir: str | None) -> training.Program:
    """A training of one seed that records `adam_metrics`."""
    classes = psjax.data.load(config.dataset, "test", data_dir).num_classes
    config = dataclasses.replace(config, seeds=1)
    return training.build(config, data_dir, adam_metrics(config, classes))


def kicks(config: training.Config, data_dir: str | None = None) -> list[dict]:
    """Train one seed; a row an epoch, like those of `run.train`, with the size of the steps.

    `kick` is the largest step of the epoch and `median_step` the median one, root mean squares in
    learning rates.
    """
    program = build(config, data_dir)
    state, rows = program.state, []
    for epoch in tqdm(range(config.epochs), unit="epoch", desc=f"{config.loss} kicks"):
        state, metrics = program.epoch(state, program.batches(epoch), program.train)
        own = {name: np.asarray(x)[0] for name, x in metrics.items()}
        row = {
            "epoch": epoch + 1,
            "seed": config.first_seed,
            "test_accuracy": float(program.accuracy(state["params"], program.test)[0]),
            "max_grad_norm": float(own["gradient"].max()),
            "median_grad_norm": float(np.median(own["gradient"])),
            "worst_nll": float(own["worst"].max()),
            "kick": float(own["moved"].max()),
            "median_step": float(np.median(own["moved"])),
        }
        rows.append(row)
    return rows


def kicks_lines(results: pathlib.Path) -> list[str]:
    """What `kicks` has recorded, as a Markdown table."""
    lines = [
        "| setting | variant | seed, epochs | drops | epochs with a spike | largest gradient / "
        "median, median over those | largest NLL of a sample | largest step of an epoch, median "
        "over all | over those with a spike | over those with a drop | median step |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(results.glob("drops_kicks-*.csv")):
        match = re.fullmatch(r"drops_kicks-(\w+-\w+-\d+)-(.+)-(\d+)\.csv", path.name)
        if match is None:
            continue
        rows = run.read_rows(path)
        column = {k: np.array([row[k] for row in rows]) for k in rows[0]}
        relative = column["max_grad_norm"] / column["median_grad_norm"]
        spiked = relative > SPIKE
        dropped = np.zeros_like(spiked)
        dropped[[i for i, _ in find_drops(column["test_accuracy"])]] = True
        middle = lambda values: f"{np.median(values):.2g}" if len(values) else ""
        cells = [
            describe(match[1]),
            VARIANTS[match[2]][0],
            f"{match[3]}, {len(rows)}",
            str(int(dropped.sum())),
            str(int(spiked.sum())),
            middle(relative[spiked]),
            f"{column['worst_nll'].max():.3g}",
            *(middle(column["kick"][which]) for which in (spiked | True, spiked, dropped)),
            middle(column["median_step"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def trace(
    config: training.Config,
    *,
    before: int = 2,
    after: int = 8,
    parts: int = 5,
    bins: int = 400,
    data_dir: str | None = None,
) -> list[dict]:
    """Train one seed until its first drop and some epochs more; what happened step by step.

    It starts anew instead of from a checkpoint: every step is recorded by the program that makes
    it, so there is no second run that might go another way.

    Args:
      config: of a training, of which the first seed is taken.
      before: epochs to show before that of the drop.
      after: epochs to go on for after it, also past `config.epochs`.
      parts: times an epoch the test accuracy is measured.
      bins: rows to return at most.
      data_dir: where TFDS keeps its sets.

    Returns:
      Rows of equally many steps each: `at_epoch` (the middle), `steps` and, over the steps, median
      and largest of everything in `adam_metrics`; `accuracy` is NaN in a row without a measurement.
      Empty if there was no drop.
    """
    program = build(config, data_dir)
    state = program.state
    kept: list[dict[str, np.ndarray]] = []
    at: list[int] = []  # steps after which the accuracy was measured, from the start
    accuracies: list[float] = []
    total, drop, epoch = 0, None, 0
    while epoch < (config.epochs if drop is None else drop + after):
        batches = program.batches(epoch)
        for part in np.array_split(np.arange(batches["indices"].shape[1]), parts):
            own = {k: v[:, part] for k, v in batches.items()}
            state, metrics = program.epoch(state, own, program.train)
            kept.append({k: np.asarray(v)[0] for k, v in metrics.items()})
            total += len(part)
            at.append(total)
            accuracies.append(float(program.accuracy(state["params"], program.test)[0]))
        epoch += 1
        print(f"epoch {epoch}: accuracy {accuracies[-1]:.4f}", file=sys.stderr)
        if drop is None and (drops := find_drops(accuracies[parts - 1 :: parts])):
            drop = drops[0][0] + 1
    if drop is None:
        return []
    length = total // epoch
    first = max(drop - 1 - before, 0) * length
    values = {k: np.concatenate([m[k] for m in kept])[first:] for k in kept[0]}
    size = -(-(total - first) // bins)
    rows = []
    for start in range(0, total - first, size):
        own = {k: v[start : start + size] for k, v in values.items()}
        n, begin = len(own["loss"]), first + start
        row = {"at_epoch": (begin + n / 2) / length, "steps": n}
        for k, v in own.items():
            row |= {k: float(np.median(v)), f"largest_{k}": float(np.max(v))}
        measured = [a for t, a in zip(at, accuracies) if begin < t <= begin + n]
        rows.append(row | {"accuracy": measured[-1] if measured else math.nan})
    return rows


def outlier(rows: list[dict]) -> tuple[int, float]:
    """The row with the largest gradient of the deepest fall of accuracy, over the usual norm."""
    measured = [(i, r["accuracy"]) for i, r in enumerate(rows) if not math.isnan(r["accuracy"])]
    falls = [a - b for (_, a), (_, b) in zip(measured, measured[1:])]
    worst = int(np.argmax(falls)) + 1
    begin, end = measured[worst - 1][0], measured[worst][0]
    i = max(range(begin, end + 1), key=lambda i: rows[i]["largest_gradient"])
    usual = float(np.median([row["gradient"] for row in rows[: max(begin, 1)]]))
    return i, rows[i]["largest_gradient"] / usual


def trace_summary(rows: list[dict]) -> str:
    """What a trace shows, in numbers, as a sentence or two."""
    i, factor = outlier(rows)
    usual = {k: float(np.median([r[k] for r in rows[: max(i, 1)]])) for k in ("root_v", "moved")}
    kick = max(row["largest_moved"] for row in rows[i : i + 2])
    growth = max(row["largest_root_v"] for row in rows[i : i + 2]) / usual["root_v"]
    return (
        f"In epoch {math.ceil(rows[i]['at_epoch'])} the largest gradient of a step was "
        f"{factor:.3g} times the usual norm. The weights moved by {kick:.2g} learning rates (root "
        f"mean square) in a step, before {usual['moved']:.2g}, and the mean of Adam's √v̂ grew "
        f"{growth:.3g} times."
    )


def trace_title(path: pathlib.Path) -> tuple[str, str]:
    """Title of a trace and the name of its variant."""
    match = re.fullmatch(r"drops_trace-(\w+-\w+-\d+)-(.+)-(\d+)\.csv", path.name)
    if match is None:
        msg = f"{path.name}: write drops_trace-<model>-<dataset>-<batch size>-<variant>-<seed>.csv."
        raise ValueError(msg)
    return f"{VARIANTS[match[2]][0]}, {describe(match[1])}, seed {match[3]}", match[2]


def draw_trace(path: pathlib.Path, figure_path: pathlib.Path) -> None:
    """Accuracy, loss, gradient norm, Adam's second moment and step around a drop, as a PNG."""
    rows = run.read_rows(path)
    column = {k: np.array([row[k] for row in rows]) for k in rows[0]}
    x = column["at_epoch"]
    figure = Figure(figsize=(10, 10.5), layout="constrained")
    axes = figure.subplots(6, 1, sharex=True)
    measured = ~np.isnan(column["accuracy"])
    axes[0].plot(x[measured], 100 * column["accuracy"][measured], ".-", color="black", linewidth=1)
    figures.panel(axes[0], "", "", "test accuracy\n(%)")
    for ax, (name, label, colour) in zip(
        axes[1:],
        (
            ("loss", "training loss\nof a step", "#0072B2"),
            ("worst", "NLL of the worst\nsample of a step", "#E69F00"),
            ("gradient", "gradient norm\nof a step", "#D55E00"),
            ("root_v", "Adam's √v̂\n(mean)", "#009E73"),
            ("moved", "size of a step\n(rms, learning rates)", "#CC79A7"),
        ),
    ):
        steps = f"{int(column['steps'][0])} steps"
        ax.plot(
            x, column[f"largest_{name}"], color=colour, linewidth=0.8, alpha=0.55, label="largest"
        )
        ax.plot(x, column[name], color=colour, linewidth=1.4, label=f"median of {steps}")
        ax.set_yscale("linear" if name == "worst" else "log")  # an NLL is a logarithm
        figures.panel(ax, "", "", label)
    axes[1].legend(frameon=False, ncols=2, loc="upper right", fontsize=8.5)
    at = x[outlier(rows)[0]]
    for ax in axes:
        ax.axvline(at, color="0.4", linestyle=":", linewidth=1)
        ax.margins(x=0.01)
    axes[-1].set_xlabel("epochs trained")
    figure.suptitle(f"A drop: {trace_title(path)[0]} (dotted: its largest gradient)")
    figures.save(figure, figure_path)


# --------------------------------------------------------------------------------------------- main


def report(results: pathlib.Path) -> None:
    """All figures and `drops.md`, from what is in `results`."""
    table(results)
    draw_frequency(results)
    traces = sorted(results.glob("drops_trace-*.csv"))
    if traces:
        draw_trace(traces[0], results / "drops_trace.png")


def main(args: Args) -> None:
    unknown = sorted({*args.variants, args.trace or args.variants[0]} - set(VARIANTS))
    if unknown:
        msg = f"variant {' '.join(unknown)}: there is none; write some of {', '.join(VARIANTS)}."
        raise SystemExit(msg)
    args.results.mkdir(parents=True, exist_ok=True)
    if args.trace is not None:
        rows = trace(config_of(args, args.trace), data_dir=args.data_dir)
        if not rows:
            msg = f"no drop in {args.epochs} epochs; write more --epochs or another --first-seed."
            raise SystemExit(msg)
        name = f"drops_trace-{args.setting}-{args.trace}-{args.first_seed}.csv"
        run.write_rows(args.results / name, rows)
        draw_trace(args.results / name, args.results / "drops_trace.png")
        print(table(args.results))
        return
    for variant in args.variants:
        if args.kicks:
            name = f"drops_kicks-{args.setting}-{variant}-{args.first_seed}.csv"
            run.write_rows(args.results / name, kicks(config_of(args, variant), args.data_dir))
        elif args.plot:
            collect(args, variant)
        else:
            train(args, variant)
            report(args.results)
    report(args.results)
    print(table(args.results))


if __name__ == "__main__":
    run_script(main, Args, __doc__)
