"""Rounds between workers that hold the weights in shards: the same numbers, the bytes as said."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from psjax import cost
from tests.over_devices import over_owners

N0, CLASSES, BATCH, STEPS = 6, 5, 4, 3
AXES = {
    "in": P("h1", None),
    "scale": P("h1"),
    "between": P("h1", "h2"),
    "out": P("h2", None),
    "bias": P(),
}
OPTIMIZERS = {0: optax.sgd(0.1), 1: optax.sgd(0.1, momentum=0.9), 2: optax.adam(0.05)}
ADAM_ENTRY = optax.chain(psjax.ist.scale_by_adam(), optax.scale_by_learning_rate(0.05))


def init(h1, h2, dtype):
    shapes = {
        "in": (h1, N0),
        "scale": (h1,),
        "between": (h1, h2),
        "out": (h2, CLASSES),
        "bias": (CLASSES,),
    }
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s) / 2, dtype) for name, s in shapes.items()}


def loss_fn(w, batch):
    x = jnp.tanh(batch["x"] @ w["in"].T) * w["scale"]
    scores = jnp.tanh(x @ w["between"]) @ w["out"] + w["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


def make_batches(n, dtype, rounds=1):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(rounds, n, STEPS, BATCH, N0)), dtype)
    return {"x": x, "y": jnp.asarray(rng.integers(0, CLASSES, x.shape[:-1]))}


def sharded_round(n, sizes, optimizer, like):
    """A jitted round over n devices, and the shardings of its parameters and state."""
    mesh = jax.make_mesh((n,), ("w",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    state = psjax.ist.state_axes(optimizer, AXES, like)
    specs = tuple(psjax.ist.store_specs(axes, sizes, "w") for axes in (AXES, state))
    body = psjax.ist.exchange(psjax.local_update(loss_fn, optimizer), "w")

    round = over_owners(body, mesh, specs, AXES, sizes)

    return round, jax.tree.map(lambda s: NamedSharding(mesh, s), specs)


def close(a, b):
    check = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    jax.tree.map(lambda x, y: check(np.asarray(x), np.asarray(y)), a, b)


def three_rounds(n, h1, h2, optimizer):
    """Between n workers, held against one device's; the state after them."""
    sizes = {"h1": h1, "h2": h2}
    params, batches = init(h1, h2, float), make_batches(n, float, rounds=3)
    state = optimizer.init(params)
    round, shardings = sharded_round(n, sizes, optimizer, params)
    sharded, sharded_state = jax.device_put((params, state), shardings)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    for number in range(3):
        own = jax.tree.map(lambda x, r=number: x[r], batches)
        selection = psjax.ist.membership(0, number, AXES, sizes, n, stratified=True)
        params, state, metrics = update(params, state, selection, own)
        sharded, sharded_state, other = round(sharded, sharded_state, number, own)
        np.testing.assert_allclose(other.loss, metrics.loss, rtol=1e-12)
    close((sharded, sharded_state), (params, state))
    assert round._cache_size() == 1
    return sharded_state


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("n", "h1", "h2", "moments"), [(2, 8, 4, 0), (4, 16, 32, 1), (8, 64, 64, 2)]
)
def test_the_rounds_are_those_of_one_device_that_holds_everything(n, h1, h2, moments):
    three_rounds(n, h1, h2, OPTIMIZERS[moments])


@pytest.mark.usefixtures("x64")
def test_counts_of_every_entry_s_steps_travel_with_the_weights():
    """Integers; an entry between two divided layers is held in one round of n."""
    counts = three_rounds(2, 8, 4, ADAM_ENTRY)[0].count
    assert {str(x.dtype) for x in counts.values()} == {"int32"}
    for name in ("in", "scale", "out", "bias"):
        np.testing.assert_array_equal(counts[name], 3 * STEPS)
    assert set(np.unique(counts["between"])) == {0, STEPS, 2 * STEPS, 3 * STEPS}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["muon", "partition"])
def test_constants_and_states_of_some_leaves_travel(name):
    optimizer = {
        "muon": optax.contrib.muon(0.05),
        "partition": optax.partition(
            {1: optax.adam(0.05), 2: optax.sgd(0.1, momentum=0.9)},
            lambda params: jax.tree.map(jnp.ndim, params),
        ),
    }[name]
    three_rounds(2, 8, 4, optimizer)


