"""Theorems about f(w) = sum of f_e(U_e w): value, gradient and every JAX transform of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

import psjax

pytestmark = pytest.mark.usefixtures("x64", "strict")

E, ROWS = 5, 6
AXES = {"x": P("i"), "k": P(None, "i"), "c": P()}
LIKE = {"x": np.zeros(ROWS), "k": np.zeros((2, ROWS)), "c": np.zeros(2)}
IN_AXES = (None, P("label"), 0, None)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


PARAMS = {"x": normal(ROWS, seed=1), "k": normal(2, ROWS, seed=2), "c": normal(2, seed=3)}
# Every kind of argument: whole, rows by name, one row an element, an integer that has no gradient.
ARGS = (
    normal(2, seed=4),
    {"image": normal(4, 3, seed=5), "power": np.array([1, 2, 3, 2], np.int32)},
    normal(E, seed=6),
    np.int32(2),
)
INDICES = {
    "overlap": [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]],
    "repeated": [[0, 1], [0, 1], [0, 1], [3, 5], [5, 3]],
    "row dropped": [0, 3, 3, 1, 5],
    "replicas": None,
}
LABELS = [0, 3, 1, 1, 2]


def make(kind="overlap", index=None, labels=LABELS):
    index = INDICES[kind] if index is None else index
    indices = {"label": labels} if index is None else {"label": labels, "i": index}
    return psjax.select(AXES, indices, like=LIKE, sizes={"label": 4})


arrays = functools.partial(jax.tree.map, jnp.asarray)


def element(w, a, sample, b, n):
    """Smooth, not symmetric in its arguments; second derivatives couple everything."""
    inner = jnp.sum(jnp.sin(w["x"]) * a[0]) + jnp.sum(w["k"] ** 2) * b + w["c"][0] * a[1]
    scale = jnp.sum(jnp.cos(sample["image"])) * sample["power"].astype(b.dtype)
    return scale * jnp.tanh(inner) + w["c"][1] ** 2 * b * n.astype(b.dtype) * jnp.sum(w["x"] ** 3)


def plain(params, selection, *args):
    """The sum written with NumPy's indexing, for JAX to differentiate."""
    a, samples, b, n = args
    params, samples = arrays((params, samples))
    index = selection.indices.get("i", np.tile(np.arange(ROWS), (E, 1)))

    def one(index, label, b):
        w = {"x": params["x"][index], "k": params["k"][:, index], "c": params["c"]}
        return element(w, a, jax.tree.map(lambda x: x[label], samples), b, n)

    return jnp.sum(jax.vmap(one)(index, selection.indices["label"], b))


