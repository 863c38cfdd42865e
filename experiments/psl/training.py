"""Training a classifier with a partially-separable loss: the epoch as one compiled program.

What `train`, `reproduce` and `drops` have in common. A researcher's own script needs the ten lines
of `loss_and_grad_fn` and `epoch_fn`; the rest is data, seeds and devices.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from experiments.psl.config import LOSSES as LOSSES
from experiments.psl.config import Config as Config

# ------------------------------------------------------------------------------------------- pieces


def make_model(config: Config, num_classes: int):
    preset = config.preset
    if preset is None:
        known = {"digits": "digits", "cifar10": "cifar10", "cifar100": "cifar10"}
        preset = known.get(config.dataset, "mnist")
        if num_classes != 10:
            net = getattr(psjax.models, config.model)(preset)
            return net.clone(num_classes=num_classes)
    return getattr(psjax.models, config.model)(preset, num_classes)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    make = {
        "adam": functools.partial(optax.adam, b2=config.b2),
        "adamw": functools.partial(optax.adamw, b2=config.b2),
        "sgd": optax.sgd,
        "momentum": functools.partial(optax.sgd, momentum=0.9),
    }[config.optimizer]
    optimizer = make(config.learning_rate)
    if config.clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(config.clip), optimizer)


def sample_loss(config: Config):
    """`(scores [B, C], labels [B]) -> [B]`."""
    if config.loss == "nll":
        return psjax.losses.nll_with_integer_labels
    if config.loss == "one-vs-all":
        return psjax.losses.one_vs_all_with_integer_labels
    margin_fn = psjax.losses.margin_function(config.loss, config.margin_bound)
    return functools.partial(psjax.losses.psl_with_integer_labels, margin_fn=margin_fn)


def make_plan(config: Config, num_classes: int) -> psjax.plan.Plan:
    """The tasks of --compute pairs or blocks, for one worker.

    Blocks are cyclic where a difference cover of the classes has their size, `num_classes` of them;
    else two groups of half the size each.
    """
    if config.compute == "pairs":
        return psjax.plan.pairs(num_classes, 1)
    if config.block_size == len(psjax.plan.difference_cover(num_classes)):
        return psjax.plan.cyclic(num_classes, 1, num_classes)
    return psjax.plan.blocks(num_classes, 1, config.block_size)


def loss_and_grad_fn(config: Config, net, axes, like, num_classes: int):
    """How the loss is computed: `(fn(params, selection, batch) -> value, grads; selection)`.

    A batch has `image` and `weight`, and for the fused form `label`; its leaves are
    `[B, ...]`, or by label `[C, slots, ...]`, or in tiles `[tiles, tile, ...]`.
    """
    if config.compute == "fused":
        per_sample = sample_loss(config)

        def whole(params, _, batch):
            def fn(params):
                losses = per_sample(net.apply({"params": params}, batch["image"]), batch["label"])
                return jnp.sum(batch["weight"] * losses)

            return jax.value_and_grad(fn)(params)

        return whole, None
    margin_fn = psjax.losses.margin_function(config.loss, config.margin_bound)
    if config.compute == "elements":
        two = net.clone(num_classes=2)

        def h(params, batch):  # element (k, j): two scores, the samples labelled k
            scores = two.apply({"params": params}, batch["image"])
            return psjax.losses.pair(scores, batch["weight"], margin_fn)

        rows = "label" if config.tile is None else "tile"
        pairs = psjax.ordered_pairs(num_classes)
        selection = psjax.select(
            axes, {"class": pairs, rows: pairs[:, 0]}, like=like, sizes={rows: num_classes}
        )
        return psjax.value_and_grad(h, in_axes=P(rows)), selection
    plan = make_plan(config, num_classes).by_label()
    small = net.clone(num_classes=plan.block_size)

    def g(params, batch, pairs):  # a label of a block: s scores, the samples with this label
        images = batch["image"]
        scores = small.apply({"params": params}, images.reshape(-1, *images.shape[2:]))
        return psjax.losses.block(
            scores.reshape(*images.shape[:2], -1), batch["weight"], pairs, margin_fn
        )

    inner = psjax.value_and_grad(g, in_axes=(P("label"), P("task")))
    selection = plan.selection(axes, like)
    pairs = jnp.asarray(plan.pairs[0])
    return lambda params, selection, batch: inner(params, selection, batch, pairs), selection


def tile_selection(selection, tile_labels, num_classes: int):
    """The elements of one batch in tiles: tile t of label k against every other class.

    Args:
      selection: any selection of the model, for its axes and sizes.
      tile_labels: `[tiles]`, C where a tile is empty. May be traced: nothing recompiles.
      num_classes: C.
    """
    tiles = tile_labels.shape[0]
    label = jnp.repeat(tile_labels, num_classes - 1)
    other = jnp.tile(jnp.arange(1, num_classes), tiles)
    filled = label < num_classes
    other = jnp.where(filled, (label + other) % num_classes, num_classes)
    indices = {
        "class": jnp.stack([label, other], axis=1).astype(jnp.int32),
        "tile": jnp.repeat(jnp.arange(tiles, dtype=jnp.int32), num_classes - 1),
    }
    sizes = tuple((n, tiles if n == "tile" else s) for n, s in selection.axis_sizes)
    return dataclasses.replace(selection, indices=indices, valid=filled, axis_sizes=sizes)


# ------------------------------------------------------------------------------------------ batches


def epoch_order(config: Config, labels, num_classes: int, seed: int, epoch: int):
    """The epoch's samples in order, from (seed, epoch) alone."""
    if config.order == "dataset":
        return None
    if config.order == "stratified":
        mixed = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
        return psjax.data.stratified_order(labels, num_classes, config.batch_size, mixed)
    epoch = 0 if config.order == "fixed" else epoch
    return np.random.default_rng([seed, epoch]).permutation(len(labels))


