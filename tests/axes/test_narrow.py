"""The narrower function: derivatives, transformations, cost, and what users do with it."""

import functools
import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from tests.axes.registry import CASES

AXES = {"in": P(None, "hidden"), "bias": P("hidden"), "out": P("hidden")}


def weights(hidden=6, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    return {"in": draw(4, hidden), "bias": draw(hidden), "out": draw(hidden, 3)}


def network(activation):
    return lambda w, x: activation(x @ w["in"] + w["bias"]) @ w["out"]


@jax.custom_vjp
def straight_through(x):
    return jnp.round(x)


straight_through.defvjp(lambda x: (jnp.round(x), ()), lambda _, g: (2 * g,))


@jax.custom_vjp
def kept_for_later(x):
    return jnp.sin(x)


kept_for_later.defvjp(
    lambda x: (jnp.sin(x), (x, jnp.cos(x))), lambda kept, g: (g * kept[1] * kept[0],)
)


@jax.custom_jvp
def odd_slope(x):
    return x * x


@odd_slope.defjvp
def _odd_slope_jvp(primals, tangents):
    return odd_slope(*primals), 5.0 * primals[0] ** 3 * tangents[0]


ACTIVATIONS = {
    "relu": nn.relu,
    "relu6": nn.relu6,
    "silu": nn.silu,
    "gelu": nn.gelu,
    "softplus": nn.softplus,
    "custom_vjp": straight_through,
    "custom_vjp with residuals": kept_for_later,
    "custom_jvp": odd_slope,
    "remat": jax.checkpoint(jnp.tanh),
    "jit": jax.jit(jnp.tanh),
}


def parts(apply, w, x, rows):
    selection = psjax.select(AXES, {"hidden": [rows]}, like=w)
    part = jax.tree.map(lambda y: y[0], selection.gather(w))
    zeroed = selection.scatter_add(selection.gather(w), w)
    small = psjax.narrow(apply, AXES, {"hidden": len(rows)}, like=w)
    back = lambda grads: jax.tree.map(lambda y: y[0], selection.gather(grads))
    return small, part, zeroed, back


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_own_derivatives_are_kept_at_kinks_too(name):
    """Half of the layer's numbers are exactly 0 before the activation."""
    apply, w = network(ACTIVATIONS[name]), weights()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)))
    x = x.at[:3].set(0)
    w["bias"] = w["bias"].at[::2].set(0)
    small, part, zeroed, back = parts(apply, w, x, [0, 2, 5])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14)
    close(small(part, x), apply(zeroed, x))
    loss = lambda fn: lambda w: jnp.sum(jnp.sin(fn(w, x)))
    jax.tree.map(close, jax.grad(loss(small))(part), back(jax.grad(loss(apply))(zeroed)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["relu", "gelu", "softplus", "custom_jvp"])
def test_second_derivatives(name):
    apply, w = network(ACTIVATIONS[name]), weights()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)))
    small, part, zeroed, _ = parts(apply, w, x, [1, 3])
    selection = psjax.select(AXES, {"hidden": [[1, 3]]}, like=w)
    loss = lambda fn: lambda w: jnp.sum(jnp.sin(fn(w, x)))
    product = lambda fn, w, v: jax.jvp(jax.grad(loss(fn)), (w,), (v,))[1]
    v = jax.tree.map(jnp.cos, part)
    whole_v = selection.scatter_add(jax.tree.map(lambda y: y[None], v), w)
    want = jax.tree.map(lambda y: y[0], selection.gather(product(apply, zeroed, whole_v)))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    jax.tree.map(close, product(small, part, v), want)


