"""One matrix: whatever mesh is set, wherever arrays lie, however it is called, one result."""

import contextlib
import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax

pytestmark = pytest.mark.usefixtures("x64")

C, S, D, H, J = 8, 2, 8, 4, 2
AXES = {"trunk": P(), "rows": P("class", None), "deep": P(None, "class")}
LAID_OUT = {"trunk": P("d", None), "rows": P("d", None), "deep": P(None, "d")}
HIDDEN = {"in": P(None, "hidden"), "out": P("hidden", None), "bias": P()}
HIDDEN_LAID_OUT = {"in": P(None, "d"), "out": P("d", None), "bias": P()}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


W = {"trunk": normal(D, H), "rows": normal(C, H, seed=1), "deep": normal(2, C, seed=2)}
BATCH = {"x": normal(C, S, D, seed=3) / 4, "power": np.arange(C) % 3 + 1}
PAIRS = psjax.ordered_pairs(C)
NET = {"in": normal(D, 16, seed=4), "out": normal(16, 3, seed=5), "bias": normal(3, seed=6)}
BATCHES = {"x": normal(8, J, S, D, seed=7), "y": normal(8, J, S, 3, seed=8)}
SEED, ROUND, SIZES = 3, 2, {"hidden": 16}


def element(u, sample):
    scores = jnp.tanh(sample["x"] @ u["trunk"]) @ u["rows"].T
    power = sample["power"].astype(scores.dtype)
    return power * jnp.sum(jnp.tanh(scores[:, 1] - scores[:, 0])) + jnp.sum(u["deep"] ** 3)


def loss_fn(u, batch):
    scores = jnp.tanh(batch["x"] @ u["in"]) @ u["out"] + u["bias"]
    return jnp.mean((scores - batch["y"]) ** 2)


def pairs():
    return psjax.select(AXES, {"class": PAIRS, "label": PAIRS[:, 0]}, like=W)


def assert_close(actual, expected, tolerance=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        where = jax.tree_util.keystr(path)
        a = np.asarray(a)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)


@functools.cache
def plain():
    """The sum, its gradient, every element's value, with JAX's indexing and no mesh."""

    def one(w, pair, label):
        u = w | {"rows": w["rows"][pair], "deep": w["deep"][:, pair]}
        return element(u, jax.tree.map(lambda x: jnp.asarray(x)[label], BATCH))

    values = lambda w: jax.vmap(one, (None, 0, 0))(w, PAIRS, PAIRS[:, 0])
    whole = jax.value_and_grad(lambda w: jnp.sum(values(w)))
    with jax.enable_x64(True):
        run = jax.jit(lambda w: (whole(w), values(w)))
        return jax.tree.map(np.asarray, run(jax.tree.map(jnp.asarray, W)))


@functools.cache
def plain_round():
    """A round of momentum SGD on every subnet, written out: parameters and momenta."""
    with jax.enable_x64(True):
        rows = psjax.ist.membership(SEED, ROUND, HIDDEN, SIZES, 8).indices["hidden"]
        rows, grad = np.asarray(rows), jax.jit(jax.grad(loss_fn))
        new = {name: x.copy() for name, x in NET.items()}
        trace = {name: np.zeros_like(x) for name, x in NET.items()}
        bias, momentum = [], []
        for e, own in enumerate(rows):
            u = {"in": NET["in"][:, own], "out": NET["out"][own], "bias": NET["bias"]}
            v = jax.tree.map(np.zeros_like, u)
            for j in range(J):
                g = grad(u, {name: x[e, j] for name, x in BATCHES.items()})
                v = {name: 0.9 * v[name] + np.asarray(g[name]) for name in v}
                u = {name: u[name] - 0.1 * v[name] for name in u}
            new["in"][:, own], new["out"][own] = u["in"], u["out"]
            trace["in"][:, own], trace["out"][own] = v["in"], v["out"]
            bias.append(u["bias"])
            momentum.append(v["bias"])
        new["bias"], trace["bias"] = np.mean(bias, axis=0), np.mean(momentum, axis=0)
        return new, trace


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def round_of(w, batches, seed, axis_name=None, selection=None):
    """A round: new parameters and momenta."""
    update = psjax.local_update(loss_fn, OPTIMIZER, axis_name=axis_name)
    if selection is None:
        selection = psjax.ist.membership(seed, ROUND, HIDDEN, SIZES, 8)
    new, state, _ = update(w, OPTIMIZER.init(w), selection, batches)
    return new, state[0].trace