def assert_close(actual, expected, rtol=1e-12):
    """Relative to the largest entry of the leaf: sums in another order cancel differently."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        where = jax.tree_util.keystr(path)
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=where)


dot = lambda a, b: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))
V = {"x": normal(ROWS, seed=7), "k": normal(2, ROWS, seed=8), "c": normal(2, seed=9)}


@functools.cache
def expected(kind):
    return jax.jit(lambda w: jax.value_and_grad(plain)(w, make(kind), *ARGS))(arrays(PARAMS))


# ------------------------------------------------------------------------------ value and gradient


@pytest.mark.parametrize(
    ("kind", "chunk_size"),
    [("overlap", None), ("overlap", 1), ("overlap", 3), ("overlap", E), ("overlap", 100)]
    + [(kind, chunk) for kind in ("repeated", "row dropped", "replicas") for chunk in (1, 2)],
)
def test_value_and_grad_is_that_of_the_plain_sum(kind, chunk_size):
    fn = jax.jit(psjax.value_and_grad(element, IN_AXES, chunk_size))
    assert_close(fn(PARAMS, make(kind), *ARGS), expected(kind))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_element_gradients_scatter_to_the_whole_and_are_zero_where_invalid(chunk_size):
    selection = make().split(2)
    fn = jax.jit(psjax.element_value_and_grad(element, IN_AXES, chunk_size))
    value, total = 0.0, jax.tree.map(np.zeros_like, PARAMS)
    rows = jax.tree.map(lambda x: x[[[0, 1, 2], [3, 4, 4]]], ARGS[2])
    for d in range(2):
        part = jax.tree.map(lambda x: x[d], selection)  # noqa: B023
        values, grads = fn(PARAMS, part, *ARGS[:2], rows[d], ARGS[3])
        assert values.shape == (3,)
        assert jax.tree.map(jnp.shape, grads) == {"x": (3, 2), "k": (3, 2, 2), "c": (3, 2)}
        assert not any(np.any(g[~part.valid]) for g in jax.tree.leaves((values, grads)))
        value = value + values.sum()
        total = jax.tree.map(jnp.add, total, part.scatter_add(grads, PARAMS))
    assert_close((value, total), expected("overlap"))


def test_the_three_functions_of_equation_5_are_three_sums_added():
    """Section 4 of the paper, whose elements are of three different forms."""
    one = lambda u: u[0] ** 2 * u[1]
    two = lambda u: jnp.exp(u[0] - u[1])
    three = lambda u: jnp.sin(u[0]) * u[1] * u[2]
    parts = [(one, [[0, 1], [2, 3]]), (two, [[1, 4]]), (three, [[2, 3, 4]])]
    x = jnp.asarray(normal(5))
    whole = lambda x: sum(fn(x[jnp.array(row)]) for fn, rows in parts for row in rows)
    selections = [psjax.select(P("i"), {"i": rows}, like=x) for _, rows in parts]
    fns = [psjax.partially_separable(fn) for fn, _ in parts]
    total = lambda x: sum(fn(x, selection) for fn, selection in zip(fns, selections))
    assert_close(
        jax.jit(lambda x: (total(x), jax.grad(total)(x), jax.hessian(total)(x)))(x),
        jax.jit(lambda x: (whole(x), jax.grad(whole)(x), jax.hessian(whole)(x)))(x),
    )


def test_extended_rosenbrock_has_its_closed_form():
    n = 7
    x, v = normal(n, seed=1), normal(n, seed=2)
    a, b = x[:-1], x[1:]
    gradient, product = np.zeros(n), np.zeros(n)
    gradient[:-1] += -400 * a * (b - a**2) - 2 * (1 - a)
    gradient[1:] += 200 * (b - a**2)
    product[:-1] += (1200 * a**2 - 400 * b + 2) * v[:-1] - 400 * a * v[1:]
    product[1:] += 200 * v[1:] - 400 * a * v[:-1]
    value = np.sum(100 * (b - a**2) ** 2 + (1 - a) ** 2)

    selection = psjax.select(P("i"), {"i": np.arange(n - 1)[:, None] + [0, 1]}, like=x)
    f = psjax.partially_separable(lambda u: 100 * (u[1] - u[0] ** 2) ** 2 + (1 - u[0]) ** 2)
    gradient_of = lambda x: jax.grad(f)(x, selection)
    got = jax.jit(lambda x, v: (f(x, selection), *jax.jvp(gradient_of, (x,), (v,))))(x, v)
    assert_close(got, (value, gradient, product))


# ---------------------------------------------------------------------------- every JAX transform

W, TANGENT = PARAMS, V
TRANSFORMS = {
    "value": lambda f: f(W),
    "grad": lambda f: jax.grad(f)(W),
    "grad of jit": lambda f: jax.grad(jax.jit(f))(W),
    "jvp": lambda f: jax.jvp(f, (W,), (TANGENT,)),
    "jacfwd": lambda f: jax.jacfwd(f)(W),
    "linearize": lambda f: jax.linearize(f, W)[1](TANGENT),
    "hvp, forward over reverse": lambda f: jax.jvp(jax.grad(f), (W,), (TANGENT,))[1],
    "hvp, reverse over reverse": lambda f: jax.grad(lambda w: dot(jax.grad(f)(w), TANGENT))(W),
    "hvp, reverse over forward": lambda f: jax.grad(lambda w: jax.jvp(f, (w,), (TANGENT,))[1])(W),
    "hessian": lambda f: jax.hessian(f)(W),
    "vmap of grad": lambda f: jax.vmap(jax.grad(f))(
        jax.tree.map(lambda x: jnp.stack([x, 2.0 * x]), W)
    ),
    "grad in scan": lambda f: jax.lax.scan(
        lambda w, _: (jax.tree.map(lambda x, g: x - 0.01 * g, w, jax.grad(f)(w)), f(w)),
        W,
        length=3,
    ),
    "grad of remat": lambda f: jax.grad(jax.checkpoint(f))(W),
    "grad of a leaf": lambda f: jax.grad(lambda c: f(W | {"c": c}))(W["c"]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_partially_separable_function_is_an_ordinary_function(transform):
    selection = make()
    f = psjax.partially_separable(element, IN_AXES, chunk_size=2)
    run = lambda f: jax.jit(lambda: TRANSFORMS[transform](lambda w: f(w, selection, *ARGS)))()
    assert_close(run(f), run(plain), rtol=1e-11)  # third derivatives of sums of order 10


def test_it_is_an_ordinary_function_outside_jit_too():
    f = psjax.partially_separable(element, IN_AXES)
    value, gradient = jax.value_and_grad(f)(arrays(PARAMS), make(), *arrays(ARGS))
    assert_close((value, gradient), expected("overlap"))


def test_gradients_of_the_other_arguments():
    """in_axes None, P and 0; the integers beside a float in one tree do not move."""
    a, samples, b, n = ARGS
    f = psjax.partially_separable(element, IN_AXES, chunk_size=2)

    def gradients(f):
        fn = lambda w, a, image, b: f(w, make(), a, samples | {"image": image}, b, n)
        return jax.jit(jax.grad(fn, (0, 1, 2, 3)))(W, a, samples["image"], b)

    assert_close(gradients(f), gradients(plain))


def test_integers_take_the_tangent_float0():
    a, samples, b, n = ARGS
    f = psjax.partially_separable(element, IN_AXES)
    zeros = jax.tree.map(lambda x: np.zeros(np.shape(x), jax.dtypes.float0), (samples["power"], n))
    tangent = {"image": np.ones_like(samples["image"]), "power": zeros[0]}
    run = lambda f: jax.jvp(
        lambda samples, n: f(W, make(), a, samples, b, n), (samples, n), (tangent, zeros[1])
    )
    assert_close(jax.jit(lambda: run(f))(), jax.jit(lambda: run(plain))())


def test_vmap_over_selections_is_a_map_over_selections():
    selections = [make(), make("repeated")]
    stacked = jax.tree.map(lambda *x: np.stack(x), *selections)
    fn = psjax.value_and_grad(element, IN_AXES, chunk_size=2)
    got = jax.jit(jax.vmap(lambda s: fn(W, s, *ARGS)))(stacked)
    one = lambda e: jax.tree.map(lambda x: x[e], got)
    assert_close(one(0), expected("overlap"))
    assert_close(one(1), expected("repeated"))


def test_check_grads():
    selection = make()
    f = psjax.partially_separable(element, IN_AXES, chunk_size=2)
    fn = jax.jit(lambda w, b: f(w, selection, *ARGS[:2], b, ARGS[3]))
    check_grads(fn, (W, ARGS[2]), order=1, modes=("fwd", "rev"))  # second order: above


def test_an_element_function_may_close_over_what_is_traced_but_not_differentiated():
    selection, a = make(index=[[0], [1]], labels=[0, 1]), 3.0

    @jax.jit
    def gradient(w, a):
        f = psjax.partially_separable(lambda u, sample: a * jnp.sum(u["x"]), P("label"))
        return jax.grad(f)(w, selection, np.zeros(4))

    assert gradient(W, a)["x"].tolist() == [3.0, 3.0, 0.0, 0.0, 0.0, 0.0]


# -------------------------------------------------------------------------------- many devices


def devices(n=8):
    return jax.sharding.Mesh(np.array(jax.devices()[:n]), "d")


own = lambda tree: jax.tree.map(lambda x: x[0], tree)
SPLIT_ROWS = np.array([0, 1, 2, 3, 4, 4, 4, 4])[:, None]  # E = 5 rows on 8 devices


def over_devices(fn, how):
    """`fn(params, selection, *ARGS)` on each of 8 devices; its results are equal on all."""
    if how == "pmap":
        return jax.pmap(fn, "d", in_axes=(None, 0, None, None, 0, None), out_axes=None)
    body = lambda w, selection, a, samples, b, n: fn(w, own(selection), a, samples, own(b), n)
    specs = (P(), P("d"), P(), P(), P("d"), P())
    return jax.jit(
        jax.shard_map(
            body, mesh=devices(), in_specs=specs, out_specs=P(), check_vma=how == "shard_map"
        )
    )


def spread_arguments():
    a, samples, b, n = ARGS
    return make().split(8), a, samples, b[SPLIT_ROWS], n


HOW = ["pmap", "shard_map", "shard_map without vma"]


@pytest.mark.parametrize("how", HOW)
def test_value_and_grad_is_the_device_s_own_sum(how):
    """The caller's psum gives the whole once: shared leaves are not summed behind his back."""
    fn = psjax.value_and_grad(element, IN_AXES)
    total = over_devices(lambda *operands: jax.lax.psum(fn(*operands), "d"), how)
    assert_close(total(W, *spread_arguments()), expected("overlap"))


