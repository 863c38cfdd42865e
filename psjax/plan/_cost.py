"""What a plan costs, before it runs: memory, bytes, operations and the time of a step."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from psjax import structure
from psjax._partition import random_partition
from psjax._types import Params, Sizes, Struct
from psjax.cost import encoded_mean
from psjax.plan._plan import Plan
from psjax.plan._routes import Routes
from psjax.plan._store import Store


class Workload(NamedTuple):
    """Weights and operations of a model, as `workload` counts them.

    Attributes:
      axes: `PartitionSpec`s of the parameters.
      like: the parameters as `jax.ShapeDtypeStruct`s.
      common: number of weights that every score depends on.
      private: number of further weights per class.
      common_flops: operations per sample, for value and gradient, of layers that all scores share.
      class_flops: further operations per sample and class.
      itemsize: bytes per weight.
      model: the model that was counted, to count narrower ones; None if you made the numbers.
      inputs: `jax.ShapeDtypeStruct` of its input.
    """

    axes: Any
    like: Any
    common: int
    private: int
    common_flops: float
    class_flops: float
    itemsize: int
    model: Any = None
    inputs: Any = None


class Prediction(NamedTuple):
    """What one method needs for a step, on the worker with the most to do.

    Attributes:
      name: name of the method.
      plan: the `Plan`, or None for a method that is not a plan.
      memory: bytes of weights, gradients and optimizer moments; activations are not counted.
      down: bytes of weights that the worker receives.
      up: bytes of gradients, scores or returned weights that the worker sends.
      flops: operations of the matrix products in the step, including padding.
      trunk: number of times that the common layers are evaluated on a sample.
      samples: number of samples of the batch that the worker needs.
      holders: number of workers that have a weight of a class during the step, averaged over these
        weights.
      seconds: `flops / rate + (down + up) / bandwidth`. The time to start collectives is not
        included; for small networks, a plan of many turns takes longer than this.
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
    """Predictions side by side. `print` shows them as a table.

    Attributes:
      rows: one `Prediction` per method.
      note: text printed under the table.
      memory: bytes that a worker has; None: no limit.
    """

    rows: tuple[Prediction, ...]
    note: str = ""
    memory: float | None = None

    @property
    def best(self) -> Any:
        """The plan with the shortest predicted step among those that fit into the memory.

        None if no plan fits. A row that is not a plan may be faster.
        """
        fit = [row for row in self._fit if row.plan is not None]
        return min(fit, key=lambda row: (row.seconds, row.memory)).plan if fit else None

    @property
    def _fit(self):
        return [row for row in self.rows if self.memory is None or row.memory <= self.memory]

    def __str__(self):
        head = ("", "memory MB", "down MB", "up MB", "MFLOP", "trunk", "samples", "holders", "ms")
        lines: list[tuple[str, ...]] = [head]
        fit = self._fit
        fastest = min((row.seconds for row in fit), default=None)
        for row in self.rows:
            numbers = (row.memory / 1e6, row.down / 1e6, row.up / 1e6, row.flops / 1e6)
            numbers = (*numbers, row.trunk, row.samples, row.holders, 1e3 * row.seconds)
            mark = " *" if row in fit and row.seconds == fastest else ""
            lines.append(
                (row.name, *(f"{x:.4g}" for x in numbers[:-1]), f"{numbers[-1]:.4g}{mark}")
            )
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        show = lambda line: "  ".join(
            x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths))
        ).rstrip()
        limit = "" if self.memory is None else f" of those within {self.memory / 1e6:.4g} MB"
        text = [
            *map(show, lines),
            f"the most loaded worker's; * the fastest{limit} by flops / rate + bytes / bandwidth,",
            "without the time to start a collective, of which every turn of a plan has its own",
        ]
        return "\n".join([*text, self.note] if self.note else text)


