"""Under any mesh that is set, every model is what it is without one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType

import psjax

B = 4
MODELS = {
    "psnet": psjax.models.PSNet(3, (4,), 2, (5, 3), (3, 2), (2, 1)),
    "lenet": psjax.models.LeNet(3, (2, 4), (6, 5), (3, 2), (2, 1)),
    "mlp": psjax.models.MLP(3, (12, 11), dropout=0.5),
    "vgg11": psjax.models.VGG11(3, (4, 0, 5, 0), (6,), implementation="native"),
    "sparse": psjax.models.SparseMLP(7, 13, (12,), chunk_size=3),
    "separable": nn.Sequential(
        [
            functools.partial(psjax.nn.split_groups, num_groups=2),
            psjax.nn.SeparableConv(2, 3, (3, 3), 2),
            psjax.nn.flatten_groups,
            psjax.nn.SeparableDense(2, 1),
        ]
    ),
}


def _mesh(number, kind, name="data"):
    return jax.make_mesh((number,), (name,), (kind,), devices=jax.devices()[:number])


MESHES = {
    "one device, auto": (1, AxisType.Auto),
    "one device, explicit": (1, AxisType.Explicit, "class"),  # named as one of the models' axes
    "eight, auto": (8, AxisType.Auto),
    "eight, explicit": (8, AxisType.Explicit),
}


def _run(name, around):
    """Initial variables, scores, and the gradient of a loss; all the model's functions around."""
    net, key = MODELS[name], jax.random.key(0)
    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=(B, 8, 8, 2)), jnp.float32)]
    if name == "sparse":
        args = [jnp.asarray(rng.integers(0, 14, (B, 3))), jnp.asarray(rng.normal(size=(B, 3)))]
    divided = isinstance(net, psjax.models.MLP | psjax.models.VGG11 | psjax.models.SparseMLP)
    options = {"train": True} if divided else {}
    boxed = around(functools.partial(net.init, **options))({"params": key, "dropout": key}, *args)
    variables = nn.unbox(boxed)

    def loss(params, *args):
        whole = {**variables, "params": params}
        if name == "sparse":
            labels = jnp.array([[0, 7], [6, 3], [2, 7], [5, 1]])
            return net.apply(whole, *args, labels, method="loss").mean()
        scores = net.apply(whole, *args, **options, rngs={"dropout": key})
        return jnp.mean(jnp.sin(scores))

    out = {"scores": around(net.apply)(variables, *args), "variables": variables}
    out["gradient"] = around(jax.value_and_grad(loss))(variables["params"], *args)
    if name == "sparse":
        best = lambda *x: net.apply(*x, 2, method="top_k")
        out["best"] = around(best)(variables, *args)
    return out, nn.get_partition_spec(boxed)


@functools.cache
def _without_a_mesh(name):
    return _run(name, jax.jit)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_under_a_mesh_is_the_model_without_one(name, mesh):
    """`init`, `apply` and the gradient; the axes that `nn.get_partition_spec` returns too."""
    want, axes = _without_a_mesh(name)
    with jax.set_mesh(_mesh(*MESHES[mesh])):
        got, own_axes = _run(name, jax.jit)
        assert own_axes == axes
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_under_a_mesh_runs_outside_jit(name):
    want, _ = _without_a_mesh(name)
    with jax.set_mesh(_mesh(8, AxisType.Explicit)):
        got, _ = _run(name, lambda fn: fn)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["psnet", "lenet", "vgg11"])
def test_a_batch_may_be_sharded_over_the_mesh(name, kind):
    net = MODELS[name]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 8, 8, 2)), jnp.float32)
    labels = jnp.arange(8) % 3
    options = {"train": True} if name == "vgg11" else {}
    params = nn.unbox(jax.jit(net.init)(jax.random.key(0), x))["params"]

    def loss(params, x, labels):
        scores = net.apply({"params": params}, x, **options)
        return psjax.losses.psl_with_integer_labels(scores, labels).mean()

    want = jax.jit(jax.value_and_grad(loss))(params, x, labels)
    mesh = _mesh(8, kind)
    with jax.set_mesh(mesh):
        over_data = jax.NamedSharding(mesh, jax.P("data"))
        x, labels = (jax.device_put(y, over_data) for y in (x, labels))
        got = jax.jit(jax.value_and_grad(loss))(params, x, labels)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax.device_get(got), jax.device_get(want))