@pytest.mark.usefixtures("x64")
def test_it_is_a_function_for_every_transformation():
    apply, w = network(nn.relu), weights()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)))
    small, part, zeroed, _ = parts(apply, w, x, [0, 4])
    want = apply(zeroed, x)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12)
    close(jax.jit(small)(part, x), want)
    close(jax.vmap(lambda row: small(part, row[None])[0])(x), want)
    close(jax.lax.map(lambda row: small(part, row[None])[0], x), want)
    close(jax.checkpoint(small)(part, x), want)
    close(jax.pmap(small, in_axes=(None, 0))(part, x.reshape(8, 1, 4)).reshape(8, 3), want)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(small, mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    close(jax.jit(mapped)(part, x), want)
    explicit = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(explicit):
        own = jax.device_put(x, jax.NamedSharding(explicit, P("d")))
        close(jax.device_get(jax.jit(small)(part, own)), want)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["relu", "custom_jvp", "custom_vjp with residuals"])
def test_own_derivatives_inside_a_shard_map_that_checks_what_varies(name):
    apply, w = network(ACTIVATIONS[name]), weights()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 4)))
    small, part, zeroed, back = parts(apply, w, x, [0, 4])
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    sum_of = lambda fn: lambda w, x: jnp.sum(fn(w, x) ** 2)
    grads = lambda w, x: jax.grad(sum_of(small))(w, x)
    mapped = jax.jit(jax.shard_map(grads, mesh=mesh, in_specs=(P(), P("d")), out_specs=P()))
    want = back(jax.grad(sum_of(apply))(zeroed, x))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    jax.tree.map(close, mapped(part, x), want)


class CNN(nn.Module):
    """Nothing in it says which axes belong together."""

    conv: int = 6
    hidden: int = 10
    classes: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(self.conv, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(self.classes)(x)


def image_problem(dtype=np.float64):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(12, 6, 6, 2)), dtype)
    params = jax.tree.map(lambda y: y.astype(dtype), CNN().init(jax.random.key(0), x))
    return x, np.arange(12) % 4, params


@pytest.mark.usefixtures("x64")
def test_elements_of_a_network_without_annotations_are_the_fused_gradient():
    x, labels, params = image_problem()
    axes = psjax.infer_axes(CNN().apply, params, x)
    two = psjax.narrow(CNN().apply, axes, {"output_0": 2})
    pairs = psjax.ordered_pairs(4)
    index = {"output_0": pairs, "label": pairs[:, 0]}
    selection = psjax.select(axes, index, like=params, sizes={"label": 4})
    h = lambda w, batch: psjax.losses.pair(two(w, batch["x"]), batch["weight"])
    batch = {"x": x.reshape(3, 4, 6, 6, 2).swapaxes(0, 1), "weight": jnp.full((4, 3), 1 / 12)}
    value, grads = jax.jit(psjax.value_and_grad(h, in_axes=P("label")))(params, selection, batch)

    def fused(params):
        scores = CNN().apply(params, x)
        return psjax.losses.psl_with_integer_labels(scores, jnp.asarray(labels)).mean()

    want, whole = jax.value_and_grad(fused)(params)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)
    jax.tree.map(close, grads, whole)


@pytest.mark.usefixtures("x64")
def test_a_round_of_subnets_is_that_of_a_narrower_module():
    x, labels, params = image_problem()
    axes = psjax.infer_axes(CNN().apply, params, x)
    sizes = {name: n // 2 for name, n in axes.divisible.items()}
    assert list(sizes.values()) == [3, 5]
    small = psjax.narrow(CNN().apply, axes, sizes)
    by_hand = CNN(conv=3, hidden=5)
    optimizer, rounds = optax.adam(1e-2), []
    for fn in (small, by_hand.apply):
        loss = lambda w, b, fn=fn: optax.softmax_cross_entropy_with_integer_labels(
            fn(w, b[0]), b[1]
        )
        update = psjax.local_update(lambda w, b, loss=loss: loss(w, b).mean(), optimizer)
        selection = psjax.ist.membership(0, 1, axes, axes.divisible, 2, like=params)
        batches = (jnp.stack([x.reshape(2, 6, 6, 6, 2)] * 2), labels.reshape(1, 2, 6).repeat(2, 0))
        rounds.append(update(params, optimizer.init(params), selection, batches)[0])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12)
    jax.tree.map(close, *rounds)