@pytest.mark.parametrize("how", HOW)
def test_jax_grad_of_the_scalar_has_the_semantics_of_jax(how):
    f = psjax.partially_separable(element, IN_AXES)
    summed = how == "shard_map"  # replicated parameters, check_vma: JAX adds over the devices

    def gradient(*operands):
        grads = jax.grad(f)(*operands)
        return grads if summed else jax.lax.psum(grads, "d")

    got = over_devices(gradient, how)(W, *spread_arguments())
    assert_close(got, expected("overlap")[1])


ORDERS = ["hvp, forward over reverse", "hvp, reverse over forward"]


@pytest.mark.parametrize("how", HOW)
def test_other_transforms_of_the_scalar_have_the_semantics_of_jax(how):
    """Under check_vma, what JAX transposed it has added over the devices, and it adds it once."""
    f = psjax.partially_separable(element, IN_AXES)
    summed = how == "shard_map"

    def own(w, *operands):
        g = lambda w: f(w, *operands)
        reverse = {name: TRANSFORMS[name](g) for name in [*ORDERS, "hessian"]}
        reverse = reverse if summed else jax.lax.psum(reverse, "d")
        return reverse | {"jvp": jax.lax.psum(TRANSFORMS["jvp"](g), "d")}

    got = over_devices(own, how)(W, *spread_arguments())
    assert_close(got, transformed(tuple(got)), rtol=1e-11)


