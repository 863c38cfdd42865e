"""What a plan costs, before it runs: memory, bytes, products and the time of a step."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from psjax import structure
from psjax._masters import Store, _Routes
from psjax._partition import random_partition


class Workload(NamedTuple):
    """What a model costs, as numbers; made by `workload`.

    Attributes:
      axes: `PartitionSpec`s of the parameters.
      like: `jax.ShapeDtypeStruct`s of them.
      common: weights behind every score.
      private: weights of one class.
      common_flops: operations of value and gradient for one sample, of what all scores share.
      class_flops: the same of what one score has to itself.
      itemsize: bytes of a weight.
    """

    axes: Any
    like: Any
    common: int
    private: int
    common_flops: float
    class_flops: float
    itemsize: int


class Prediction(NamedTuple):
    """One way to take a step, of the most loaded worker.

    Attributes:
      name: of the method.
      plan: the `Plan`, or None for a method that is not one.
      memory: bytes of weights, gradients and optimizer moments; activations are not counted.
      down: bytes a worker receives of weights.
      up: bytes a worker sends of gradients, scores or weights that return.
      flops: operations of the step's products, padding included.
      trunk: how many workers evaluate the common layers on a sample.
      samples: that a worker needs, of the batch.
      holders: workers that hold a class's weights during the step, mean over the classes.
      seconds: `flops / rate + (down + up) / bandwidth`.
    """

    name: str
    plan: Any
    memory: float
    down: float
    up: float
    flops: float
    trunk: float
    samples: float
    holders: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Table:
    """Predictions side by side; `print` it."""

    rows: tuple[Prediction, ...]
    note: str = ""

    def __str__(self):
        head = ("", "memory MB", "down MB", "up MB", "MFLOP", "trunk", "samples", "holders", "ms")
        lines: list[tuple[str, ...]] = [head]
        fastest = min(row.seconds for row in self.rows)
        for row in self.rows:
            numbers = (row.memory / 1e6, row.down / 1e6, row.up / 1e6, row.flops / 1e6)
            numbers = (*numbers, row.trunk, row.samples, row.holders, 1e3 * row.seconds)
            mark = " *" if row.seconds == fastest else ""
            lines.append(
                (row.name, *(f"{x:.4g}" for x in numbers[:-1]), f"{numbers[-1]:.4g}{mark}")
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        show = lambda line: "  ".join(
            x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))
        ).rstrip()
        text = [show(line) for line in lines]
        text.append("the most loaded worker's; * the fastest by flops / rate + bytes / bandwidth")
        return "\n".join([*text, self.note] if self.note else text)


def workload(model: nn.Module, num_classes: int, inputs: Any) -> Workload:
    """Weights and operations of a Flax model whose scores are an axis of its parameters.

    Operations are those of XLA's own count of the program for value and gradient, not compiled, of
    two and four classes at two batch sizes: the count is a line in both.

    Args:
      model: with an attribute `num_classes`, its parameters annotated with the axis `class`.
      num_classes: C.
      inputs: an array or `jax.ShapeDtypeStruct` `[B, ...]` of the model's input, any B.

    Raises:
      ValueError: from `psjax.structure.count`, for a model without a class axis.
    """
    image = lambda batch: jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    model = model.clone(num_classes=num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), image(1))
    axes = nn.get_partition_spec(variables)["params"]
    like = nn.unbox(variables)["params"]
    counts = structure.count(axes, like)

    def flops(classes, batch):
        net = model.clone(num_classes=classes)
        params = nn.unbox(jax.eval_shape(net.init, jax.random.key(0), image(1)))["params"]
        fn = lambda params, x: jnp.sum(jnp.square(jnp.asarray(net.apply({"params": params}, x))))
        analysis = jax.jit(jax.value_and_grad(fn)).lower(params, image(batch)).cost_analysis()
        return float(analysis["flops"])  # pyright: ignore

    two, four = ((flops(m, 16) - flops(m, 8)) / 8 for m in (2, 4))
    each = (four - two) / 2
    itemsize = max(x.dtype.itemsize for x in jax.tree.leaves(like))
    private = counts.score - counts.common
    return Workload(axes, like, counts.common, private, two - 2 * each, each, itemsize)


def table(
    work: Workload,
    plans: Any,
    *,
    num_workers: int,
    batch_size: int,
    bandwidth: float,
    flops: float,
    moments: int = 2,
    local_steps: int = 10,
) -> Table:
    """What plans cost, with data parallelism, score exchange and independent subnets beside them.

    Args:
      work: `workload(model, num_classes, inputs)`.
      plans: an iterable of `Plan`s for `num_workers`.
      num_workers: W.
      batch_size: samples of all workers at a step, as many of each class.
      bandwidth: bytes a second of one worker.
      flops: operations a second of one worker.
      moments: of the optimizer, beside each weight: 0 SGD, 1 momentum, 2 Adam.
      local_steps: J of independent subnets, between two exchanges.

    Returns:
      A `Table`. Bytes are those that the compiled step sends, padding included.
    """
    store = Store(work.axes, work.like, num_workers)
    rows = [_of_plan(work, plan, store, batch_size, moments) for plan in plans]
    rows.append(_data_parallel(work, store, batch_size, moments))
    rows.append(_score_exchange(work, store, batch_size, moments))
    subnets, note = _subnets(work, store, batch_size, moments, local_steps)
    rows += [subnets] if subnets is not None else []
    time = lambda row: row.flops / flops + (row.down + row.up) / bandwidth
    return Table(tuple(row._replace(seconds=time(row)) for row in rows), note)


def best(
    model: nn.Module,
    num_classes: int,
    num_workers: int,
    *,
    inputs: Any,
    batch_size: int,
    bandwidth: float,
    flops: float,
    memory: float | None = None,
    moments: int = 2,
    local_steps: int = 10,
):
    """The plan with the shortest predicted step that fits into the memory.

    Considered are single elements, merged pairs, blocks of every even size, and cyclic plans of
    every number of groups from the smaller of W and C upwards.

    Args:
      model: as in `workload`.
      num_classes: C.
      num_workers: W.
      inputs: as in `workload`.
      batch_size: samples of all workers at a step.
      bandwidth: bytes a second of one worker.
      flops: operations a second of one worker.
      memory: bytes of one worker for weights, gradients and moments; None: no limit.
      moments: as in `table`.
      local_steps: as in `table`.

    Returns:
      A `Plan`; `print(plan)` shows the table of what it was compared with, where a method that is
      no plan may be faster.

    Raises:
      ValueError: no plan fits, with the least memory that one needs; as `workload` and the plans.
    """
    from psjax import plan as plans

    work = workload(model, num_classes, inputs)
    candidates = [plans.elements(num_classes, num_workers), plans.pairs(num_classes, num_workers)]
    candidates += [plans.blocks(num_classes, num_workers, s) for s in range(4, num_classes + 1, 2)]
    least = min(num_workers, num_classes)
    candidates += [plans.cyclic(num_classes, num_workers, g) for g in range(least, num_classes + 1)]
    costs = table(
        work,
        candidates,
        num_workers=num_workers,
        batch_size=batch_size,
        bandwidth=bandwidth,
        flops=flops,
        moments=moments,
        local_steps=local_steps,
    )
    rows = [row for row in costs.rows if row.plan is not None]
    fit = [row for row in rows if memory is None or row.memory <= memory]
    if not fit:
        small = min(rows, key=lambda row: row.memory)
        msg = (
            f"best(memory={memory:.4g}): no plan for {num_classes} classes on {num_workers} "
            f"workers fits; the least is {small.memory:.4g} bytes a worker, of {small.name}."
        )
        raise ValueError(msg)
    chosen = min(fit, key=lambda row: (row.seconds, row.memory))
    kinds = {row.name.split(",")[0]: row for row in sorted(fit, key=lambda r: -r.seconds)}
    shown = [chosen, *(row for row in kinds.values() if row is not chosen)]
    others = [row for row in costs.rows if row.plan is None]
    name = chosen._replace(name=f"{chosen.name} (chosen)")
    small = Table((name, *shown[1:], *others), costs.note)
    return dataclasses.replace(chosen.plan, costs=small)


# ------------------------------------------------------------------------------------------------


def _share(store, like):
    """Common weights that a worker keeps, what a leaf is padded with included."""
    leaves = [like[i] for i in range(len(like)) if i not in store._class_dims]
    return sum(math.ceil(math.prod(x.shape) / store.num_workers) for x in leaves if x.ndim)


def _of_plan(work, plan, store, batch_size, moments):
    W, T, rows, s = plan.pairs.shape
    m, share = store.rows.shape[1], _share(store, jax.tree.leaves(work.like))
    kept = m * work.private + share
    held = plan.block_size * work.private + work.common
    moved = work.itemsize * (T * _Routes(plan, store).rows_sent * work.private + (W - 1) * share)
    parts = (plan.labels < plan.num_classes) / plan.shares[..., 1:]  # of a class's samples
    slots = T * rows * math.ceil(batch_size / plan.num_classes / plan.shares[..., 1].min())
    seen = np.zeros((W, plan.num_classes + 1))
    np.maximum.at(seen, (np.arange(W)[:, None, None], plan.labels), parts)
    holds = np.zeros((W, plan.num_classes + 1), bool)
    holds[np.arange(W)[:, None, None], plan.classes] = True
    name = {
        "cyclic": f"cyclic, {plan.num_groups} groups, {len(plan.base)} a task",
        "blocks": f"blocks, {s} classes",
        "pairs": "merged pairs",
    }.get(plan.kind, str(plan.kind))
    return Prediction(
        name if T == 1 else f"{name}, {T} turns",
        plan,
        work.itemsize * ((2 + moments) * kept + 2 * held),
        moved,
        moved,
        slots * (work.common_flops + s * work.class_flops),
        float(parts.sum() / plan.num_classes),
        batch_size / plan.num_classes * seen[:, :-1].sum(axis=1).max(),
        float(holds[:, :-1].sum(axis=0).mean()),
        math.nan,
    )


def _data_parallel(work, store, batch_size, moments):
    W, n = store.num_workers, work.common + store.num_classes * work.private
    ring = work.itemsize * n * (W - 1) / W
    each = math.ceil(batch_size / W)
    flops = each * (work.common_flops + store.num_classes * work.class_flops)
    memory = work.itemsize * n * (2 + moments)
    return Prediction("data parallel", None, memory, ring, ring, flops, 1, each, W, math.nan)


def _score_exchange(work, store, batch_size, moments):
    W, m = store.rows.shape
    share = _share(store, jax.tree.leaves(work.like))
    kept = m * work.private + share
    return Prediction(
        "score exchange",
        None,
        work.itemsize * ((2 + moments) * kept + 2 * work.common),
        work.itemsize * (W - 1) * share,
        work.itemsize * (W - 1) * (share + batch_size * m),
        batch_size * (work.common_flops + m * work.class_flops),
        W,
        batch_size,
        1,
        math.nan,
    )


def _subnets(work, store, batch_size, moments, local_steps):
    """Independent subnets: what `psjax.ist.exchange` sends in a round, a step's share of it."""
    W = store.num_workers
    sizes = {}
    for x, spec in zip(jax.tree.leaves(work.like), store._specs):
        sizes |= {n: d for n, d in zip(spec, x.shape) if n not in (None, store.axis) and d >= W}
    if not sizes:
        return None, "independent subnets: the model names no hidden axis to divide."
    subnets = random_partition(jax.random.key(0), work.axes, sizes, num_elements=W)
    split = [bool(set(spec) & set(sizes)) for spec in store._specs]
    small = jax.tree.leaves(jax.eval_shape(subnets.gather, work.like))
    of_subnet = [math.prod(x.shape[1:]) for x in small]
    sent = sum(n for n, yes in zip(of_subnet, split) if yes)
    shared = sum(n for n, yes in zip(of_subnet, split) if not yes)
    n = work.common + store.num_classes * work.private
    moved = work.itemsize * (1 + moments) * (sent + shared) * (W - 1) / W / local_steps
    each = math.ceil(batch_size / W)
    whole = each * (work.common_flops + store.num_classes * work.class_flops)
    kept = (n - shared) / W
    memory = work.itemsize * ((1 + moments) * kept + (2 + moments) * (sent + shared))
    name = f"independent subnets, J = {local_steps}"
    row = Prediction(
        name, None, memory, moved, moved, whole * (sent + shared) / n, 1, each, 1, math.nan
    )
    note = (
        f"independent subnets: {', '.join(sorted(sizes))} divided; another training, whose steps "
        "cannot be compared one by one; its operations in proportion to the weights."
    )
    return row, note