@pytest.mark.parametrize("sizes", [{"hidden_0": 3, "hidden_1": 5}, {"hidden_1": 2}])
def test_it_costs_what_a_narrower_module_costs(sizes):
    x, _, params = image_problem(np.float32)
    axes = psjax.infer_axes(CNN().apply, params, x)
    small = psjax.narrow(CNN().apply, axes, sizes)
    by_hand = CNN(conv=sizes.get("hidden_0", 6), hidden=sizes["hidden_1"])
    part = jax.eval_shape(by_hand.init, jax.random.key(0), x)

    def flops(fn):
        loss = lambda w, x: jnp.sum(fn(w, x) ** 2)
        compiled = jax.jit(jax.value_and_grad(loss)).lower(part, x).compile()
        return compiled.cost_analysis()["flops"]

    assert 0.99 < flops(small) / flops(by_hand.apply) < 1.01


def test_a_gpt_of_twelve_layers_is_traced_in_three_seconds():
    apply, params, inputs = CASES["gpt-12-layers"].make()
    gc.freeze()  # the collector would otherwise go through all that earlier tests have made
    start = time.process_time()
    axes = psjax.infer_axes(apply, params, *inputs)
    small = psjax.narrow(apply, axes, {name: -(-n // 2) for name, n in axes.divisible.items()})
    shapes = jax.eval_shape(lambda w: _first_half(axes, w), params)
    jax.make_jaxpr(small)(shapes, *inputs)
    seconds = time.process_time() - start
    gc.unfreeze()
    assert seconds < 3


def _first_half(axes, params):
    rows = {name: np.arange(-(-n // 2))[None] for name, n in axes.divisible.items()}
    return jax.tree.map(lambda x: x[0], psjax.select(axes, rows, like=params).gather(params))


def test_batches_of_any_size_and_dropout_of_the_narrower_shape():
    apply, params, (x,) = CASES["mlp-gelu-dropout"].make()
    axes = psjax.infer_axes(apply, params, x)
    small, part = _half(apply, axes, params)
    assert small(part, jnp.concatenate([x, x])).shape[0] == 2 * x.shape[0]


def _half(apply, axes, params):
    sizes = {name: -(-n // 2) for name, n in axes.divisible.items()}
    return psjax.narrow(apply, axes, sizes), _first_half(axes, params)


@pytest.mark.parametrize(
    ("axes", "sizes", "message"),
    [
        (AXES, {"hiden": 2}, r"no parameter has an axis 'hiden'; the nearest is 'hidden'"),
        (AXES, {"hidden": 9}, r"axis 'hidden' has 6 rows, not 9"),
        (AXES, {"hidden": 0}, r"1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused_at_once(axes, sizes, message):
    with pytest.raises(ValueError, match=message):
        psjax.narrow(network(nn.relu), axes, sizes, like=weights())


def test_what_cannot_be_narrowed_says_why_at_the_call():
    w, x = weights(), jnp.ones((2, 4))
    part = {"in": jnp.ones((4, 3)), "bias": jnp.ones(3), "out": jnp.ones((3, 3))}
    ordered = lambda w, x: jnp.cumsum(x @ w["in"] + w["bias"], axis=1) @ w["out"]
    narrow = functools.partial(psjax.narrow, axes=AXES, sizes={"hidden": 3}, like=w)
    with pytest.raises(ValueError, match=r"narrower: it is accumulated in order \(cumsum"):
        narrow(ordered)(part, x)
    with pytest.raises(ValueError, match=r"\['bias'\] has shape \(6,\); with .* it has \(3,\)"):
        narrow(network(nn.relu))({**part, "bias": w["bias"]}, x)
    inputs = {"in": P("pixels"), "bias": P(), "out": P()}
    small = psjax.narrow(network(nn.relu), inputs, {"pixels": 2}, like=w)
    with pytest.raises(ValueError, match=r"cannot be narrower: the inputs have it too"):
        small({**w, "in": jnp.ones((2, 6))}, x)
    with pytest.raises(ValueError, match=r"pass the whole parameters, or their shapes, as like="):
        psjax.narrow(network(nn.relu), AXES, {"hidden": 3})