@functools.cache
def transformed(names):
    whole = lambda w: plain(w, make(), *ARGS)
    return jax.jit(lambda: {name: TRANSFORMS[name](whole) for name in names})()


def test_hessian_vector_products_over_devices():
    """Forward over the explicit gradient: this device's own, like the gradient."""
    fn, f = psjax.value_and_grad(element, IN_AXES), psjax.partially_separable(element, IN_AXES)

    def product(w, selection, *args):
        one = jax.jvp(lambda w: fn(w, selection, *args)[1], (w,), (V,))[1]
        return jax.lax.psum(one, "d")

    got = over_devices(product, "shard_map")(W, *spread_arguments())
    whole = jax.jit(lambda w: jax.jvp(lambda w: jax.grad(f)(w, make(), *ARGS), (w,), (V,))[1])(W)
    assert_close(got, whole)


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
def test_stacked_gradients_over_devices_are_those_of_one(how):
    fn = psjax.element_value_and_grad(element, IN_AXES)

    def total(w, selection, *args):
        values, grads = fn(w, selection, *args)
        return jax.lax.psum((values.sum(), selection.scatter_add(grads, w)), "d")

    assert_close(over_devices(total, how)(W, *spread_arguments()), expected("overlap"))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("num_elements", [1, 2])
def test_replicas_where_only_the_batch_varies_are_data_parallelism(check_vma, num_elements):
    """Nothing of the selection is split; the batch alone tells the devices apart."""
    w, batch = arrays(PARAMS), normal(8, num_elements, 3)
    loss = lambda w, rows: jnp.sum(jnp.tanh(jnp.outer(rows, w["x"]))) * w["c"][0]
    selection = psjax.replicas(w, num_elements)
    fn = psjax.value_and_grad(loss, in_axes=0)
    got = jax.jit(
        jax.shard_map(
            lambda w, batch: jax.lax.psum(fn(w, selection, batch[0]), "d"),
            mesh=devices(),
            in_specs=(P(), P("d")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )(w, batch)
    whole = lambda w: jnp.sum(jax.vmap(lambda rows: loss(w, rows))(batch.reshape(-1, 3)))
    assert_close(got, jax.value_and_grad(whole)(w))


def test_random_keys_are_arguments_like_others_and_may_be_what_alone_varies():
    w, keys = arrays(PARAMS), jax.random.split(jax.random.key(0), 8)
    loss = lambda w, key: jnp.sum(w["x"] * jax.random.normal(key, (ROWS,))) * w["c"][0]
    got = jax.jit(
        jax.shard_map(
            lambda w, keys: jax.lax.psum(
                psjax.value_and_grad(loss, in_axes=0)(w, psjax.replicas(w, 1), keys), "d"
            ),
            mesh=devices(),
            in_specs=(P(), P("d")),
            out_specs=P(),
        )
    )(w, keys)
    whole = lambda w: sum(loss(w, key) for key in keys)
    assert_close(got, jax.value_and_grad(whole)(w))


# ------------------------------------------------------------------------- padding, dtype, traces


def test_invalid_elements_leak_no_nan_in_any_order():
    """The element has poles at 0, and a shared leaf that no index protects.

    Invalid are one element of the user's, the padding of split and the padding of the chunks.
    """
    fn = lambda u: jnp.sum(jnp.log(u["x"]) * u["c"][0] ** 2 / u["x"]) + u["c"][1] / jnp.prod(u["x"])
    w = {"x": np.arange(1.0, 6.0), "c": np.array([2.0, 3.0])}
    v = {"x": normal(5), "c": normal(2)}
    rows = np.array([[0, 1], [3, 1], [2, 3], [4, 0], [1, 4]])
    selection = psjax.select({"x": P("i"), "c": P()}, {"i": rows}, like=w)
    selection.valid[1] = False
    parts = selection.split(2)  # [2, 3]
    f = psjax.partially_separable(fn, chunk_size=2)
    part = lambda d: jax.tree.map(lambda x: x[d], parts)
    ours = lambda w: f(w, part(0)) + f(w, part(1))
    one = lambda w, row: fn({"x": w["x"][row], "c": w["c"]})
    whole = lambda w: jnp.sum(jax.vmap(one, (None, 0))(w, rows[[0, 2, 3, 4]]))

    def everything(f):
        return jax.jit(
            lambda w, v: (
                jax.value_and_grad(f)(w),
                jax.jvp(jax.grad(f), (w,), (v,))[1],
                jax.grad(lambda w: dot(jax.grad(f)(w), v))(w),
                jax.grad(lambda w: jax.jvp(f, (w,), (v,))[1])(w),
            )
        )(arrays(w), v)

    assert_close(everything(ours), everything(whole))


def test_an_invalid_element_may_be_nan_itself():
    like = np.array([0.0, 1.0, 2.0])
    selection = psjax.select(P("i"), {"i": [0, 1, 2]}, like=like)
    selection.valid[0] = False
    both = jax.jit(
        lambda w: (
            psjax.value_and_grad(jnp.log)(w, selection),
            psjax.element_value_and_grad(jnp.log)(w, selection),
        )
    )(like)
    assert_close(both[0], (np.log(2.0), np.array([0.0, 1.0, 0.5])))
    assert_close(both[1], (np.log([1.0, 1.0, 2.0]), np.array([0.0, 1.0, 0.5])))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_and_value_keep_their_dtypes(dtype):
    """Parameters of one type, a loss computed in float32."""
    like = {"x": jnp.ones(4, dtype), "c": jnp.ones(2, dtype)}
    selection = psjax.select({"x": P("i"), "c": P()}, {"i": [[0, 1], [2, 3]]}, like=like)
    loss = lambda u: jnp.sum(u["x"].astype(jnp.float32)) * u["c"][0].astype(jnp.float32)
    value, grads = jax.eval_shape(psjax.value_and_grad(loss), like, selection)
    assert value.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype(dtype)}
    got = jax.jit(jax.grad(psjax.partially_separable(loss)))(like, selection)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    assert got["c"].tolist() == [4.0, 0.0]


def test_new_index_sets_do_not_trace_the_element_function_again():
    traces = []

    def counted(*operands):
        traces.append(1)
        return element(*operands)

    fn = jax.jit(psjax.value_and_grad(counted, IN_AXES))
    fn(W, make(), *ARGS)
    first = len(traces)
    for kind in ("overlap", "repeated"):
        for labels in (LABELS, [1, 1, 0, 2, 3]):
            fn(W, make(kind, labels=labels), *ARGS)
    assert len(traces) == first == 2  # the check of its value's shape, and the program


def temp_bytes(num_elements, chunk_size):
    """Temporary memory of the program: matrices [64, 64] of each element, 32 KiB in float64."""
    like = jax.ShapeDtypeStruct((10, 8), np.float64)
    rows = np.arange(num_elements)[:, None] % 10
    selection = psjax.select(P("i"), {"i": rows}, like=like)
    x = jnp.asarray(normal(8, 64, 64))
    fn = lambda w: jnp.sum(jnp.tanh(jnp.tanh(jnp.einsum("if,fab->ab", w, x)) @ x[0]))
    compiled = jax.jit(psjax.value_and_grad(fn, None, chunk_size)).lower(like, selection).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_chunk_and_not_with_the_number_of_elements():
    one, four, eight = (temp_bytes(16, chunk) for chunk in (1, 4, 8))
    matrix = 64 * 64 * 8
    assert four - one > 2 * matrix
    assert eight - four > 3 * matrix
    assert temp_bytes(64, 1) - one < 64 * 64  # some bytes an element: its indices


def test_making_leaves_vary_costs_nothing(monkeypatch):
    """What `where(mask, x, x)` says to `shard_map`, XLA folds away."""
    like = jax.ShapeDtypeStruct((321, 7), np.float64)
    selection = psjax.replicas(like, 3)

    def instructions():
        fn = jax.jit(lambda *args: psjax.value_and_grad(lambda w: jnp.sum(w**2))(*args))
        return fn.lower(like, selection).compile().as_text().count("= f64[321,7]")

    with_it = instructions()
    monkeypatch.setattr(psjax._separable, "vary", lambda tree, over: tree)
    assert instructions() == with_it > 0


# ------------------------------------------------------------------------------------------ errors

FACTORIES = [psjax.value_and_grad, psjax.element_value_and_grad, psjax.partially_separable]
every_factory = pytest.mark.parametrize("factory", FACTORIES)


@pytest.mark.usefixtures("any_type")
@every_factory
@pytest.mark.parametrize("chunk_size", [0, -1, 2.0])
def test_chunk_size_is_a_positive_integer(factory, chunk_size):
    with pytest.raises(ValueError, match=rf"{factory.__name__}\(chunk_size={chunk_size}\)"):
        factory(element, chunk_size=chunk_size)


@every_factory
def test_an_element_is_a_floating_scalar(factory):
    w, name = arrays(PARAMS), factory.__name__
    selection = psjax.select(AXES, {"i": [[0, 1]]}, like=LIKE)
    with pytest.raises(ValueError, match=rf"{name}: element_fn .* scalar, got float64\[2\]\. Sum"):
        factory(lambda u: u["x"])(w, selection)
    with pytest.raises(ValueError, match=r"must return a scalar, got \('float64\[\]', "):
        factory(lambda u: (u["c"][0], u["x"]))(w, selection)
    with pytest.raises(TypeError, match=rf"{name}: element_fn .* floating scalar, got int64"):
        factory(lambda u: jnp.sum(u["x"] > 0))(w, selection)


@pytest.mark.usefixtures("any_type")
@every_factory
@pytest.mark.parametrize(
    ("in_axes", "message"),
    [
        ((None, None), "in_axes has 2 entries for 1 arguments"),
        ((), "in_axes has 0 entries for 1 arguments"),
        (1, r"in_axes\[0\] is 1; pass None, 0 or a PartitionSpec"),
        (False, r"in_axes\[0\] is False"),
        ("label", r"in_axes\[0\] is 'label'"),
        ([0], r"in_axes\[0\] is \[0\]"),
        (None, r"has indices of \['label'\], which neither a parameter nor in_axes=None names"),
        (P("lable"), "in_axes names 'lable', but the selection has no indices of it"),
        (P("i"), r"argument 0\['a'\] has shape \(3, 2\); dimension 0 must be 'i', of size 6"),
        (P("label"), r"argument 0\['a'\] has shape \(3, 2\); .* 'label', of size 4"),
        (P(None, None, "label"), r"argument 0\['a'\] has shape \(3, 2\); dimension 2 must be"),
        (0, r"argument 0\['a'\] has shape \(3, 2\); .* must be 'element of .*, of size 5"),
    ],
)
def test_in_axes_fit_the_arguments_and_the_selection(factory, in_axes, message):
    fn = factory(lambda u, a: jnp.sum(u["x"]), in_axes)
    with pytest.raises(ValueError, match=message):
        fn(W, make(), {"a": np.zeros((3, 2))})


@every_factory
def test_parameters_are_those_that_select_was_given(factory):
    fn, selection = factory(lambda u: jnp.sum(u["x"])), psjax.replicas(LIKE, 1)
    with pytest.raises(ValueError, match=rf"{factory.__name__}: the parameters are not the tree"):
        fn({"x": W["x"]}, selection)
    selection = psjax.select(AXES, {"i": [[0]]}, like=LIKE)
    with pytest.raises(ValueError, match=r"\['x'\] has shape \(7,\), but axis 'i' .* had size 6"):
        fn(W | {"x": np.zeros(7)}, selection)


@every_factory
def test_a_split_selection_is_taken_apart_first(factory):
    with pytest.raises(ValueError, match=r"shape \(2, 1\); .* take this device's part"):
        factory(element)(W, psjax.replicas(LIKE, 2).split(2))