class EpochBatches:
    """Index batches of every epoch and seed, of one shape for the whole training."""

    def __init__(self, config: Config, labels, num_classes: int):
        self.config, self.labels, self.num_classes = config, labels, num_classes
        self.seeds = range(config.first_seed, config.first_seed + config.seeds)
        self.room = None
        if config.compute != "fused":
            epochs = range(1) if config.order in ("dataset", "fixed") else range(config.epochs)
            orders = (self._order(seed, e) for e in epochs for seed in self.seeds)
            if config.tile is None:
                most = (
                    psjax.data.most_of_a_label(labels, num_classes, config.batch_size, order)
                    for order in orders
                )
            else:
                most = (
                    psjax.data.tiles_by_label(
                        labels, num_classes, config.batch_size, config.tile, order
                    ).labels.shape[1]
                    for order in orders
                )
            self.room = max(most)

    def _order(self, seed, epoch):
        return epoch_order(self.config, self.labels, self.num_classes, seed, epoch)

    def _one(self, seed, epoch):
        config, order = self.config, self._order(seed, epoch)
        if config.compute == "fused":
            return psjax.data.batches(self.labels, config.batch_size, order)
        args = (self.labels, self.num_classes, config.batch_size)
        if config.tile is None:
            return psjax.data.batches_by_label(*args, order, self.room)
        return psjax.data.tiles_by_label(*args, config.tile, order, self.room)

    def __call__(self, epoch: int) -> dict[str, np.ndarray]:
        """`indices`, `weights` and `labels`, each `[seeds, steps, ...]`."""
        parts = [self._one(seed, epoch)._asdict() for seed in self.seeds]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def padding_factor(self) -> float:
        return self._one(self.seeds[0], 0).padding_factor


# ------------------------------------------------------------------------------------------ program


def over_seeds(fn):
    """Map over the arguments' leading axis: one after the other on the CPU, else by vmap."""
    if jax.default_backend() == "cpu":
        return lambda *args: jax.lax.map(lambda xs: fn(*xs), args)
    return jax.vmap(fn)


class Step(NamedTuple):
    """What a training step's metrics may be made of."""

    params: Any
    """Before the step."""
    batch: dict[str, jax.Array]
    """`image`, `weight` and `label`."""
    loss: jax.Array
    grads: Any
    updates: Any
    opt_state: Any
    """After the step."""


def margin_metrics(net, num_classes: int):
    """`step -> loss, max_margin, grad_norm`: `max_margin` is the largest c_j - c_y of the batch."""

    def metrics(step: Step):
        # In the fused form XLA shares this forward pass with the loss's.
        images = step.batch["image"]
        scores = net.apply({"params": step.params}, images.reshape(-1, *images.shape[-3:]))
        correct = jax.nn.one_hot(step.batch["label"].ravel(), num_classes, dtype=bool)
        scored = jnp.sum(jnp.where(correct, scores, 0), -1, keepdims=True)
        real = (step.batch["weight"].ravel() > 0)[:, None] & ~correct
        return {
            "loss": step.loss,
            "max_margin": jnp.max(jnp.where(real, scores - scored, -jnp.inf)),
            "grad_norm": optax.tree.norm(step.grads),
        }

    return metrics


