"""One round with Amazon-670k's shapes on synthetic rows: its memory, and its time.

`python -m experiments.ist.extreme --amazon-shapes` calls it.
"""

import dataclasses
import functools
import math
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import psjax
from experiments._lib.folder import replace
from experiments._lib.loop import NotFiniteError
from experiments._lib.tables import markdown, read_rows, write_rows
from experiments.ist import training
from experiments.ist.sparse import make_model, padded, round_fn, shapes_of

# Amazon-670K in the repository's table of data sets, 490 449 training points; and features a point.
FEATURES, LABELS = 135_909, 670_091
FEATURES_A_POINT, LABELS_A_POINT = 75.7, 5.45
COLUMNS = (
    "hidden",
    "subnets",
    "local_steps",
    "batch_size",
    "weights_gib",
    "weights_and_state_gib",
    "round_gib",
    "round_peak_rss_gib",
    "subnet_gib",
    "data_parallel_gib",
    "seconds",
    "cpu_seconds",
    "loss",
)


def synthetic(
    num_points: int,
    num_features: int = FEATURES,
    num_labels: int = LABELS,
    features_a_point: float = FEATURES_A_POINT,
    labels_a_point: float = LABELS_A_POINT,
    seed: int = 0,
) -> psjax.data.SparseDataset:
    """Points with the statistics of Amazon-670k.

    Numbers of features and labels of a point are 1 + Poisson. Labels follow a power law, frequency
    ~ rank^-0.5: with the real numbers of points and labels, 3.99 points a label, the most frequent
    one has 1600 and the rarest 2. Features follow Zipf's law, ~ 1 / rank; their values are
    tf * log(N / df) with geometric term frequencies, each row of norm 1.
    """
    rng = np.random.default_rng(seed)

    def draw(mean, size, exponent):
        weights = np.arange(1, size + 1, dtype=np.float64) ** -exponent
        cdf = np.cumsum(weights / weights.sum())
        cdf /= cdf[-1]
        names = rng.permutation(size).astype(np.int32)  # no order of frequency in the ids
        counts = np.clip(1 + rng.poisson(mean - 1, num_points), 1, max(1, size // 2))
        ranks = [_distinct(rng, cdf, count) for count in counts]
        return np.concatenate([[0], np.cumsum(counts)]), np.concatenate(ranks), names, cdf

    indptr, ranks, names, cdf = draw(features_a_point, num_features, 1.0)
    share = np.diff(cdf, prepend=0)[ranks]
    df = -np.expm1(features_a_point * np.log1p(-np.minimum(share, 0.999)))  # of a point to have it
    values = rng.geometric(0.7, len(ranks)) * -np.log(np.minimum(df, 0.999))
    norms = np.sqrt(np.add.reduceat(values**2, indptr[:-1]))
    values /= np.repeat(norms, np.diff(indptr))
    label_indptr, label_ranks, label_names, _ = draw(labels_a_point, num_labels, 0.5)
    return psjax.data.SparseDataset(
        indptr,
        names[ranks],
        values.astype(np.float32),
        label_indptr,
        label_names[label_ranks],
        num_features,
        num_labels,
    )


def _distinct(rng, cdf, count):
    """So many different ranks, drawn one after the other."""
    found = np.zeros(0, np.int64)
    while len(found) < count:
        found = np.append(found, np.searchsorted(cdf, rng.random(2 * count), side="right"))
        found = found[np.sort(np.unique(found, return_index=True)[1])]
    return found[:count]


def initial_params(net, key) -> dict[str, Any]:
    """As `net.init` has them, but drawn a block of rows after the other, in place.

    `net.init` of so large a network holds almost three times its weights beside them.
    """
    _, shapes = shapes_of(net)

    def normal(key, like):
        deviation = math.sqrt(2 / like.shape[0]) / 0.87962566103423978  # of a normal cut at 2
        block = min(like.shape[0], max(1, 2**20 // like.shape[1]))

        def body(i, x):
            own = jax.random.fold_in(key, i)
            drawn = jax.random.truncated_normal(own, -2, 2, (block, like.shape[1]), like.dtype)
            # The last block overlaps the one before.
            return jax.lax.dynamic_update_slice(x, deviation * drawn, (i * block, 0))

        return jax.lax.fori_loop(0, -(-like.shape[0] // block), body, jnp.zeros_like(like))

    zeros = lambda x: jnp.zeros(x.shape, x.dtype)
    keys = jax.random.split(key)
    return {
        "embedding": normal(keys[0], shapes["embedding"]),
        "kernel": normal(keys[1], shapes["kernel"]),
        "bias": zeros(shapes["bias"]),
        "norm": {
            **jax.tree.map(zeros, shapes["norm"]),
            "scale": 1 + zeros(shapes["norm"]["scale"]),
        },
    }


def compiled_round(config: training.Config, net, data):
    """One round of J steps, compiled for the shapes of `data`; parameters and state are donated."""
    _, params = shapes_of(net)
    state = jax.eval_shape(training.make_optimizer(config).init, params)
    n, J, B = config.subnets, config.local_steps, config.batch_size
    index = jax.ShapeDtypeStruct((n, J, B), jnp.int32)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), data)
    step = jax.jit(round_fn(config, net), donate_argnums=(0, 1))
    return step.lower(params, state, number, number, index, like).compile()


def needs(compiled) -> float:
    """GiB of a compiled program, of its arguments, results and temporaries together."""
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes
    return (total - m.alias_size_in_bytes) / 2**30


def peak_rss() -> float:
    """GiB, the most that this process has held until now."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def gib(tree) -> float:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**30


def one_round(
    config: training.Config,
    out: pathlib.Path,
    num_features: int = FEATURES,
    num_labels: int = LABELS,
) -> dict:
    """One round in subnets with so many features and labels: the row of its table in `out`."""
    say = functools.partial(print, file=sys.stderr, flush=True)
    width = config.hidden[0]
    n, J, B = config.subnets, config.local_steps, config.batch_size
    data = synthetic(n * J * B, num_features, num_labels)
    per_point = [np.diff(x).mean() for x in (data.indptr, data.label_indptr)]
    say(
        f"{n * J * B} points, {per_point[0]:.1f} of {num_features} features and "
        f"{per_point[1]:.2f} of {num_labels} labels each"
    )
    rows = padded(data)
    net = make_model(rows, width)
    _, like = shapes_of(net)
    optimizer = training.make_optimizer(config)
    compiled = compiled_round(config, net, rows.arrays)
    alone = dataclasses.replace(config, method="data-parallel", subnets=1)
    whole = dataclasses.replace(alone, local_steps=1)
    row = {
        "hidden": width,
        "subnets": n,
        "local_steps": J,
        "batch_size": B,
        "weights_gib": gib(like),
        "weights_and_state_gib": gib((like, jax.eval_shape(optimizer.init, like))),
        "round_gib": needs(compiled),
        "subnet_gib": needs(compiled_round(alone, net.subnet(n), rows.arrays)),
        "data_parallel_gib": needs(compiled_round(whole, net, rows.arrays)),
    }
    say(
        f"the whole network's weights {row['weights_gib']:.2f} GiB; compiled for: all {n} subnets "
        f"on this machine {row['round_gib']:.2f} GiB, a machine that trains one of them "
        f"{row['subnet_gib']:.2f} GiB, one that trains the whole data-parallel "
        f"{row['data_parallel_gib']:.2f} GiB; held until here {peak_rss():.2f} GiB"
    )
    params = jax.jit(functools.partial(initial_params, net))(jax.random.key(0))
    opt_state = jax.jit(optimizer.init)(params)
    index = jnp.arange(n * J * B, dtype=jnp.int32).reshape(n, J, B)
    arrays, numbers = jax.device_put((rows.arrays, (np.int32(0), np.int32(0))))
    jax.block_until_ready((params, opt_state))
    say(f"initial weights drawn; peak {peak_rss():.2f} GiB")
    before = time.perf_counter(), time.process_time()
    params, opt_state, metrics = compiled(params, opt_state, *numbers, index, arrays)
    jax.block_until_ready(params)
    row["seconds"] = time.perf_counter() - before[0]
    row["cpu_seconds"] = time.process_time() - before[1]
    row["round_peak_rss_gib"] = peak_rss()
    row["loss"] = float(jnp.mean(metrics.loss))
    if not bool(metrics.finite.all()):
        msg = f"subnets became NaN or Inf: {np.flatnonzero(~np.asarray(metrics.finite))}."
        raise NotFiniteError(msg)
    say(
        f"one round: {row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s of the CPU), "
        f"peak {row['round_peak_rss_gib']:.2f} GiB resident, "
        f"loss {row['loss']:.3f} (log {num_labels} is {math.log(num_labels):.3f})"
    )
    row = {name: row[name] for name in COLUMNS}
    path = out / "amazon_shapes.csv"
    same = lambda old: all(old[name] == row[name] for name in COLUMNS[:4])
    found = [old for old in read_rows(path) if not same(old)]
    found = sorted([*found, row], key=lambda row: [row[name] for name in COLUMNS[:4]])
    write_rows(path, found)
    replace(out / "amazon_shapes.md", table(found, num_features, num_labels))
    return row


def table(rows: list[dict], num_features: int, num_labels: int) -> str:
    """The rows of `amazon_shapes.csv` in Markdown."""
    shape = ("subnets", "local_steps", "batch_size")
    cells = [
        {
            "hidden neurons": f"{r['hidden']:g}",
            "subnets × local steps × batch": " × ".join(f"{r[name]:g}" for name in shape),
            "weights, GiB": f"{r['weights_gib']:.2f}",
            "a machine data-parallel, GiB": f"{r['data_parallel_gib']:.2f}",
            "a machine with one subnet, GiB": f"{r['subnet_gib']:.2f}",
            "all subnets on one machine, GiB": f"{r['round_gib']:.2f}",
            "peak of that process, GiB": f"{r['round_peak_rss_gib']:.2f}",
            "a round, s": f"{r['seconds']:.0f}",
            "of CPU time, s": f"{r['cpu_seconds']:.0f}",
        }
        for r in rows
    ]
    return (
        f"# Amazon-670k's shapes: {num_features} features, {num_labels} labels\n\n"
        f"{markdown(cells)}\n\n"
        "One round in subnets, trained one after the other on the CPU, on synthetic rows "
        f"({FEATURES_A_POINT} features and {LABELS_A_POINT} labels a point on average). The peak "
        "is that of the resident memory of the process from its start, initial weights, compiler "
        "and Python included; the three columns before it are what XLA's compiled programs need "
        "for arguments, results and temporaries: a data-parallel step of the whole network on one "
        "machine, the local steps of one subnet, and the whole round.\n"
    )
