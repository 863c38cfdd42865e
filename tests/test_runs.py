"""Theorems about elements that come in runs: the plain sum, and what is shared once per run."""

import functools
import re

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import cost

pytestmark = pytest.mark.usefixtures("x64")

S, D, H = 3, 4, 6
AXES = {"trunk": P(), "shift": P(), "rows": P("class"), "deep": P(None, "class")}
IN_AXES = (P("label"), P("pair"), None)
CHUNKS = [1, 2, 4, 9, 10, 45, 90, None]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def like(num_classes):
    shapes = {"trunk": (D, H), "shift": (), "rows": (num_classes, H), "deep": (2, num_classes)}
    return {n: normal(*s, seed=i) / 2 for i, (n, s) in enumerate(shapes.items())}


def arguments(num_classes):
    """Samples of every label, a number for every element, one for all."""
    sample = {"x": normal(num_classes, S, D, seed=10), "power": np.arange(num_classes) % 3 + 1}
    return sample, normal(num_classes * (num_classes - 1), seed=11), np.float64(0.7)


def element(u, sample, own, a):
    """Smooth; trunk, private weights, samples and the other arguments are all coupled."""
    hidden = jnp.tanh(sample["x"] @ u["trunk"] + u["shift"])
    scores = hidden @ u["rows"].T + jnp.sum(hidden**2)
    margin = scores[:, 1] - scores[:, 0] * u["deep"][0, 0]
    power = sample["power"].astype(own.dtype)
    return jnp.sum(jnp.tanh(margin / 3)) * own * power + a * jnp.sum(u["deep"] ** 2) * own**2


def select(num_classes, order=None, pairs=None, label=None):
    """Ordered pairs, sorted by label, or in another order; "pair" numbers them."""
    pairs = psjax.ordered_pairs(num_classes) if pairs is None else pairs
    E = num_classes * (num_classes - 1)
    number = pairs[:, 0] * (num_classes - 1) + pairs[:, 1] - (pairs[:, 1] > pairs[:, 0])
    label = pairs[:, 0] if label is None else label
    indices = {"class": pairs, "label": label, "pair": number.astype(np.int32)}
    if order is not None:
        indices = {name: index[order] for name, index in indices.items()}
    sizes = {"label": num_classes, "pair": E}
    return psjax.select(AXES, indices, like=like(num_classes), sizes=sizes)


@jax.jit
def plain_sum(w, pairs, label, number, weight, sample, own, a):
    """The sum over elements, with JAX's indexing: `weight` 0 leaves one out."""

    def one(pair, label, number):
        u = w | {"rows": w["rows"][pair], "deep": w["deep"][:, pair]}
        return element(u, jax.tree.map(lambda x: x[label], sample), own[number], a)

    return jnp.sum(weight * jax.vmap(one)(pairs, label, number))


value_and_gradient = jax.jit(jax.value_and_grad(plain_sum))


def plain(selection, w, args, fn=value_and_gradient, repeat=90):
    """Of the valid elements of a selection, whatever their number: one program."""
    index = [np.asarray(selection.indices[n]) for n in ("class", "label", "pair")]
    valid = np.asarray(selection.valid).astype(float)
    fill = lambda x: np.concatenate([x, np.repeat(x[:1], repeat - len(x), axis=0)])
    weight = np.concatenate([valid, np.zeros(repeat - len(valid))])
    return fn(jax.tree.map(jnp.asarray, w), *map(fill, index), weight, *args)


