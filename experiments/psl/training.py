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
from experiments._lib import program
from experiments._lib.program import initial_states as initial_states
from experiments.psl.config import LOSSES as LOSSES
from experiments.psl.config import Config as Config

# ------------------------------------------------------------------------------------------- pieces


def make_model(dataset: str, num_classes: int, model: str = "psnet", preset: str | None = None):
    """A network of `psjax.models` for a data set, of the preset's size or of the set's own."""
    make = getattr(psjax.models, model)
    if preset is not None:
        return make(preset, num_classes)
    known = {"digits": "digits", "cifar10": "cifar10", "cifar100": "cifar10"}
    return make(known.get(dataset, "mnist")).clone(num_classes=num_classes)


def make_optimizer(config: Config) -> optax.GradientTransformation:
    args = config.optimizer, config.learning_rate, config.clip
    return program.make_optimizer(*args, b2=config.b2)


def sample_loss(loss: str, margin_bound: float | None = None):
    """`(scores [B, C], labels [B]) -> [B]`."""
    if loss == "nll":
        return psjax.losses.nll_with_integer_labels
    if loss == "one-vs-all":
        return psjax.losses.one_vs_all_with_integer_labels
    margin_fn = psjax.losses.margin_function(loss, margin_bound)
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
        per_sample = sample_loss(config.loss, config.margin_bound)

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
        self.slots = None
        if config.compute != "fused":
            epochs = range(1) if config.order in ("dataset", "fixed") else range(config.epochs)
            self.slots = max(self._most(seed, epoch) for epoch in epochs for seed in self.seeds)

    def _args(self, seed, epoch):
        order = epoch_order(self.config, self.labels, self.num_classes, seed, epoch)
        return (self.labels, self.num_classes, self.config.batch_size), order

    def _most(self, seed, epoch):
        """Slots of a label, or tiles, that the fullest batch of an epoch needs."""
        args, order = self._args(seed, epoch)
        if self.config.tile is None:
            return psjax.data.most_of_a_label(*args, order)
        return psjax.data.tiles_by_label(*args, self.config.tile, order).labels.shape[1]

    def _one(self, seed, epoch):
        args, order = self._args(seed, epoch)
        if self.config.compute == "fused":
            return psjax.data.batches(self.labels, self.config.batch_size, order)
        if self.config.tile is None:
            return psjax.data.batches_by_label(*args, order, self.slots)
        return psjax.data.tiles_by_label(*args, self.config.tile, order, self.slots)

    def __call__(self, epoch: int) -> dict[str, np.ndarray]:
        """`indices`, `weights` and `labels`, each `[seeds, steps, ...]`."""
        parts = [self._one(seed, epoch)._asdict() for seed in self.seeds]
        return {name: np.stack([part[name] for part in parts]) for name in parts[0]}

    def padding_factor(self) -> float:
        return self._one(self.seeds[0], 0).padding_factor


# ------------------------------------------------------------------------------------------ program


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
    if config.devices == "shard_map":
        loss_and_grad = psjax.shard(loss_and_grad, program.device_mesh(jax.device_count()))
    pmap = config.devices == "pmap"

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
            if pmap:  # this device's share of the elements
                shares, mine = selection.split(jax.device_count()), jax.lax.axis_index("workers")
                selection = jax.tree.map(lambda x: x[mine], shares)
        loss, grads = loss_and_grad(params, selection, own)
        if pmap:
            loss, grads = jax.lax.psum((loss, grads), "workers")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = metrics_fn(Step(params, whole, loss, grads, updates, opt_state))
        return (optax.apply_updates(params, updates), opt_state), metrics

    def one_seed(state, batches, data, selection):
        carry = (state["params"], state["opt_state"])
        run = functools.partial(step, data, selection)
        (params, opt_state), metrics = jax.lax.scan(run, carry, batches)
        return {"params": params, "opt_state": opt_state}, metrics

    def epoch(state, batches, data, selection):
        one = lambda state, batches: one_seed(state, batches, data, selection)
        return program.over_seeds(one)(state, batches)

    if pmap:
        run = jax.pmap(epoch, axis_name="workers", in_axes=(None, None, None, 0), out_axes=None)
        selection = selection.split(jax.device_count())
    else:
        run = jax.jit(epoch, donate_argnums=0)
    return lambda state, batches, data: run(state, batches, data, selection)


def accuracy_fn(net):
    """`(params [seeds, ...], data) -> accuracy [seeds]`, jitted."""

    def one(params, data):
        images = lambda i: psjax.data.take(data["images"], i, data["scale"])
        return program.share_right(
            lambda i: net.apply({"params": params}, images(i)), data["labels"]
        )

    return jax.jit(lambda params, data: program.over_seeds(lambda p: one(p, data))(params))


def on_device(dataset: psjax.data.Dataset) -> dict[str, Any]:
    arrays = {"images": dataset.images, "labels": dataset.labels}
    return jax.device_put({**arrays, "scale": np.float32(dataset.scale)})


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
    net = make_model(config.dataset, train.num_classes, config.model, config.preset)
    optimizer = make_optimizer(config)
    example = np.zeros((1, *train.images.shape[1:]), np.float32)
    axes, like = (tree["params"] for tree in program.shapes_of(net, example))

    def start(seed):
        params = nn.unbox(net.init(jax.random.key(seed), example))["params"]
        return {"params": params, "opt_state": optimizer.init(params)}

    state = initial_states(start, range(config.first_seed, config.first_seed + config.seeds))
    loss_and_grad, selection = loss_and_grad_fn(config, net, axes, like, train.num_classes)
    args = config, net, optimizer, loss_and_grad, selection, train.num_classes
    epoch = epoch_fn(*args, make_metrics)
    batches = EpochBatches(config, train.labels, train.num_classes)
    return Program(net, state, epoch, accuracy_fn(net), batches, on_device(train), on_device(test))
