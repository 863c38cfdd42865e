"""Every way to compute a training step is the same step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import psjax
from experiments.psl import training

C = 5
NET = psjax.models.PSNet(C, (4,), 2, (3,), (3, 2), (2, 1))
WAYS = {
    "elements": {"compute": "elements"},
    "tiles": {"compute": "elements", "tile": 2},
    "pairs": {"compute": "pairs"},
    "blocks": {"compute": "blocks", "block_size": 3},
    "blocks of all": {"compute": "blocks", "block_size": 5},
}


@functools.cache
def _problem(seed=0, batch=17):
    rng = np.random.default_rng(seed)
    images, labels = rng.uniform(size=(batch, 8, 8, 1)), rng.integers(0, C - 1, batch)  # one absent
    variables = jax.jit(NET.init)(jax.random.key(seed), images)
    axes = nn.get_partition_spec(jax.eval_shape(NET.init, jax.random.key(0), images))["params"]
    return images, labels, nn.unbox(variables)["params"], axes


def _batch(config, images, labels):
    if config.compute == "fused":
        index = psjax.data.batches(labels, len(labels))
    elif config.tile is None:
        index = psjax.data.batches_by_label(labels, C, len(labels))
    else:
        index = psjax.data.tiles_by_label(labels, C, len(labels), config.tile)
    rows = index.indices[0]
    # 1/L in double precision; the batches' own weights are float32.
    weight = (rows < len(labels)) / len(labels)
    batch = {
        "image": jnp.asarray(images).at[rows].get(mode="fill", fill_value=0),
        "weight": jnp.asarray(weight),
    }
    if config.compute == "fused":
        batch["label"] = jnp.asarray(labels)
    return batch, index.labels[0]


@functools.cache
def _gradient(config, devices=1):
    images, labels, params, axes = _problem()
    fn, selection = training.loss_and_grad_fn(config, NET, axes, params, C)
    batch, rows = _batch(config, images, labels)
    if config.tile is not None:
        selection = training.tile_selection(selection, jnp.asarray(rows), C)
    if devices > 1:
        mesh = jax.make_mesh((devices,), ("d",), (jax.sharding.AxisType.Auto,))
        fn = psjax.shard(fn, mesh)
    return jax.jit(fn)(params, selection, batch)


# The losses differ in the margin function alone: all ways with one, all losses with one way.
@pytest.mark.parametrize(
    ("way", "loss"),
    [*[(way, "psl") for way in WAYS], ("blocks", "psl-squared"), ("blocks", "one-vs-each")],
)
def test_every_way_gives_the_fused_gradient(x64, way, loss):
    value, grads = _gradient(training.Config(loss=loss, compute="fused"))
    got_value, got = _gradient(training.Config(loss=loss, **WAYS[way]))
    np.testing.assert_allclose(got_value, value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), got, grads)


@pytest.mark.parametrize("way", ["elements", "tiles", "blocks"])
def test_every_way_on_devices_that_do_not_divide_it(x64, way):
    config = training.Config(**WAYS[way])
    value, grads = _gradient(config)
    got_value, got = _gradient(config, devices=3)
    np.testing.assert_allclose(got_value, value, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), got, grads)


def test_blocks_are_cyclic_where_their_size_is_that_of_a_difference_cover():
    of = lambda size: training.make_plan(training.Config(compute="blocks", block_size=size), 10)
    assert (of(4).kind, of(4).num_turns, of(4).block_size) == ("cyclic", 10, 4)
    assert (of(6).kind, of(6).num_turns, of(6).block_size) == ("blocks", 6, 6)
    with pytest.raises(ValueError, match="block_size=3.*an even number"):
        of(3)


def _losses(config, epochs=1):
    program = training.build(config)
    state, out = program.state, []
    for epoch in range(epochs):
        state, metrics = program.epoch(state, program.batches(epoch), program.train)
        out.append(np.asarray(metrics["loss"]))
    return np.concatenate(out, axis=1), np.asarray(program.accuracy(state["params"], program.test))


BASE = training.Config(batch_size=300, seeds=2, epochs=2)


def test_all_executors_train_alike():
    """Two seeds, five steps, eight virtual devices: losses of fused and of elements on devices."""
    want, accuracy = _losses(dataclasses.replace(BASE, compute="fused"))
    assert want.shape == (2, 5)
    assert not np.allclose(want[0], want[1])  # the seeds differ
    for change in (
        {"compute": "elements", "devices": "pmap"},
        {"compute": "blocks", "devices": "shard_map"},
        {"compute": "elements", "tile": 8, "devices": "pmap"},
    ):
        got, got_accuracy = _losses(dataclasses.replace(BASE, **change))
        # float32 sums in another order, through five Adam steps, which divide by small moments.
        np.testing.assert_allclose(got, want, rtol=2e-3, err_msg=str(change))
        assert np.abs(got_accuracy - accuracy).max() < 0.02


def test_orders_are_made_from_seed_and_epoch_alone():
    labels = psjax.data.load("digits").labels
    for order in ("shuffled", "stratified"):
        config = training.Config(order=order)
        one = training.epoch_order(config, labels, 10, seed=1, epoch=2)
        again = training.epoch_order(config, labels, 10, seed=1, epoch=2)
        np.testing.assert_array_equal(one, again)
        other = training.epoch_order(config, labels, 10, seed=1, epoch=3)
        assert not np.array_equal(one, other)
    assert training.epoch_order(training.Config(order="dataset"), labels, 10, 0, 0) is None
    fixed = lambda seed, epoch: training.epoch_order(
        training.Config(order="fixed"), labels, 10, seed, epoch
    )
    np.testing.assert_array_equal(fixed(1, 2), fixed(1, 3))
    assert sorted(fixed(1, 2)) == list(range(len(labels)))
    assert not np.array_equal(fixed(1, 2), fixed(2, 2))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"loss": "psl-sqared"}, "--loss psl-sqared: write one of.*Did you mean 'psl-squared'"),
        ({"model": "resnet"}, "--model resnet: write one of psnet, lenet.*Did you mean 'psnet'"),
        ({"compute": "element"}, "Did you mean 'elements'"),
        ({"loss": "nll"}, "--loss nll --compute elements: it has no pair elements"),
        ({"compute": "fused", "devices": "pmap"}, "the fused loss is one element"),
        ({"compute": "pairs", "tile": 4}, "--tile 4 --compute pairs"),
        ({"loss": "one-vs-each", "margin_bound": 4.0}, "this loss has no bound"),
        ({"epochs": 0}, "--epochs 0: write 1 or more"),
    ],
)
def test_bad_input_is_named(change, match):
    with pytest.raises(ValueError, match=match):
        training.Config(**change)