def assert_close(actual, expected, tolerance=1e-12):
    """Relative to the largest entry of the leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)


def shuffled(n):
    return np.random.default_rng(5).permutation(n)


# ------------------------------------------------------------------------------ what a run is


def test_a_selection_knows_its_runs():
    pairs, rng = psjax.ordered_pairs(10), np.random.default_rng(0)
    assert (select(10).run_length, select(10).run_axes) == (9, ("label",))
    assert select(10, shuffled(90)).run_length == 1
    assert select(10, shuffled(90)).run_axes == ()
    assert select(10, label=pairs[:, 1]).run_length == 1  # 1 2 ... 9 0 2 3 ...
    whole_runs = (9 * rng.permutation(10)[:, None] + np.arange(9)).reshape(-1)
    assert select(10, whole_runs).run_length == 9
    within = (9 * np.arange(10)[:, None] + rng.permutation(9)).reshape(-1)
    assert select(10, within).run_length == 9
    assert select(10)[9:27].run_length == 9
    assert 9 % select(10)[3:].run_length == 0
    ragged = [[0, 1], [0, 2], [0, 3], [1, 0], [1, 2], [2, 1]]
    one = psjax.select(P("i"), {"i": ragged, "label": [0, 0, 0, 1, 1, 2]}, like=np.zeros(4))
    assert one.run_length == 1  # runs of 3, 2 and 1
    for n in range(1, 17):
        split = select(10).split(n)
        assert split.valid.shape[1] % split.run_length == 0
        assert split.valid.sum() == 90


# ------------------------------------------------------------------------- the plain sum, exactly


@functools.cache
def everything(chunk_size):
    fn = psjax.value_and_grad(element, IN_AXES, chunk_size)
    each = psjax.element_value_and_grad(element, IN_AXES, chunk_size)
    f = psjax.partially_separable(element, IN_AXES, chunk_size)

    def run(w, selection, sample, own, a):
        values, grads = each(w, selection, sample, own, a)
        own_sum = values.sum(), selection.scatter_add(grads, w)
        scalar = jax.value_and_grad(f)(w, selection, sample, own, a)
        return fn(w, selection, sample, own, a), own_sum, scalar

    return jax.jit(run)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_value_and_gradient_are_those_of_the_plain_sum(chunk_size):
    """Sorted by label; then with elements that are not valid, by the same program."""
    w, args, selection = like(10), arguments(10), select(10)
    run = everything(chunk_size)
    for left_out in ([], [4], [0, 9, 80], range(18, 27), range(9), range(81, 90), range(1, 90)):
        selection.valid[:] = True
        selection.valid[list(left_out)] = False
        expected = plain(selection, w, args)
        for got in run(w, selection, *args):
            assert_close(got, expected)
    assert run._cache_size() == 1


@pytest.mark.parametrize("chunk_size", [1, 4, 9, None])
def test_selections_in_any_order_are_the_same_sum(chunk_size):
    w, args = like(10), arguments(10)
    expected = plain(select(10), w, args)
    fn = jax.jit(psjax.value_and_grad(element, IN_AXES, chunk_size))
    rng = np.random.default_rng(1)
    whole_runs = (9 * rng.permutation(10)[:, None] + rng.permutation(9)).reshape(-1)
    for order in (shuffled(90), whole_runs):
        assert_close(fn(w, select(10, order), *args), expected)
        assert_close(fn(w, select(10)[order], *args), expected)


ROWS = {
    "runs": slice(4, 12),
    "cut runs": slice(3, 17),
    "every second": slice(None, None, 2),
    "backwards": slice(None, None, -1),
    "a part of a run": np.array([1, 2]),
    "repeated": np.array([0, 0, 0, 5, 5, 5, 19, 19, 19]),
    "mixed": np.array([7, 0, 19, 3, 3]),
    "one": np.array([11]),
}


@pytest.mark.parametrize("rows", ROWS)
def test_some_of_the_elements_are_their_sum(rows):
    w, args = like(5), arguments(5)
    selection = select(5)[ROWS[rows]]
    got = jax.jit(psjax.value_and_grad(element, IN_AXES))(w, selection, *args)
    assert_close(got, plain(selection, w, args))


PARAMETER_RUNS = {  # how many elements have the same rows of the parameters, of the samples
    "longer": (6, 3),
    "shorter": (2, 6),
    "as long": (4, 4),
    "across": (4, 6),
    "all the same": (12, 12),
    "of parameters alone": (3, 1),
}


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("kind", PARAMETER_RUNS)
def test_rows_of_parameters_may_come_in_runs_too(kind, chunk_size):
    """Shared by a run, seen again by another one, in a run whose first element is not valid."""
    own, label = PARAMETER_RUNS[kind]
    pairs = np.array([[0, 1], [2, 1], [1, 0], [4, 3], [0, 1], [3, 1]])[np.arange(12) // own]
    w, args = like(5), arguments(5)
    indices = {"class": pairs, "label": 7 * (np.arange(12) // label) % 5, "pair": np.arange(12)}
    selection = psjax.select(AXES, indices, like=w, sizes={"label": 5, "pair": 20})
    selection.valid[[0, 7]] = False
    fn = jax.jit(psjax.value_and_grad(element, IN_AXES, chunk_size))
    assert_close(fn(w, selection, *args), plain(selection, w, args))


@pytest.mark.parametrize("n", range(1, 17))
def test_the_sum_over_workers_is_the_whole(n):
    """`selection.split(n)[i]`, where i is traced; 20 elements in runs of 4."""
    w, args, selection = like(5), arguments(5), select(5)
    fn = psjax.value_and_grad(element, IN_AXES)
    share = jax.jit(lambda w, i: fn(w, selection.split(n)[i], *args))
    total = [share(w, i) for i in range(n)]
    assert_close(jax.tree.map(lambda *x: sum(x), *total), plain(selection, w, args))
    assert share._cache_size() == 1


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_dropped_weights_are_zero_in_every_element(chunk_size):
    w, args, selection = like(5), arguments(5), select(5)
    keep = {
        "trunk": normal(D, H, seed=20) > -0.5,
        "shift": None,
        "rows": normal(5, 1, seed=21) > -0.5,
        "deep": normal(2, 5, seed=22) > -0.5,
    }
    masked = lambda w: {n: x if keep[n] is None else x * keep[n] for n, x in w.items()}
    fn = jax.jit(psjax.value_and_grad(element, IN_AXES, chunk_size))
    value, grads = plain(selection, masked(w), args)
    got = fn(w, selection.drop(keep), *args)
    assert_close(got, (value, masked(jax.tree.map(np.asarray, grads))))
    part = jax.jit(lambda w: fn(w, selection.drop(keep).split(3)[1], *args))(w)
    value, grads = plain(selection.split(3)[1], masked(w), args)
    assert_close(part, (value, masked(jax.tree.map(np.asarray, grads))))


@pytest.mark.parametrize("chunk_size", [1, 6])
def test_derivatives_of_every_order_are_those_of_the_plain_sum(chunk_size):
    """With respect to the parameters, and to the other arguments."""
    w, (sample, own, a), selection = like(4), arguments(4), select(4)
    w = jax.tree.map(jnp.asarray, w)
    selection.valid[[4, 9, 10, 11]] = False
    tangent = jax.tree.map(lambda x: normal(*x.shape, seed=x.size), w)
    f = psjax.partially_separable(element, IN_AXES, chunk_size)
    ours = lambda w, x, own, a: f(w, selection, sample | {"x": x}, own, a)
    pairs, label, number = (selection.indices[n] for n in ("class", "label", "pair"))
    weight = selection.valid.astype(float)

    def theirs(w, x, own, a):
        return plain_sum(w, pairs, label, number, weight, sample | {"x": x}, own, a)

    assert_close(
        orders(ours)(w, sample["x"], own, a, tangent), reference(theirs, w, sample, own, a)
    )


def orders(f):
    def run(w, x, own, a, v):
        g = lambda w: f(w, x, own, a)
        small = lambda w2: g(w | w2)
        return {
            "jvp": jax.jvp(g, (w,), (v,)),
            "forward over reverse": jax.jvp(jax.grad(g), (w,), (v,)),
            "reverse over forward": jax.grad(lambda w: jax.jvp(g, (w,), (v,))[1])(w),
            "hessian": jax.hessian(small)({"shift": w["shift"], "rows": w["rows"]}),
            "other arguments": jax.grad(f, (1, 2, 3))(w, x, own, a),
        }

    return jax.jit(run)


@functools.cache
def computed_once():
    return {}


def reference(theirs, w, sample, own, a):
    """One compilation for all chunk sizes."""
    found = computed_once()
    if not found:
        tangent = jax.tree.map(lambda x: normal(*x.shape, seed=x.size), w)
        found.update(orders(theirs)(w, sample["x"], own, a, tangent))
    return found


# -------------------------------------------------------------------- other arguments and results


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_rows_of_in_axes_0_go_with_their_elements(chunk_size):
    w, (sample, own, a), selection = like(5), arguments(5), select(5)
    axes, indices = AXES, {n: selection.indices[n] for n in ("class", "label")}
    without = psjax.select(axes, indices, like=w, sizes={"label": 5})
    assert without.run_length == 4
    fn = jax.jit(psjax.value_and_grad(element, (P("label"), 0, None), chunk_size))
    assert_close(fn(w, without, sample, own, a), plain(selection, w, (sample, own, a)))
    order = shuffled(20)
    got = fn(w, without[order], sample, own[order], a)
    assert_close(got, plain(selection, w, (sample, own, a)))


@pytest.mark.parametrize("chunk_size", [1, 2, 7, None])
def test_what_elements_return_beside_their_value_is_theirs(chunk_size):
    """Of an element, of its run, of all, of none; zero where an element is not valid."""
    w, (sample, own, a), selection = like(5), arguments(5), select(5)
    selection.valid[[2, 8, 9, 10, 11]] = False

    def with_aux(u, sample, own, a):
        aux = {
            "element": u["rows"][0] * own,
            "run": jnp.sum(sample["x"] @ u["trunk"]),
            "all": u["trunk"][0] + a,
            "none": jnp.arange(3),
            "value": element(u, sample, own, a),
        }
        return element(u, sample, own, a), aux

    fn = jax.jit(psjax.value_and_grad(with_aux, IN_AXES, chunk_size, has_aux=True))
    (value, aux), grads = fn(w, selection, sample, own, a)
    assert_close((value, grads), plain(selection, w, (sample, own, a)))
    pairs, ok = selection.indices["class"], selection.valid
    own_of = lambda x: np.where(ok.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
    expected = {
        "element": own_of(w["rows"][pairs[:, 0]] * own[:, None]),
        "run": own_of(np.array([np.sum(sample["x"][k] @ w["trunk"]) for k in pairs[:, 0]])),
        "all": own_of(np.broadcast_to(w["trunk"][0] + a, (20, H))),
        "none": own_of(np.broadcast_to(np.arange(3), (20, 3))),
    }
    values = aux.pop("value")
    assert_close(aux, expected)
    assert aux["none"].dtype == np.arange(3).dtype
    each = jax.jit(psjax.element_value_and_grad(element, IN_AXES, chunk_size))
    assert_close(each(w, selection, sample, own, a)[0], values)


FUNCTIONS = {
    "of the run alone": lambda u, x, own: jnp.sum(jnp.sin(x @ u["trunk"])),
    "of all alone": lambda u, x, own: jnp.sum(u["trunk"] ** 2),
    "of the element alone": lambda u, x, own: jnp.sum(u["rows"] ** 3) * own,
    "of its data alone": lambda u, x, own: own**2,
    "constant": lambda u, x, own: 3.5,
}


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_element_function_may_use_as_little_as_it_likes(function, chunk_size):
    w, (sample, own, _), selection = like(5), arguments(5), select(5)
    selection.valid[6] = False
    one = FUNCTIONS[function]
    fn = psjax.value_and_grad(one, (P("label"), P("pair")), chunk_size)
    value, grads = 0.0, jax.tree.map(np.zeros_like, w)
    for e in np.flatnonzero(selection.valid):
        pair, x, c = selection.indices["class"][e], sample["x"][e // 4], own[e]
        if function == "of the run alone":
            value += np.sin(x @ w["trunk"]).sum()
            grads["trunk"] += x.T @ np.cos(x @ w["trunk"])
        elif function == "of all alone":
            value += np.sum(w["trunk"] ** 2)
            grads["trunk"] += 2 * w["trunk"]
        elif function == "of the element alone":
            value += np.sum(w["rows"][pair] ** 3) * c
            grads["rows"][pair] += 3 * w["rows"][pair] ** 2 * c
        else:
            value += c**2 if "data" in function else 3.5
    assert_close(jax.jit(fn)(w, selection, sample["x"], own), (value, grads))


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_replicas_share_everything(chunk_size):
    w, (sample, own, a) = like(5), arguments(5)
    w["rows"], w["deep"] = w["rows"][:2], w["deep"][:, :2]
    one = {"x": sample["x"][0], "power": sample["power"][0]}
    selection = psjax.replicas(w, 6)
    fn = jax.jit(psjax.value_and_grad(element, (None, 0, None), chunk_size))

    def whole(w):
        return sum(element(w, one, own[e], a) for e in range(6))

    expected = jax.jit(jax.value_and_grad(whole))(jax.tree.map(jnp.asarray, w))
    assert_close(fn(w, selection, one, own[:6], a), expected)


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_random_partition_shares_what_is_not_divided(chunk_size):
    """Uneven shares; the samples of all are the same."""
    w, x = {"trunk": normal(D, H), "rows": normal(7, H, seed=1)}, normal(S, D, seed=2)
    axes = {"trunk": P(), "rows": P("hidden")}
    selection = psjax.random_partition(jax.random.key(0), axes, {"hidden": 7}, num_elements=3)
    one = lambda u, x: jnp.sum(jnp.tanh(jnp.tanh(x @ u["trunk"]) @ u["rows"].T))
    rows = [[int(i) for i in own if i < 7] for own in selection.indices["hidden"]]
    assert sorted(sum(rows, [])) == list(range(7))

    def whole(w):
        return sum(one(w | {"rows": w["rows"][np.array(own)]}, x) for own in rows)

    got = jax.jit(psjax.value_and_grad(one, chunk_size=chunk_size))(w, selection, x)
    assert_close(got, jax.jit(jax.value_and_grad(whole))(jax.tree.map(jnp.asarray, w)))


# ---------------------------------------------------------------------------------- many devices


@pytest.mark.parametrize(
    ("how", "num_classes"),
    [(how, 5) for how in ("shard", "pmap", "own pmap", "shard_map", "no vma")]
    + [("shard", 10), ("own pmap", 10)],
)
def test_eight_devices_are_one(how, num_classes):
    """20 elements in runs of 4: three each; 90 in runs of 9."""
    w, args, selection = like(num_classes), arguments(num_classes), select(num_classes)
    selection.valid[[5, num_classes]] = False
    fn = psjax.value_and_grad(element, IN_AXES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), "d")
    total = lambda *operands: jax.lax.psum(fn(*operands), "d")
    in_axes = (None, 0, None, None, None)
    if how == "shard":
        got = jax.jit(psjax.shard(fn, mesh))(w, selection, *args)
    elif how == "pmap":
        got = psjax.pmap(fn)(w, selection, *args)
    elif how == "own pmap":
        mapped = jax.pmap(total, "d", in_axes=in_axes, out_axes=None)
        got = mapped(w, selection.split(8), *args)
    else:
        mapped = jax.shard_map(
            lambda w, s, *args: total(w, jax.tree.map(lambda x: x[0], s), *args),
            mesh=mesh,
            in_specs=(P(), P("d"), P(), P(), P()),
            out_specs=P(),
            check_vma=how == "shard_map",
        )
        got = jax.jit(mapped)(w, selection.split(8), *args)
    assert_close(got, plain(selection, w, args))


@pytest.mark.parametrize("check_vma", [True, False])
def test_the_scalar_over_eight_devices_has_the_gradient_and_the_product_of_one(check_vma):
    w, args, selection = like(5), arguments(5), select(5)
    w = jax.tree.map(jnp.asarray, w)
    f = psjax.partially_separable(element, IN_AXES)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]), "d")

    def own(w, s):
        g = lambda w: f(w, jax.tree.map(lambda x: x[0], s), *args)
        both = jax.jvp(jax.grad(g), (w,), (w,))
        return both if check_vma else jax.lax.psum(both, "d")

    specs = {"in_specs": (P(), P("d")), "out_specs": P(), "check_vma": check_vma}
    got = jax.jit(jax.shard_map(own, mesh=mesh, **specs))(w, selection.split(8))
    whole = lambda w: jax.grad(plain_sum)(
        w, *(selection.indices[n] for n in ("class", "label", "pair")), np.ones(20), *args
    )
    assert_close(got, jax.jit(lambda w: jax.jvp(whole, (w,), (w,)))(w))


# ------------------------------------------------------------------ once per run: the programs


def dense(u, x):
    """A trunk of many products, a private part of few."""
    hidden = jnp.tanh(x @ u["trunk"])
    return jnp.sum(jnp.tanh(hidden @ u["rows"].T))


BIG = {
    "trunk": jax.ShapeDtypeStruct((64, 32), np.float32),
    "rows": jax.ShapeDtypeStruct((10, 32), np.float32),
}
SAMPLES = jax.ShapeDtypeStruct((10, 8, 64), np.float32)


def big(num_classes=10, order=None):
    pairs = psjax.ordered_pairs(num_classes)
    pairs = pairs if order is None else pairs[order]
    params = BIG | {"rows": jax.ShapeDtypeStruct((num_classes, 32), np.float32)}
    axes, indices = {"trunk": P(), "rows": P("class")}, {"class": pairs, "label": pairs[:, 0]}
    selection = psjax.select(axes, indices, like=params)
    return params, selection, jax.ShapeDtypeStruct((num_classes, 8, 64), np.float32)


def flops(fn, *operands):
    return cost.ledger(jax.jit(fn).lower(*operands).compile()).flops


@functools.cache
def by_label(transform):
    """Operations where each label's trunk is evaluated once, by hand."""
    params, _, x = big()
    others = jax.ShapeDtypeStruct((9, 2, 32), np.float32)

    def run(trunk, rows, x):
        hidden = jnp.tanh(x @ trunk)
        return jnp.sum(jnp.tanh(jnp.einsum("sh,jkh->jsk", hidden, rows)))

    one = {
        "value": run,
        "gradient": jax.value_and_grad(run, (0, 1)),
        "product": lambda t, r, x: jax.jvp(
            jax.grad(lambda t, r: run(t, r, x), (0, 1)), (t, r), (t, r)
        ),
    }[transform]
    return 10 * flops(one, params["trunk"], others, jax.ShapeDtypeStruct(x.shape[1:], x.dtype))