FUNCTIONS = {
    "value_and_grad": lambda s, w, b: psjax.value_and_grad(element, P("label"))(w, s, b),
    "element_value_and_grad": lambda s, w, b: stacked(s, w, b),
    "partially_separable": lambda s, w, b: jax.value_and_grad(
        psjax.partially_separable(element, P("label"))
    )(w, s, b),
}


def stacked(selection, w, batch):
    values, grads = psjax.element_value_and_grad(element, P("label"))(w, selection, batch)
    return values, selection.scatter_add(grads, w)


def expected(function):
    (value, grads), values = plain()
    return (values if function == "element_value_and_grad" else value), grads


# ---------------------------------------------------------------------------- meshes and layouts

MESHES = {
    "none": None,
    "one, Auto": (1, AxisType.Auto),
    "one, Explicit": (1, AxisType.Explicit),
    "eight, Auto": (8, AxisType.Auto),
    "eight, Explicit": (8, AxisType.Explicit),
}
every_place = pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("none", "of the host"),
        ("none", "sharded"),
        ("one, Auto", "sharded"),
        ("one, Explicit", "sharded"),
        ("eight, Auto", "replicated"),
        ("eight, Auto", "sharded"),
        ("eight, Explicit", "of the host"),
        ("eight, Explicit", "replicated"),
        ("eight, Explicit", "sharded"),
    ],
)


def make_mesh(kind, names=("d",), shape=None):
    n, axis_type = MESHES[kind] or (8, AxisType.Auto)
    types = (axis_type,) * len(names)
    return jax.make_mesh(shape or (n,), names, axis_types=types, devices=jax.devices()[:n])


def setting(kind, mesh=None):
    """The context in which the user works."""
    if MESHES[kind] is None:
        return contextlib.nullcontext()
    return jax.set_mesh(make_mesh(kind) if mesh is None else mesh)


def put(tree, specs, kind, layout):
    """Where the arrays lie; a sharded array lies on eight devices also if no mesh is set."""
    if layout == "of the host":
        return tree
    mesh = make_mesh(kind)
    if layout == "replicated":
        specs = jax.tree.map(lambda x: P(), tree)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def batch_specs(tree):
    return jax.tree.map(lambda x: P("d"), tree)


# ------------------------------------------------------------------------------------ the matrix


@every_place
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_in_the_user_s_jit(function, layout, mesh):
    w, batch = put(W, LAID_OUT, mesh, layout), put(BATCH, batch_specs(BATCH), mesh, layout)
    with setting(mesh):
        got = jax.jit(FUNCTIONS[function])(pairs(), w, batch)
    assert_close(got, expected(function))


