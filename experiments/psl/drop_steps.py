"""What happened around a drop, step by step: loss, gradient, Adam's second moment, step."""

import dataclasses
import functools
import math
import pathlib
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from tqdm import tqdm

from experiments._lib.figures import panel, save
from experiments._lib.tables import markdown, read_rows
from experiments.psl import training
from experiments.psl.drop_counts import SPIKE, VARIANTS, describe, find_drops


def adam_metrics(config: training.Config, net, num_classes: int):
    """`step -> loss, nll, worst, gradient, root_v, moved`, of a step with Adam.

    `nll` is the mean and `worst` the largest negative log-likelihood of the batch's samples, of
    doubled scores where the loss is the squared one; `gradient` is the gradient's norm; `root_v`
    the mean over coordinates of Adam's sqrt(v_hat); `moved` the root mean square of the update in
    learning rates.
    """
    del num_classes  # as `training.margin_metrics` has it
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
    config = dataclasses.replace(config, seeds=1)
    return training.build(config, data_dir, functools.partial(adam_metrics, config))


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


def kicks_table(results: pathlib.Path) -> str:
    """What `kicks` has recorded, as a Markdown table; empty if nothing."""
    lines = []
    for path in sorted(results.glob("drops_kicks-*.csv")):
        match = re.fullmatch(r"drops_kicks-(\w+-\w+-\d+)-(.+)-(\d+)\.csv", path.name)
        if match is None:
            continue
        rows = read_rows(path)
        column = {k: np.array([row[k] for row in rows]) for k in rows[0]}
        relative = column["max_grad_norm"] / column["median_grad_norm"]
        spiked = relative > SPIKE
        dropped = np.zeros_like(spiked)
        dropped[[i for i, _ in find_drops(column["test_accuracy"])]] = True
        middle = lambda values: f"{np.median(values):.2g}" if len(values) else ""
        lines.append(
            {
                "setting": describe(match[1]),
                "variant": VARIANTS[match[2]][0],
                "seed, epochs": f"{match[3]}, {len(rows)}",
                "drops": dropped.sum(),
                "epochs with a spike": spiked.sum(),
                "largest gradient / median, median over those": middle(relative[spiked]),
                "largest NLL of a sample": f"{column['worst_nll'].max():.3g}",
                "largest step of an epoch, median over all": middle(column["kick"]),
                "over those with a spike": middle(column["kick"][spiked]),
                "over those with a drop": middle(column["kick"][dropped]),
                "median step": middle(column["median_step"]),
            }
        )
    return markdown(lines)


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
    before, at = rows[: max(i, 1)], rows[i : i + 2]
    usual = {k: float(np.median([r[k] for r in before])) for k in ("root_v", "moved")}
    usual["worst"] = float(np.median([r["largest_worst"] for r in before]))
    peak = {k: max(row[f"largest_{k}"] for row in at) for k in usual}
    return (
        f"In epoch {math.ceil(rows[i]['at_epoch'])} the largest gradient of a step was "
        f"{factor:.3g} times the usual norm, the NLL of its worst sample {peak['worst']:.2g} where "
        f"the worst of {rows[i]['steps']:.0f} steps usually had {usual['worst']:.2g}. The weights "
        f"moved by {peak['moved']:.2g} learning rates (root mean square) in a step, before "
        f"{usual['moved']:.2g}, and the mean of Adam's √v̂ grew "
        f"{peak['root_v'] / usual['root_v']:.3g} times."
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
    rows = read_rows(path)
    column = {k: np.array([row[k] for row in rows]) for k in rows[0]}
    x = column["at_epoch"]
    figure = Figure(figsize=(10, 10.5), layout="constrained")
    axes = figure.subplots(6, 1, sharex=True)
    measured = ~np.isnan(column["accuracy"])
    axes[0].plot(x[measured], 100 * column["accuracy"][measured], ".-", color="black", linewidth=1)
    panel(axes[0], "", "", "test accuracy\n(%)")
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
        panel(ax, "", "", label)
    axes[1].legend(frameon=False, ncols=2, loc="upper right", fontsize=8.5)
    at = x[outlier(rows)[0]]
    for ax in axes:
        ax.axvline(at, color="0.4", linestyle=":", linewidth=1)
        ax.margins(x=0.01)
        ax.yaxis.set_minor_formatter(NullFormatter())
    axes[-1].set_xlabel("epochs trained")
    figure.suptitle(f"A drop: {trace_title(path)[0]} (dotted: its largest gradient)")
    save(figure, figure_path)