TRANSFORMS = {
    "value": lambda f, w, s, x: f(w, s, x),
    "gradient": lambda f, w, s, x: jax.value_and_grad(f)(w, s, x),
    "product": lambda f, w, s, x: jax.jvp(jax.grad(lambda w: f(w, s, x)), (w,), (w,)),
}


@pytest.mark.parametrize("chunk_size", [9, 45, 90, None])
def test_the_trunk_is_evaluated_once_per_label(chunk_size):
    params, selection, x = big()
    fn = psjax.value_and_grad(dense, P("label"), chunk_size)
    assert flops(fn, params, selection, x) <= 1.2 * by_label("gradient")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("chunk_size", [90, None])
def test_the_scalar_and_its_derivatives_evaluate_the_trunk_once_per_label(transform, chunk_size):
    params, selection, x = big()
    f = psjax.partially_separable(dense, P("label"), chunk_size)
    fn = functools.partial(TRANSFORMS[transform], f)
    assert flops(fn, params, selection, x) <= 1.2 * by_label(transform)


@pytest.mark.parametrize("chunk_size", [90, None])
def test_the_values_of_all_elements_come_at_the_same_price(chunk_size):
    params, selection, x = big()
    both = lambda u, x: (dense(u, x),) * 2
    fn = psjax.value_and_grad(both, P("label"), chunk_size, has_aux=True)
    assert flops(fn, params, selection, x) <= 1.2 * by_label("gradient")


