"""Theorems about what independent subnets are compared with: data parallelism, with dropout too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from tests import reference_ist as ref
from tests.over_devices import divided, over_devices
from tests.test_local import (
    AXES,
    OPTIMIZERS,
    J,
    N,
    as_lists,
    close,
    init,
    loss_fn,
    make_batches,
    moments_of,
    same_bits,
)

pytestmark = pytest.mark.usefixtures("x64")


def arguments(optimizer, n=N):
    params = init()
    return params, optimizer.init(params), psjax.replicas(params, n), make_batches(n=n)


@pytest.mark.parametrize(("name", "chunk_size"), [("sgd", None), ("momentum", 2), ("adam", N)])
def test_a_round_is_the_steps_of_the_mean_gradient_by_plain_loops(name, chunk_size):
    """Weights, moments and losses; twice, the second beginning with moments."""
    plain, optimizer = OPTIMIZERS[name]
    params, state, selection, _ = arguments(optimizer)
    expected = jax.tree.map(np.asarray, params)
    expected_state = ref.init_state(expected, plain)
    update = jax.jit(psjax.baselines.data_parallel(loss_fn, optimizer, chunk_size=chunk_size))
    for round in range(2):
        batches = make_batches(round)
        params, state, metrics = update(params, state, selection, batches)
        for j, step in enumerate(zip(*as_lists(batches))):
            expected, expected_state, losses = ref.data_parallel_step(
                expected, expected_state, list(step), plain, "tanh"
            )
            np.testing.assert_allclose(metrics.loss[:, j], np.full(N, np.mean(losses)), rtol=1e-12)
    close(params, expected, 1e-10)
    for field, moment in moments_of(state).items():
        close(moment, expected_state[field], 1e-10)
    assert metrics.finite.all()


def train(optimizer, params, state, batches):
    def step(carry, batch):
        params, state = carry
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    (params, state), loss = jax.lax.scan(step, (params, state), batches)
    return params, state, loss


@pytest.mark.parametrize("workers", ["one", "the same batches for all"])
def test_one_worker_and_workers_of_one_mind_are_plain_training(workers):
    _, optimizer = OPTIMIZERS["adam"]
    n = 1 if workers == "one" else N
    params, state, selection, batches = arguments(optimizer, n)
    own = jax.tree.map(lambda x: x[0], batches)
    if workers == "one":
        update = psjax.baselines.data_parallel(loss_fn, optimizer)
    else:
        update, batches = psjax.baselines.data_parallel(loss_fn, optimizer, in_axes=None), own
    new, new_state, metrics = jax.jit(update)(params, state, selection, batches)
    expected = jax.jit(functools.partial(train, optimizer))(params, state, own)
    close((new, new_state), expected[:2])
    close(metrics.loss, np.broadcast_to(expected[2], (n, J)))


@pytest.mark.parametrize(
    ("wrapper", "n"),
    [("pmap", 3), ("shard_map", 4), ("shard_map", 3), ("shard_map, check_vma=False", 3)],
)
def test_two_devices_are_one(wrapper, n):
    """They divide 4 workers, but not 3."""
    _, optimizer = OPTIMIZERS["momentum"]
    params, state, selection, batches = arguments(optimizer, n)
    expected = expected_of(n)
    inner = psjax.baselines.data_parallel(loss_fn, optimizer, axis_name="workers")
    devices = 2
    run = over_devices(inner, wrapper, devices)
    parts = selection.split(devices), divided(batches, devices)
    new, new_state, metrics = run(params, state, *parts)
    close((new, new_state), expected[:2])
    close(metrics.loss.reshape(-1, J)[:n], expected[2].loss)
    assert metrics.finite.all()


@functools.cache
def expected_of(n):
    _, optimizer = OPTIMIZERS["momentum"]
    update = jax.jit(psjax.baselines.data_parallel(loss_fn, optimizer))
    return jax.tree.map(np.asarray, update(*arguments(optimizer, n)))


def test_a_batch_that_is_not_finite_reaches_everybody():
    _, optimizer = OPTIMIZERS["sgd"]
    params, state, selection, batches = arguments(optimizer)
    bad = {**batches, "x": batches["x"].at[1, 0].set(jnp.nan)}
    update = jax.jit(psjax.baselines.data_parallel(loss_fn, optimizer))
    assert not update(params, state, selection, bad)[2].finite.any()


@pytest.mark.parametrize("baseline", ["local_sgd", "data_parallel"])
def test_a_selection_that_divides_something_is_refused(baseline):
    _, optimizer = OPTIMIZERS["sgd"]
    params, state, _, batches = arguments(optimizer)
    divided = psjax.select(AXES, {"h1": [[0], [1], [2]]}, like=params)
    update = getattr(psjax.baselines, baseline)(loss_fn, optimizer)
    message = rf"{baseline}: the selection divides \['h1'\].*psjax\.replicas\(params, n\)"
    with pytest.raises(ValueError, match=message):
        update(params, state, divided, batches)


@pytest.mark.parametrize(
    "change",
    [lambda x: x[:2], lambda x: x[:, :0], lambda x: x[0, 0, 0]],
    ids=["n", "J = 0", "rank"],
)
def test_other_batches_are_refused(change):
    _, optimizer = OPTIMIZERS["sgd"]
    params, state, selection, batches = arguments(optimizer)
    update = psjax.baselines.data_parallel(loss_fn, optimizer)
    with pytest.raises(ValueError, match=r"in_axes=0 they must all begin with \[3, J\], J >= 1"):
        update(params, state, selection, jax.tree.map(change, batches))


@pytest.mark.parametrize("in_axes", [1, P("h1"), (0, None)])
def test_other_in_axes_are_refused(in_axes):
    with pytest.raises(ValueError, match=r"data_parallel\(in_axes=.*\): pass 0 or None"):
        psjax.baselines.data_parallel(loss_fn, optax.sgd(0.1), in_axes=in_axes)


# ------------------------------------------------------------------------- dropout, section 6.1


def test_the_dropout_baseline_keeps_a_hidden_neuron_with_probability_one_over_n():
    """Hidden outputs 1 and the identity behind them: a score is n for a neuron kept, else 0."""
    n, width, samples = 4, 6, 20_000
    net = psjax.models.MLP(width, (width,), normalize=False, dropout=1 - 1 / n)
    params = {
        "SubnetDense_0": {"kernel_transposed": jnp.zeros((width, 2)), "bias": jnp.ones(width)},
        "SubnetDense_1": {"kernel": jnp.eye(width), "bias": jnp.zeros(width)},
    }
    x, key = jnp.zeros((samples, 2)), jax.random.key(0)
    scores = net.apply({"params": params}, x, train=True, rngs={"dropout": key})
    np.testing.assert_allclose(scores, np.where(scores > 0, n, 0), rtol=1e-12)
    error = np.sqrt(1 / n * (1 - 1 / n) / samples)  # of a proportion
    assert np.abs((scores > 0).mean(0) - 1 / n).max() < 5 * error
    np.testing.assert_array_equal(net.apply({"params": params}, x), 1)  # prediction drops nothing


def test_the_dropout_baseline_runs_with_its_keys_in_the_batches():
    net = psjax.models.MLP(3, (8,), dropout=1 - 1 / N)
    batches = {**make_batches(), "key": jax.random.split(jax.random.key(1), (N, J))}
    params = nn.unbox(jax.jit(net.init)(jax.random.key(0), batches["x"][0, 0]))["params"]

    def loss(params, batch):
        rngs = {"dropout": batch["key"]}
        scores = net.apply({"params": params}, batch["x"], train=True, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()

    optimizer = optax.sgd(0.1)
    update = jax.jit(psjax.baselines.data_parallel(loss, optimizer))
    start = params, optimizer.init(params), psjax.replicas(params, N)
    new, _, metrics = update(*start, batches)
    again, _, _ = update(*start, batches)
    other, _, _ = update(*start, {**batches, "key": batches["key"][::-1]})
    same_bits(new, again)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (new, other))))
    assert metrics.finite.all()
    first = jax.tree.map(lambda x: x[:, 0], batches)
    own = jax.jit(jax.vmap(functools.partial(loss, params)))(first)  # every worker its own neurons
    assert len(np.unique(own)) == N
    np.testing.assert_allclose(metrics.loss[:, 0], np.full(N, np.mean(own)), rtol=1e-10)