def test_a_shared_weight_in_float16_is_averaged_in_float32():
    """The sum over four workers of 30000 is past float16; the classes' common shift is no loss."""
    sizes, optimizer = {"h1": 16, "h2": 16}, optax.sgd(0.0)
    params = init(16, 16, jnp.float16)
    params["bias"] = jnp.full(CLASSES, 30000.0, jnp.float16)
    round, shardings = sharded_round(4, sizes, optimizer, params)
    batches = jax.tree.map(lambda x: x[0], make_batches(4, jnp.float16))
    state = optimizer.init(params)
    new, _, metrics = round(*jax.device_put((params, state), shardings), 0, batches)
    assert metrics.finite.all()
    np.testing.assert_array_equal(new["bias"], params["bias"])


def test_an_update_without_an_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"exchange\(update=.*pass psjax.local_update"):
        psjax.ist.exchange(lambda *args: args, "w")


@pytest.mark.parametrize(("n", "moments"), [(2, 0), (4, 0), (8, 0), (2, 2), (4, 1), (8, 2)])
def test_a_round_sends_and_computes_what_the_formula_says(n, moments):
    """Exactly, for widths that n * n divides; and a worker holds its share of the weights alone."""
    sizes, optimizer = {"h1": 64, "h2": 128}, OPTIMIZERS[moments]
    params, batches = init(64, 128, jnp.float32), make_batches(n, jnp.float32)
    round, shardings = sharded_round(n, sizes, optimizer, params)
    arguments = jax.device_put((params, optimizer.init(params)), shardings)
    lowered = round.lower(*arguments, 0, jax.tree.map(lambda x: x[0], batches))
    ledger = cost.ledger(lowered.compile())
    formula = cost.independent_subnets(
        (N0, 64, 128, CLASSES), BATCH, n, STEPS, moments=moments, split_vectors=64, shared=CLASSES
    )
    assert ledger.bytes == pytest.approx(4 * STEPS * formula.floats, abs=0)
    assert n * ledger.flops == STEPS * formula.flops
    own = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(arguments))
    split = 4 * (1 + moments) * (64 * N0 + 64 + 64 * 128 + 128 * CLASSES) // n
    assert own == split + 4 * (1 + moments) * CLASSES + (4 if moments == 2 else 0)
    number, batch = 4, 4 * STEPS * BATCH * (N0 + 1)  # of the round; a worker's samples and labels
    assert ledger.memory.argument == own + number + batch


@pytest.mark.usefixtures("x64")
def test_a_worker_whose_subnet_becomes_nan_gives_back_what_it_fetched():
    n, sizes, optimizer = 2, {"h1": 8, "h2": 4}, OPTIMIZERS[2]
    params, batches = init(8, 4, float), jax.tree.map(lambda x: x[0], make_batches(2, float))
    batches["x"] = batches["x"].at[1, 1].set(jnp.nan)
    state = optimizer.init(params)
    round, shardings = sharded_round(n, sizes, optimizer, params)
    new, new_state, metrics = round(*jax.device_put((params, state), shardings), 0, batches)
    selection = psjax.ist.membership(0, 0, AXES, sizes, n, stratified=True)
    expected = psjax.local_update(loss_fn, optimizer)(params, state, selection, batches)
    assert metrics.finite.tolist() == [True, False]
    close((new, new_state), expected[:2])


SIZES = {"h1": 16, "h2": 16}
SPECS = psjax.ist.store_specs(AXES, SIZES, "w")


def refused(draw, specs):
    """A round between two workers with another selection, or with other shards."""
    optimizer = OPTIMIZERS[0]
    params = init(SIZES["h1"], SIZES["h2"], jnp.float32)
    selection = psjax.ist.membership(0, 0, AXES, SIZES, **draw)
    mesh = jax.make_mesh((2,), ("w",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    body = psjax.ist.exchange(psjax.local_update(loss_fn, optimizer), "w")
    round = jax.shard_map(
        body, mesh=mesh, in_specs=(specs, P(), P(), P("w")), out_specs=(specs, P(), P("w"))
    )
    batches = jax.tree.map(lambda x: x[0], make_batches(2, jnp.float32))
    round(params, optimizer.init(params), selection, batches)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (dict(num_subnets=4, stratified=True), "has 4 elements.*sizes, 2, stratified=True"),
        (dict(num_subnets=2), "stratified partition"),
    ],
)
def test_a_selection_that_is_no_stratified_partition_among_the_workers_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        refused(draw, SPECS)


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"in": P()}, r"\['in'\] has shape \(16, 6\) .* dimension 0, 'h1', must be 8;"),
        ({"between": P(None, "w")}, r"\['between'\] has shape \(16, 8\) .* 0, 'h1', must be 8"),
    ],
)
def test_shards_of_another_layout_are_refused(specs, message):
    with pytest.raises(ValueError, match="exchange: " + message):
        refused(dict(num_subnets=2, stratified=True), SPECS | specs)
