"""Many devices compute what one does: `shard`, `pmap`, and a user's own step."""

import contextlib
import functools
import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from psjax import losses
from tests.test_separable import ARGS, IN_AXES, PARAMS, assert_close, element, expected, make

pytestmark = pytest.mark.usefixtures("x64")


def mesh(n=8):
    return Mesh(np.array(jax.devices()[:n]), "workers")


# --------------------------------------------------------------------------------- the executors


@pytest.mark.parametrize("n", [1, 3, 8])
def test_shard_equals_one_device(n, strict):
    """E = 5, which neither 3 nor 8 divides; every kind of argument and a shared leaf."""
    fn = jax.jit(psjax.shard(psjax.value_and_grad(element, IN_AXES), mesh(n), IN_AXES))
    assert_close(fn(PARAMS, make(), *ARGS), expected("overlap"))


@pytest.mark.parametrize("n", [1, 3, None])
def test_pmap_equals_one_device(n, strict):
    devices = None if n is None else jax.devices()[:n]
    fn = psjax.pmap(psjax.value_and_grad(element, IN_AXES), devices, IN_AXES)
    assert_close(fn(PARAMS, make(), *ARGS), expected("overlap"))


@pytest.mark.parametrize("kind", ["row dropped", "replicas"])
def test_shard_equals_one_device_for_other_selections(kind, strict):
    fn = jax.jit(psjax.shard(psjax.value_and_grad(element, IN_AXES), mesh(3), IN_AXES))
    assert_close(fn(PARAMS, make(kind), *ARGS), expected(kind))


def test_the_mesh_may_be_of_jax_make_mesh(strict):
    """Its axes are of type Explicit by default, which `P()` of a user's arrays does not fit."""
    fn = psjax.shard(
        psjax.value_and_grad(element, IN_AXES), jax.make_mesh((8,), ("workers",)), IN_AXES
    )
    assert_close(jax.jit(fn)(PARAMS, make(), *ARGS), expected("overlap"))


@pytest.mark.parametrize("execute", ["shard", "pmap"])
def test_the_gradient_of_a_spread_scalar_is_the_gradient(execute, strict):
    f = psjax.partially_separable(element, IN_AXES)
    if execute == "shard":
        spread = psjax.shard(f, mesh(), IN_AXES)
    else:
        spread = psjax.pmap(f, in_axes=IN_AXES)
    params = jax.tree.map(jnp.asarray, PARAMS)
    fn = jax.value_and_grad(lambda w: spread(w, make(), *ARGS))
    got = (jax.jit(fn) if execute == "shard" else fn)(params)
    assert_close(got, expected("overlap"))


@pytest.mark.parametrize("execute", ["shard", "pmap"])
def test_random_keys_go_with_their_elements(execute, strict):
    keys, w = jax.random.split(jax.random.key(0), 3), jnp.arange(4.0)
    selection = psjax.select(P("i"), {"i": [[0, 1], [1, 2], [2, 3]]}, like=w)
    fn = psjax.value_and_grad(lambda u, key: jnp.sum(u**2 * jax.random.normal(key, (2,))), 0)
    spread = jax.jit(psjax.shard(fn, mesh(), 0)) if execute == "shard" else psjax.pmap(fn, None, 0)
    assert_close(spread(w, selection, keys), jax.jit(fn)(w, selection, keys))


@pytest.mark.parametrize("execute", ["shard", "pmap"])
def test_new_index_sets_trace_nothing_again(execute):
    traces = []

    def counted(u):
        traces.append(1)
        return jnp.sum(u**2)

    w, fn = jnp.arange(6.0), psjax.value_and_grad(counted)
    spread = jax.jit(psjax.shard(fn, mesh())) if execute == "shard" else psjax.pmap(fn)
    for seed in range(3):
        index = np.random.default_rng(seed).permutation(6).reshape(3, 2)
        value, grads = spread(w, psjax.select(P("i"), {"i": index}, like=w))
        assert value == 55
        np.testing.assert_array_equal(grads, 2 * w)
    assert len(traces) == 2  # the check of its value's shape, and the program