def workload(model: nn.Module, num_classes: int, inputs: Any) -> Workload:
    """Count the weights and operations of a Flax model with a class axis.

    XLA counts the operations in the program for value and gradient, without compiling it, for two
    and four classes and two batch sizes: the count is linear in both.

    Args:
      model: a module with an attribute `num_classes`, and parameters with the axis `class`.
      num_classes: number of classes, C.
      inputs: an array or `jax.ShapeDtypeStruct` `[B, ...]` like the model's input, with any B.

    Raises:
      ValueError: the model has no class axis (from `psjax.structure.count`).
    """
    image = lambda batch: jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    model = model.clone(num_classes=num_classes)
    variables = jax.eval_shape(model.init, jax.random.key(0), image(1))
    axes = nn.get_partition_spec(variables)["params"]
    like = nn.unbox(variables)["params"]
    counts = structure.count(axes, like)
    two, four = (_operations(model.clone(num_classes=m), inputs) for m in (2, 4))
    each = (four - two) / 2
    itemsize = max(x.dtype.itemsize for x in jax.tree.leaves(like))
    private, common = counts.score - counts.common, two - 2 * each
    return Workload(
        axes, like, counts.common, private, common, each, itemsize, model, image(inputs.shape[0])
    )


def table(
    work: Workload,
    plans: Any,
    *,
    num_workers: int,
    batch_size: int,
    bandwidth: float,
    flops: float,
    memory: float | None = None,
    slots: int | None = None,
    moments: int = 2,
    local_steps: int = 10,
    codec: Any = None,
) -> Table:
    """Predict the costs of plans, and of data parallelism, score exchange and independent subnets.

    Args:
      work: `workload(model, num_classes, inputs)`.
      plans: an iterable of `Plan`s for `num_workers`.
      num_workers: number of workers, W.
      batch_size: samples of all workers per step, equally many of each class.
      bandwidth: bytes per second of one worker.
      flops: operations per second of one worker.
      memory: bytes of one worker; the table marks the fastest row that fits. None: no limit.
      slots: places per label in a batch; a plan computes empty ones, too. None: enough for equally
        many samples of each label. For batches in random order, pass
        `psjax.data.most_of_a_label`, which is about twice as many if a label has 10 on average.
      moments: optimizer moments per weight: 0 for SGD, 1 for momentum, 2 for Adam.
      local_steps: J, steps of independent subnets between two exchanges.
      codec: a `psjax.codec.Codec`, such as `psjax.codec.int4(64)`: rows are added of what sends
        encoded differences, data parallelism (`psjax.codec.mean` of the gradients), local SGD and
        independent subnets (`psjax.codec.compress`; what a subnet fetches and its moments are not
        encoded). They lose precision; no other row does. None: no such rows.

    Returns:
      A `Table`. Its bytes are those that the compiled step sends, including padding.

    Raises:
      ValueError: there are no workers, samples or local steps, moments are negative, a speed is not
        positive, or there are fewer slots than samples of a label.
    """
    check_numbers(
        "table",
        num_workers=num_workers,
        batch_size=batch_size,
        bandwidth=bandwidth,
        flops=flops,
        moments=moments,
        local_steps=local_steps,
    )
    store = Store(work.axes, work.like, num_workers)
    each = slots_of("table", slots, batch_size, store.num_classes)
    rows = [plan_row(work, plan, store, batch_size, each, moments) for plan in plans]
    whole = _data_parallel(work, store, batch_size, moments)
    rows.append(whole)
    rows.append(_score_exchange(work, store, batch_size, moments))
    subnets, note = _subnets(work, store, batch_size, moments, local_steps)
    rows += [subnets] if subnets is not None else []
    if codec is not None:
        rows += _encoded(work, store, codec, whole, subnets, moments, local_steps)
    note = f"plans: operations of {each} slots for every label of a batch\n{note}"
    timed = (row._replace(seconds=seconds_of(row, flops, bandwidth)) for row in rows)
    return Table(tuple(timed), note, memory)


# ------------------------------------------------------------------------------------------------


def check_numbers(call: str, **numbers: Any):
    for name, value in numbers.items():
        least = 0 if name == "moments" else 1
        real = name in ("bandwidth", "flops")
        if not (value > 0 if real else value >= least):
            needed = "a positive number" if real else f"{least} or more"
            msg = f"{call}({name}={value}): pass {needed}."
            raise ValueError(msg)