@pytest.mark.parametrize("mesh", ["one, Explicit", "eight, Auto", "eight, Explicit"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_outside_jit(function, mesh):
    w, batch = put(W, LAID_OUT, mesh, "sharded"), put(BATCH, batch_specs(BATCH), mesh, "sharded")
    with setting(mesh):
        got = FUNCTIONS[function](pairs(), w, batch)
    assert_close(got, expected(function))


@every_place
def test_a_round_of_a_membership_in_the_user_s_jit(layout, mesh):
    w = put(NET, HIDDEN_LAID_OUT, mesh, layout)
    batches = put(BATCHES, batch_specs(BATCHES), mesh, layout)
    with setting(mesh):
        got = jax.jit(round_of)(w, batches, SEED)
    assert_close(got, plain_round())


@pytest.mark.parametrize("mesh", ["eight, Auto", "eight, Explicit"])
def test_a_round_of_a_membership_outside_jit(mesh):
    w = put(NET, HIDDEN_LAID_OUT, mesh, "sharded")
    batches = put(BATCHES, batch_specs(BATCHES), mesh, "sharded")
    with setting(mesh):
        got = round_of(w, batches, SEED)
    assert_close(got, plain_round())


@pytest.mark.parametrize("mesh", ["one, Explicit", "eight, Explicit"])
def test_parameters_that_the_user_reshards_inside_jit(mesh):
    def step(selection, w, batch):
        w = jax.tree.map(jax.reshard, w, LAID_OUT)
        batch = jax.tree.map(lambda x: jax.reshard(x, P("d")), batch)
        loss, grads = psjax.value_and_grad(element, P("label"))(w, selection, batch)
        return loss, grads, jax.tree.map(lambda x, g: x - g, w, grads)

    with setting(mesh):
        value, grads, new = jax.jit(step)(pairs(), W, BATCH)
    assert_close((value, grads), expected("value_and_grad"))
    assert_close(new, jax.tree.map(np.subtract, W, expected("value_and_grad")[1]))


@pytest.mark.parametrize("mesh", ["eight, Auto", "eight, Explicit"])
def test_a_mesh_of_two_axes_over_which_everything_is_sharded(mesh):
    two = make_mesh(mesh, ("a", "b"), (2, 4))
    lay = lambda tree, specs: jax.tree.map(
        lambda x, s: jax.device_put(x, NamedSharding(two, s)), tree, specs
    )
    w = lay(W, {"trunk": P("a", "b"), "rows": P("b", "a"), "deep": P("a", "b")})
    batch = lay(BATCH, {"x": P("b", "a"), "power": P(("a", "b"))})
    with setting(mesh, two):
        got = jax.jit(FUNCTIONS["value_and_grad"])(pairs(), w, batch)
    assert_close(got, expected("value_and_grad"))


@pytest.mark.parametrize("mesh", ["eight, Auto", "eight, Explicit"])
def test_the_names_of_axes_of_parameters_are_not_those_of_the_mesh(mesh):
    """A mesh whose one axis is called as an axis of the parameters is."""
    both = jax.jit(FUNCTIONS["value_and_grad"])
    with setting(mesh, make_mesh(mesh, ("class",))):
        assert_close(both(pairs(), W, BATCH), expected("value_and_grad"))
    with setting(mesh, make_mesh(mesh, ("hidden",))):
        assert_close(jax.jit(round_of)(NET, BATCHES, SEED), plain_round())


@pytest.mark.parametrize("mesh", ["eight, Auto", "eight, Explicit"])
def test_what_a_selection_does_of_sharded_parameters(mesh):
    selection, w = pairs(), put(W, LAID_OUT, mesh, "sharded")
    stacked = jax.tree.map(np.asarray, selection.gather(W))
    run = lambda s, w, y: (s.gather(w), s.scatter_add(y, w), s.scatter_mean(y, w), s.counts(w))
    with setting(mesh):
        got = jax.jit(run)(selection, w, stacked)
    assert_close(got, run(selection, W, stacked))


# -------------------------------------------------------------------------- models of the library


@pytest.mark.parametrize(
    ("mesh", "name"),
    [("one, Explicit", "d"), ("eight, Auto", "class"), ("eight, Explicit", "class")],
)
def test_the_library_s_own_networks_train_under_any_mesh(name, mesh):
    net = psjax.models.PSNet(3, (2,), 1, (2,), kernel_sizes=(3, 2), pools=(2, 1))
    images = normal(3, 2, 8, 8, 1, seed=9)
    variables = jax.eval_shape(net.init, jax.random.key(0), images[0])
    axes = flax.linen.get_partition_spec(variables)["params"]
    ordered = psjax.ordered_pairs(3)

    def h(w, x):
        scores = net.clone(num_classes=2).apply({"params": w}, x)
        return jnp.sum(jnp.tanh(scores[:, 1] - scores[:, 0]))

    def train(params, images):
        indices = {"class": ordered, "label": ordered[:, 0]}
        selection = psjax.select(axes, indices, like=params)
        return psjax.value_and_grad(h, P("label"))(params, selection, images)

    def whole(params, images):
        total = 0.0
        for k in range(3):
            scores = net.apply({"params": params}, images[k])
            for j in {0, 1, 2} - {k}:
                total += jnp.sum(jnp.tanh(scores[:, j] - scores[:, k]))
        return total

    with setting(mesh, make_mesh(mesh, (name,))):
        params = flax.linen.unbox(jax.jit(net.init)(jax.random.key(0), images[0]))["params"]
        got = jax.tree.map(np.asarray, jax.jit(train)(params, images))
    params = jax.tree.map(np.asarray, params)
    assert_close(got, jax.jit(jax.value_and_grad(whole))(params, images), 1e-6)


# ----------------------------------------------------------------------- pmap, shard_map and shard


def own(tree):
    return jax.tree.map(lambda x: x[0], tree)


@pytest.mark.parametrize("mesh", ["none", "eight, Auto", "eight, Explicit"])
@pytest.mark.parametrize("check_vma", [True, False])
def test_the_user_s_own_shard_map(check_vma, mesh):
    """Gradients, and a round over the devices, over the mesh that is set."""
    fn, eight = psjax.value_and_grad(element, P("label")), make_mesh(mesh)

    def body(selection, w, batch, net, batches, seed):
        gradient = jax.lax.psum(fn(w, own(selection), batch), "d")
        subnets = psjax.ist.membership(seed, ROUND, HIDDEN, SIZES, 8)
        mine = subnets.split(8)[jax.lax.axis_index("d")]
        return gradient, round_of(net, batches, None, "d", mine)

    mapped = jax.shard_map(
        body,
        mesh=eight,
        in_specs=(P("d"), P(), P(), P(), P("d"), P()),
        out_specs=P(),
        check_vma=check_vma,
    )
    lay = lambda tree: jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(eight, P("d"))), tree
    )  # what is divided must lie so, where the axes are Explicit
    with setting(mesh, eight):
        selection, batches = lay(pairs().split(8)), lay(BATCHES)
        gradient, a_round = jax.jit(mapped)(selection, W, BATCH, NET, batches, SEED)
    assert_close(gradient, expected("value_and_grad"))
    assert_close(a_round, plain_round())