@pytest.mark.parametrize("n", [2, 5, 10])
def test_a_worker_s_share_of_whole_runs_evaluates_the_trunk_once_per_label(n):
    params, selection, x = big()
    fn = psjax.value_and_grad(dense, P("label"))
    share = lambda w, s, i, x: fn(w, s.split(n)[i], x)
    got = flops(share, params, selection, jax.ShapeDtypeStruct((), np.int32), x)
    assert got <= 1.2 * by_label("gradient") / n


def test_masks_and_elements_that_are_not_valid_leave_the_trunk_shared():
    params, selection, x = big()
    selection.valid[[4, 20]] = False
    keep = {"trunk": np.ones((64, 32), bool), "rows": None}
    fn = psjax.value_and_grad(dense, P("label"))
    assert flops(fn, params, selection.drop(keep), x) <= 1.2 * by_label("gradient")


def net():
    """A trunk whose kernels, with the pooling folded in, are 5x5, which nothing else is."""
    return psjax.models.PSNet(10, (7,), 3, (2,), kernel_sizes=(4, 2), pools=(2, 1))


def grouped(text):
    """`(groups, line)` of every convolution of a program's text."""
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    of = lambda line: max(
        int(n) for n in re.findall(r"(?:feature|batch)_group_count = (\d+)", line)
    )
    return [(of(line), line) for line in lines]