def slots_of(call: str, slots: int | None, batch_size: int, num_classes: int) -> int:
    """Slots per label: the given number, or enough for equally many samples of each label."""
    least = math.ceil(batch_size / num_classes)
    if slots is not None and slots < least:
        msg = (
            f"{call}(slots={slots}): {batch_size} samples of {num_classes} classes need {least} "
            "slots per label or more."
        )
        raise ValueError(msg)
    return least if slots is None else slots


def _operations(model: nn.Module, inputs: Struct):
    """Operations of value and gradient per sample, as XLA counts them without compiling."""
    image = lambda batch: jax.ShapeDtypeStruct((batch, *inputs.shape[1:]), inputs.dtype)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), image(1)))["params"]
    fn = lambda params, x: jnp.sum(jnp.square(jnp.asarray(model.apply({"params": params}, x))))

    def flops(batch: int):
        analysis = jax.jit(jax.value_and_grad(fn)).lower(params, image(batch)).cost_analysis()
        return float(analysis["flops"])  # pyright: ignore

    return (flops(16) - flops(8)) / 8


def _share(store: Store, like: Params):
    """Number of common weights in a worker's shard, including padding."""
    leaves = [like[i] for i in range(len(like)) if i not in store.class_leaves]
    return sum(math.ceil(math.prod(x.shape) / store.num_workers) for x in leaves if x.ndim)


def seconds_of(row: Prediction, flops: float, bandwidth: float) -> float:
    """Predicted time of a step."""
    return row.flops / flops + (row.down + row.up) / bandwidth


def least_of(work: Workload, num_classes: int, num_workers: int, slots: int, size: int):
    """Lower bounds, for any plan with tasks of `size`: operations and bytes of the busiest worker.

    A task has at most size - 1 pairs of a label, and all workers compute equally much, including
    padding. So together they evaluate the slots of each label at least (C - 1) / (size - 1) times.
    A task that receives f classes has at most f (2 size - 2) pairs with one of them, and each pair
    of classes with different owners is such a pair.
    """
    C, W = num_classes, num_workers
    each = slots / W * C * (C - 1) / (size - 1)
    flops = each * (work.common_flops + size * work.class_flops)
    m = -(-C // W)
    received = max(C * (C - 1) - W * m * (m - 1), 0) / (2 * size - 2) / W
    return flops, work.itemsize * work.private * received


def plan_row(
    work: Workload, plan: Plan, store: Store, batch_size: int, slots: int, moments: int
) -> Prediction:
    """The `Prediction` of a plan, without its seconds."""
    W, T, rows, s = plan.pairs.shape
    m, share = store.rows.shape[1], _share(store, jax.tree.leaves(work.like))
    kept = m * work.private + share
    held = plan.block_size * work.private + work.common
    moved = work.itemsize * (T * Routes(plan, store).rows_sent * work.private + (W - 1) * share)
    labels = plan.labels
    parts = (labels < plan.num_classes) / plan.shares[..., 1:]  # of a class's samples
    computed = T * rows * plan.slots(slots).shape[2]
    seen = np.zeros((W, plan.num_classes + 1))
    np.maximum.at(seen, (np.arange(W)[:, None, None], labels), parts)
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
        computed * (work.common_flops + s * work.class_flops),
        float(parts.sum() / plan.num_classes),
        batch_size / plan.num_classes * seen[:, :-1].sum(axis=1).max(),
        float(holds[:, :-1].sum(axis=0).mean()),
        math.nan,
    )


def _data_parallel(work: Workload, store: Store, batch_size: int, moments: int):
    W, n = store.num_workers, work.common + store.num_classes * work.private
    ring = work.itemsize * n * (W - 1) / W
    each = math.ceil(batch_size / W)
    flops = each * (work.common_flops + store.num_classes * work.class_flops)
    memory = work.itemsize * n * (2 + moments)
    return Prediction("data parallel", None, memory, ring, ring, flops, 1, each, W, math.nan)