def epoch_fn(
    config: Config,
    net,
    optimizer,
    loss_and_grad,
    selection,
    num_classes: int,
    make_metrics=margin_metrics,
):
    """`(state, batches, data) -> state, metrics`, one epoch of every seed, jitted.

    `data` has `images` (uint8), `labels`, `scale`. `make_metrics(net, num_classes)` gives a
    function that makes a step's metrics of a `Step`; they come back as `[seeds, steps]`.
    """
    metrics_fn = make_metrics(net, num_classes)

    def psum(x):
        return jax.lax.psum(x, "workers") if config.devices != "one" else x

    def step(data, selection, carry, batch):
        params, opt_state = carry
        index = batch["indices"]
        images = psjax.data.take(data["images"], index, data["scale"])
        labels = psjax.data.take(data["labels"], index)
        whole = {"image": images, "weight": batch["weights"], "label": labels}
        names = whole if config.compute == "fused" else ("image", "weight")
        own = {name: whole[name] for name in names}
        if config.tile is not None:
            selection = tile_selection(selection, batch["labels"], num_classes)
            if config.devices != "one":  # this device's share of the elements
                shares = selection.split(jax.device_count())
                mine = jax.lax.axis_index("workers")
                selection = jax.tree.map(lambda x: x[mine], shares)
        loss, grads = psum(loss_and_grad(params, selection, own))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = metrics_fn(Step(params, whole, loss, grads, updates, opt_state))
        return (optax.apply_updates(params, updates), opt_state), metrics

    def one_seed(state, batches, data, selection):
        carry = (state["params"], state["opt_state"])
        run = functools.partial(step, data, selection)
        (params, opt_state), metrics = jax.lax.scan(run, carry, batches)
        return {"params": params, "opt_state": opt_state}, metrics

    def epoch(state, batches, data, selection):
        return over_seeds(lambda s, b: one_seed(s, b, data, selection))(state, batches)

    if config.devices == "one":
        jitted = jax.jit(epoch, donate_argnums=0)
        return lambda state, batches, data: jitted(state, batches, data, selection)
    parts = selection.split(jax.device_count())
    if config.devices == "pmap":
        mapped = jax.pmap(epoch, axis_name="workers", in_axes=(None, None, None, 0), out_axes=None)
        return lambda state, batches, data: mapped(state, batches, data, parts)
    mesh = jax.make_mesh((jax.device_count(),), ("workers",), (jax.sharding.AxisType.Auto,))

    def own_part(state, batches, data, parts):
        return epoch(state, batches, data, jax.tree.map(lambda x: x[0], parts))

    # check_vma=False: parameters replicated in a scan's carry are not seen to stay so after a psum.
    specs = (P(), P(), P(), P("workers"))
    sharded = jax.jit(
        jax.shard_map(own_part, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    )
    return lambda state, batches, data: sharded(state, batches, data, parts)


def all_finite(state):
    """Whether there is no NaN or Inf in the weights and the optimizer's state of one seed."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


sound = jax.jit(jax.vmap(all_finite))
"""`state -> [seeds]`: `all_finite` of every seed, jitted."""


def accuracy_fn(net, batch_size: int = 1000):
    """`(params [seeds, ...], data) -> accuracy [seeds]`, jitted."""

    def one(params, data):
        n = data["labels"].shape[0]
        size = min(batch_size, n)
        index = jnp.arange(-(-n // size) * size).reshape(-1, size)

        def correct(i):
            images = psjax.data.take(data["images"], i, data["scale"])
            right = jnp.argmax(net.apply({"params": params}, images), -1) == psjax.data.take(
                data["labels"], i
            )
            return jnp.sum(right & (i < n))

        return jnp.sum(jax.lax.map(correct, index)) / n

    return jax.jit(lambda params, data: over_seeds(lambda p: one(p, data))(params))


def on_device(dataset: psjax.data.Dataset) -> dict[str, Any]:
    arrays = {"images": dataset.images, "labels": dataset.labels}
    return jax.device_put({**arrays, "scale": np.float32(dataset.scale)})


def initial_states(start, seeds) -> dict[str, Any]:
    """`start(seed)` of every seed, `[seeds, ...]`, as one program.

    It runs once: on the CPU, most of the compiler's optimizations would take longer than they save.
    The numbers are the same.
    """
    options: Any = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    seeds = np.asarray(seeds, np.int32)
    lowered = jax.jit(lambda seeds: jax.lax.map(start, seeds)).lower(seeds)
    return lowered.compile(compiler_options=options)(seeds)


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything a training loop calls."""

    net: Any
    state: dict[str, Any]
    epoch: Any
    accuracy: Any
    batches: EpochBatches
    train: dict[str, Any]
    test: dict[str, Any]


def build(config: Config, data_dir: str | None = None, make_metrics=margin_metrics) -> Program:
    """Load the data, make the model and the compiled functions; `make_metrics` as in `epoch_fn`."""
    train = psjax.data.load(config.dataset, "train", data_dir)
    test = psjax.data.load(config.dataset, "test", data_dir)
    net = make_model(config, train.num_classes)
    optimizer = make_optimizer(config)
    shape = train.images.shape[1:]
    variables = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, *shape))))
    axes = nn.get_partition_spec(variables)["params"]

    def start(seed):
        params = nn.unbox(net.init(jax.random.key(seed), jnp.zeros((1, *shape))))["params"]
        return {"params": params, "opt_state": optimizer.init(params)}

    state = initial_states(start, range(config.first_seed, config.first_seed + config.seeds))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state["params"])
    loss_and_grad, selection = loss_and_grad_fn(config, net, axes, like, train.num_classes)
    args = config, net, optimizer, loss_and_grad, selection, train.num_classes
    epoch = epoch_fn(*args, make_metrics)
    batches = EpochBatches(config, train.labels, train.num_classes)
    return Program(net, state, epoch, accuracy_fn(net), batches, on_device(train), on_device(test))