@pytest.mark.parametrize(("chunk_size", "order"), [(90, "runs"), (None, "runs"), (90, "shuffled")])
def test_no_convolution_for_cuda_has_a_group_for_each_element_of_the_shared_trunk(
    chunk_size, order
):
    module, images = net(), jax.ShapeDtypeStruct((10, 2, 11, 11, 1), np.float64)
    variables = jax.eval_shape(module.init, jax.random.key(0), np.zeros((2, 11, 11, 1)))
    params = flax.linen.unbox(variables)["params"]
    axes = flax.linen.get_partition_spec(variables)["params"]
    pairs = psjax.ordered_pairs(10)
    pairs = pairs if order == "runs" else pairs[shuffled(90)]
    selection = psjax.select(axes, {"class": pairs, "label": pairs[:, 0]}, like=params)
    small = module.clone(num_classes=2)

    def h(w, image):
        scores = small.apply({"params": w}, image)
        return jnp.sum(jnp.exp(scores[:, 1] - scores[:, 0]))

    fn = jax.jit(psjax.value_and_grad(h, P("label"), chunk_size))
    lowered = fn.trace(params, selection, images).lower(lowering_platforms=("cuda",))
    found = grouped(lowered.as_text())
    trunk = [groups for groups, line in found if "5x5x" in line or "x5x5" in line]
    assert len(trunk) >= 2  # forward, and the gradient of the kernel
    assert max(trunk) == 1


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("chunk_size", [90, None])
def test_the_text_of_a_program_does_not_grow_with_the_number_of_elements(chunk_size, platform):
    def text(num_classes):
        fn = jax.jit(psjax.value_and_grad(dense, P("label"), chunk_size))
        return fn.trace(*big(num_classes)).lower(lowering_platforms=(platform,)).as_text()

    assert len(text(60)) < 1.05 * len(text(20))