def _encoded(
    work: Workload,
    store: Store,
    codec: Any,
    whole: Prediction,
    subnets: Prediction | None,
    moments: int,
    local_steps: int,
):
    """Rows of what sends encoded differences, from those that send the same as it is."""
    W, J, floats = store.num_workers, local_steps, work.common + store.num_classes * work.private
    dtype = jax.tree.leaves(work.like)[0].dtype
    mean = encoded_mean(floats, W, codec, dtype) / (2 * W)
    rows = [
        whole._replace(name=f"{whole.name}, {codec!r}", down=mean, up=mean),
        whole._replace(name=f"local SGD, J = {J}, {codec!r}", down=mean / J, up=mean / J),
    ]
    if subnets is not None and W > 1:
        weights = subnets.up / (1 + moments)
        entries = round(weights * J * W / (W - 1) / work.itemsize)
        row = codec.block * math.ceil(entries / W / codec.block)
        packed = (W - 1) * codec.bytes((row,), dtype) / J
        name = f"{subnets.name}, {codec!r}"
        rows.append(subnets._replace(name=name, up=subnets.up - weights + packed))
    return rows


def _score_exchange(work: Workload, store: Store, batch_size: int, moments: int):
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


def _subnets(work: Workload, store: Store, batch_size: int, moments: int, local_steps: int):
    """Independent subnets: the share of one step in what `psjax.ist.exchange` sends per round."""
    W, title = store.num_workers, "independent subnets"
    sizes = {}
    for x, spec in zip(jax.tree.leaves(work.like), store.leaf_specs):
        sizes |= {n: d for n, d in zip(spec, x.shape) if n not in (None, store.axis) and d >= W}
    if not sizes:
        return None, f"{title}: no row, because the model has no hidden axis of {W} neurons or more"
    draw = lambda: random_partition(jax.random.key(0), store.axes, sizes, num_elements=W)
    gathered = jax.eval_shape(lambda like: draw().gather(like), work.like)
    small = [x.shape[1:] for x in jax.tree.leaves(gathered)]
    narrow = _narrow(work, sizes, W, small)
    if narrow is None:
        return None, f"{title}: no row, because model.clone(hidden=...) is not a narrower model"
    whole = np.array([math.prod(x.shape) for x in jax.tree.leaves(work.like)])
    of_subnet = np.array([math.prod(shape) for shape in small])
    split = np.array([bool(set(spec) & set(sizes)) for spec in store.leaf_specs])
    own = np.array([store.axis in spec for spec in store.leaf_specs])
    shared, seen = int(of_subnet[~split].sum()), int(of_subnet.sum())
    moved = work.itemsize * (1 + moments) * seen * (W - 1) / W / local_steps
    each = math.ceil(batch_size / W)
    row = Prediction(
        f"{title}, J = {local_steps}",
        None,
        work.itemsize * ((1 + moments) * (int(whole.sum()) - shared) / W + (2 + moments) * seen),
        moved,
        moved,
        each * _operations(narrow, work.inputs),
        1,
        each,
        float(W * of_subnet[own].sum() / whole[own].sum()),
        math.nan,
    )
    note = (
        f"{title}: {', '.join(sorted(sizes))} divided; this is another training method, "
        "whose steps cannot be compared one by one"
    )
    uneven = [f"{name} ({size})" for name, size in sorted(sizes.items()) if size % W**2]
    if uneven:
        note += (
            f";\n  psjax.ist.exchange refuses {', '.join(uneven)}, which {W}^2 must divide: "
            "the row assumes shares rounded up"
        )
    return row, note


def _narrow(work: Workload, sizes: Sizes, num_subnets: int, shapes: Sequence[tuple[int, ...]]):
    """The module with parameters of the shapes of a subnet, or None."""
    hidden = getattr(work.model, "hidden", None)
    if not isinstance(hidden, tuple):
        return None
    width = lambda i, n: math.ceil(n / num_subnets) if f"hidden_{i}" in sizes else n
    narrow = work.model.clone(hidden=tuple(width(i, n) for i, n in enumerate(hidden)))
    params = nn.unbox(jax.eval_shape(narrow.init, jax.random.key(0), work.inputs))["params"]
    return narrow if [x.shape for x in jax.tree.leaves(params)] == shapes else None