@pytest.mark.parametrize("execute", ["shard", "pmap"])
def test_arguments_mapped_with_0_have_a_row_for_each_element(execute):
    fn = psjax.value_and_grad(lambda u, a: jnp.sum(u) * a["b"], 0)
    where = mesh() if execute == "shard" else None
    spread = getattr(psjax, execute)(fn, where, 0)
    w, selection = jnp.ones(3), psjax.replicas(jnp.ones(3), 10)
    message = rf"{execute}: argument 0\['b'\] has shape \(9,\); .* must be the 10 elements"
    with pytest.raises(ValueError, match=message):
        spread(w, selection, {"b": np.ones(9)})
    with pytest.raises(ValueError, match=rf"{execute}: argument 0\['b'\] has shape \(\)"):
        spread(w, selection, {"b": 1.0})
    with pytest.raises(ValueError, match=rf"{execute}: in_axes has 2 entries for 1 arguments"):
        getattr(psjax, execute)(fn, where, (0, None))(w, selection, {"b": np.ones(10)})


MESHES = {
    "one device": ((1,), ("workers",), None),
    "eight devices": ((8,), ("workers",), None),
    "one of two axes": ((2, 4), ("workers", "model"), "workers"),
    "both axes": ((2, 4), ("workers", "model"), ("model", "workers")),
}


@pytest.mark.parametrize("context", [False, True], ids=["no context", "set_mesh"])
@pytest.mark.parametrize("types", ["Auto", "Explicit", "mixed"])
@pytest.mark.parametrize("kind", MESHES)
def test_shard_takes_any_mesh_and_parameters_and_batches_laid_out_over_it(kind, types, context):
    """A whole step on sharded weights and batches is that of one device."""
    shape, names, axis_name = MESHES[kind]
    each = [AxisType.Auto if types == "Auto" else AxisType.Explicit] * len(names)
    if types == "mixed":
        each[0] = AxisType.Auto
    where = jax.make_mesh(
        shape, names, axis_types=tuple(each), devices=jax.devices()[: math.prod(shape)]
    )
    w = {"own": jnp.arange(24.0).reshape(8, 3), "shared": jnp.ones(8)}
    batch, pairs = jnp.arange(16.0).reshape(8, 2), psjax.ordered_pairs(8)[:11]
    own = jnp.arange(11.0)
    like = jax.tree.map(np.asarray, w)
    axes = {"own": P("i"), "shared": P()}
    indices = {"i": pairs, "label": pairs[:, 0]}
    selection = psjax.select(axes, indices, like=like, sizes={"label": 8})

    def h(u, x, weight):
        return weight * jnp.sum(jnp.sin(u["own"]) * x[0]) + jnp.sum(u["shared"] ** 2) * x[1]

    in_axes = (P("label"), 0)
    fn = psjax.value_and_grad(h, in_axes=in_axes)
    expected = jax.jit(fn)(w, selection, batch, own)

    def step(spread, w, selection, *args):
        value, grads = spread(w, selection, *args)
        return value, grads, jax.tree.map(jnp.subtract, w, grads)

    with jax.set_mesh(where) if context else contextlib.nullcontext():
        over = NamedSharding(where, P(names[-1]))
        sharded = jax.tree.map(lambda x: jax.device_put(x, over), (w, batch))
        spread = psjax.shard(fn, where, in_axes, axis_name=axis_name)
        for params, x in ((w, batch), sharded):
            run = jax.jit(functools.partial(step, spread))
            value, grads, new = run(params, selection, x, own)
            close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
            jax.tree.map(close, (value, grads), expected)
            jax.tree.map(close, new, jax.tree.map(jnp.subtract, like, expected[1]))


def test_shard_wants_axes_of_its_mesh_and_the_mesh_of_the_context():
    two = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    fn = psjax.value_and_grad(element)
    for name in (None, "c", ("a", "c"), ()):
        with pytest.raises(
            ValueError, match=r"^shard\(fn, mesh, axis_name=.*axes \('a', 'b'\); pas"
        ):
            psjax.shard(fn, two, axis_name=name)
    w = jnp.ones(3)
    with (
        jax.set_mesh(two),
        pytest.raises(ValueError, match=r"mesh is {'workers': 8}, .* {'a': 2, "),
    ):
        psjax.shard(fn, mesh())(w, psjax.replicas(w, 2))


# ------------------------------------------------------------- a training step of a Flax network

LABELS = np.array([0, 2, 1, 0, 2, 2, 1])
SLOTS = 3