def test_new_index_sets_never_trace_again():
    traces = []

    def counted(u, x):
        traces.append(1)
        return dense(u, x)

    params, _, x = big()
    w = jax.tree.map(lambda p: jnp.asarray(normal(*p.shape), p.dtype), params)
    x = jnp.asarray(normal(*x.shape), x.dtype)
    fn = jax.jit(psjax.value_and_grad(counted, P("label")))
    pairs, values, first = psjax.ordered_pairs(10), [], 0
    for seed in range(4):  # other names of the classes; the runs stay
        new = np.random.default_rng(seed).permutation(10).astype(np.int32)[pairs]
        indices = {"class": new, "label": new[:, 0]}
        selection = psjax.select({"trunk": P(), "rows": P("class")}, indices, like=params)
        values.append(fn(w, selection, x)[0])
        first = first or len(traces)
    assert len(traces) == first
    assert fn._cache_size() == 1
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


def test_one_run_after_another_does_not_hold_the_temporaries_of_all_elements():
    """A private part whose intermediate arrays are large: 9 elements at once, or 90."""
    params, selection, x = big()
    wide = lambda u, x: jnp.sum(jnp.sin(jnp.outer(jnp.sum(u["rows"], 0), jnp.tanh(x @ u["trunk"]))))

    def temporaries(chunk_size):
        fn = jax.jit(psjax.value_and_grad(wide, P("label"), chunk_size))
        return cost.ledger(fn.lower(params, selection, x).compile()).memory.temp

    assert 5 * temporaries(9) < temporaries(90)
    assert temporaries(1) <= temporaries(9)