@pytest.mark.parametrize("mesh", ["none", "eight, Auto", "eight, Explicit"])
@pytest.mark.parametrize("function", ["value_and_grad", "partially_separable"])
def test_shard_under_any_mesh(function, mesh):
    if function == "value_and_grad":
        fn = psjax.shard(psjax.value_and_grad(element, P("label")), make_mesh(mesh))
    else:
        f = psjax.shard(psjax.partially_separable(element, P("label")), make_mesh(mesh))
        fn = jax.value_and_grad(f)
    with setting(mesh):
        w = jax.tree.map(jnp.asarray, W)
        got = jax.jit(fn)(w, pairs(), BATCH)
    assert_close(got, expected(function))


@pytest.mark.parametrize("mesh", ["eight, Auto", "eight, Explicit"])
def test_shard_of_sharded_parameters(mesh):
    fn = psjax.shard(psjax.value_and_grad(element, P("label")), make_mesh(mesh))
    w, batch = put(W, LAID_OUT, mesh, "sharded"), put(BATCH, batch_specs(BATCH), mesh, "sharded")
    with setting(mesh):
        assert_close(jax.jit(fn)(w, pairs(), batch), expected("value_and_grad"))


@pytest.mark.parametrize("mesh", ["none", "eight, Auto"])
def test_the_user_s_own_pmap(mesh):
    """JAX refuses pmap itself under a mesh of Explicit axes, or of another axis name."""
    fn = psjax.value_and_grad(element, P("label"))

    def body(selection, w, batch, net, batches, seed):
        gradient = jax.lax.psum(fn(w, selection, batch), "d")
        subnets = psjax.ist.membership(seed, ROUND, HIDDEN, SIZES, 8)
        mine = subnets.split(8)[jax.lax.axis_index("d")]
        return gradient, round_of(net, batches, None, "d", mine)

    mapped = jax.pmap(body, "d", in_axes=(0, None, None, None, 0, None), out_axes=None)
    batches = jax.tree.map(lambda x: x[:, None], BATCHES)
    with setting(mesh):
        got = mapped(pairs().split(8), W, BATCH, NET, batches, SEED)
    assert_close(got, (expected("value_and_grad"), plain_round()))


@pytest.mark.parametrize("mesh", ["none", "eight, Auto", "eight, Explicit"])
def test_the_library_s_pmap(mesh):
    with setting(mesh):
        got = psjax.pmap(psjax.value_and_grad(element, P("label")))(W, pairs(), BATCH)
    assert_close(got, expected("value_and_grad"))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_membership_is_the_same_inside_shard_map(stratified, check_vma):
    """Every device draws the whole of it, and takes its share; the seed is traced."""
    sizes = {"hidden": 64}
    draw = lambda seed: psjax.ist.membership(seed, ROUND, HIDDEN, sizes, 8, stratified)
    mesh = make_mesh("none")

    def body(seed):
        return jax.tree.map(lambda x: x[None], draw(seed).split(8)[jax.lax.axis_index("d")])

    specs = {"mesh": mesh, "in_specs": P(), "out_specs": P("d"), "check_vma": check_vma}
    got = jax.jit(jax.shard_map(body, **specs))(SEED)
    right = draw(SEED).split(8)
    np.testing.assert_array_equal(got.indices["hidden"], right.indices["hidden"])
    np.testing.assert_array_equal(got.valid, right.valid)