@functools.cache
def network():
    """A small PSNet, its parameters, batch by label and whole gradient in float64."""
    net = psjax.models.PSNet(3, (4,), 2, (3,), kernel_sizes=(3, 2), pools=(2, 1))
    rng = np.random.default_rng(0)
    images = rng.normal(size=(len(LABELS), 8, 8, 1))
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    axes = flax.linen.get_partition_spec(variables)["params"]
    like = flax.linen.unbox(variables)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), like)
    batch = {"image": np.zeros((3, SLOTS, 8, 8, 1)), "weight": np.zeros((3, SLOTS))}
    for label in range(3):
        own = images[label == LABELS]
        batch["image"][label, : len(own)] = own
        batch["weight"][label, : len(own)] = 1 / len(LABELS)

    def whole(params):
        scores = net.apply({"params": params}, images)
        return jnp.mean(losses.psl_with_integer_labels(scores, LABELS))

    return net, axes, params, batch, jax.jit(jax.value_and_grad(whole))(params)


def pieces():
    net, axes, params, batch, _ = network()
    pair_net = net.clone(num_classes=2)

    def h(w, batch):
        return losses.pair(pair_net.apply({"params": w}, batch["image"]), batch["weight"])

    pairs = psjax.ordered_pairs(3)
    selection = psjax.select(axes, {"class": pairs, "label": pairs[:, 0]}, like=params)
    return params, selection, batch, psjax.value_and_grad(h, in_axes=P("label"))


def assert_step(step, params, selection, batch, optimizer):
    """A step of plain gradient descent, rate 1, subtracts the gradient."""
    loss, grads = network()[-1]
    new, _, got = step(params, optimizer.init(params), selection, batch)
    assert_close((got, new), (loss, jax.tree.map(jnp.subtract, params, grads)))


def test_a_step_of_the_user_s_own_pmap_is_a_step_along_the_whole_gradient():
    params, selection, batch, loss_and_grad = pieces()
    optimizer = optax.sgd(1.0)

    @functools.partial(jax.pmap, axis_name="workers", in_axes=(None, None, 0, None), out_axes=None)
    def step(params, opt_state, selection, batch):
        loss, grads = jax.lax.psum(loss_and_grad(params, selection, batch), "workers")
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    assert_step(step, params, selection.split(8), batch, optimizer)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_step_of_the_user_s_own_jit_is_a_step_along_the_whole_gradient(sharded):
    params, selection, batch, loss_and_grad = pieces()
    optimizer = optax.sgd(1.0)
    if sharded:
        loss_and_grad = psjax.shard(loss_and_grad, mesh())

    @jax.jit
    def step(params, opt_state, selection, batch):
        loss, grads = loss_and_grad(params, selection, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    assert_step(step, params, selection, batch, optimizer)


# --------------------------------------------------------------------------------- a Flax NNX model


class Net(nnx.Module):
    """A trunk and a group of layers for each class, which is an axis of its own."""

    def __init__(self, num_classes, rngs):
        self.trunk = nnx.Linear(5, 4, rngs=rngs, param_dtype=np.float64)
        self.group = nnx.Param(rngs.normal((num_classes, 4, 2)), axes=("class", None, None))
        self.head = nnx.Param(rngs.normal((num_classes, 2)), axes=("class", None))

    def __call__(self, x):
        x = jnp.tanh(jnp.einsum("bf,cfg->bcg", jnp.tanh(self.trunk(x)), self.group[...]))
        return jnp.einsum("bcg,cg->bc", x, self.head[...])


def axes_of(params):
    """The custom metadata `axes` of every `nnx.Param`, as specs."""
    return jax.tree.map(
        lambda p: p.replace(P(*p.get_metadata().get("axes", ()))),
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_an_nnx_model_trains_by_its_pairs(sharded):
    """`merge` with the gathered parameters is the sub-network: its shapes tell how many classes."""
    graphdef, params = nnx.split(Net(3, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(6, 5)), np.array([0, 0, 1, 1, 2, 2])
    batch = {"image": x.reshape(3, 2, 5), "weight": np.full((3, 2), 1 / 6)}

    def h(w, batch):
        return losses.pair(nnx.merge(graphdef, w)(batch["image"]), batch["weight"])

    pairs = psjax.ordered_pairs(3)
    selection = psjax.select(axes_of, {"class": pairs, "label": pairs[:, 0]}, like=params)
    loss_and_grad = psjax.value_and_grad(h, in_axes=P("label"))
    if sharded:
        loss_and_grad = psjax.shard(loss_and_grad, mesh())

    def whole(params):
        scores = nnx.merge(graphdef, params)(x)
        return jnp.mean(losses.psl_with_integer_labels(scores, labels))

    got = jax.jit(loss_and_grad)(params, selection, batch)
    assert_close(got, jax.jit(jax.value_and_grad(whole))(params))
    assert nnx.merge(graphdef, got[1]).group.get_metadata()["axes"] == ("class", None, None)
