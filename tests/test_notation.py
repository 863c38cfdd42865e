"""Theorems about dimensions that are products or concatenations of axes: dense matrices U_e.

The reference knows one rule: a dimension lists its terms one after another, and a term its factors
in row-major order. U_e is a 0/1 matrix, built entry by entry.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax

pytestmark = pytest.mark.usefixtures("x64", "strict")

SIZES = {"hidden": 4, "out": 6, "heads": 3, "dim": 2, "groups": 2}
AXES = {
    "flattened": P("3*hidden", "out"),  # a convolution's channels after flattening
    "fused": P(None, "3*heads*dim"),  # query, key, value
    "unequal": P("heads*dim+2*groups*dim"),  # fewer keys and values than queries
    "skip": P("hidden+out", None),  # a U-Net's two inputs
    "extra": P("hidden+7"),
    "doubled": P("hidden+hidden", "groups"),
    "square": P("out*hidden"),
    "two": P("hidden+2*out", "dim*3+groups"),
    "itself": P("hidden*hidden"),
    "plain": P("heads", None, "dim"),
    "shared": P(),
}


def terms(entry):
    """Terms of a dimension, each a list of factors, numbers or names."""
    factors = lambda term: [int(x) if x.isdigit() else x for x in term.split("*")]
    return [factors(term) for term in entry.split("+")]


def size(entry):
    total = 0
    for term in terms(entry):
        n = 1
        for factor in term:
            n *= factor if isinstance(factor, int) else SIZES[factor]
        total += n
    return total


SHAPES = {
    name: tuple(2 if entry is None else size(entry) for entry in spec)
    for name, spec in AXES.items()
}
SHAPES["skip"], SHAPES["plain"], SHAPES["shared"] = (10, 2), (3, 5, 2), (3,)
LIKE = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in SHAPES.items()}

INDICES = {
    "partition": {"hidden": [[0, 3], [1], [2]]},
    "overlap": {"hidden": [[0, 1, 2], [1, 2, 3], [3, 0, 1]]},
    "one row": {"hidden": [3, 0, 3]},
    "an element twice": {"out": [[5, 0], [5, 0], [1, 2]], "dim": [[1], [1], [0]]},
    "ragged": {"hidden": [[0, 1, 2], [3], [2, 1]], "out": [[5], [0, 2, 4], [1, 3]]},
    "every axis": {
        "hidden": [[1, 2], [0, 3], [2, 0]],
        "out": [[0, 5, 2], [1, 2, 3], [4, 3, 0]],
        "heads": [[0, 2], [1, 2], [2, 0]],
        "dim": [[1], [0], [1]],
        "groups": [[0, 1], [1, 0], [0, 1]],
    },
    "every axis, one row": {
        "hidden": [1, 0, 1],
        "out": [5, 2, 2],
        "heads": [0, 1, 0],
        "dim": [1, 0, 1],
        "groups": [0, 1, 1],
    },
    "rows and one row": {"hidden": [2, 2, 0], "heads": [[0, 1], [1, 2], [0, 2]], "dim": [0, 1, 1]},
}
KEY = jax.random.key(3)
PARTITIONS = {
    "random partition": ({"hidden": 4, "out": 6}, 2, False),
    "random partition, uneven": ({"hidden": 4, "out": 6}, 4, False),
    "random partition, stratified": ({"hidden": 4}, 2, True),
    "random partition of all": (SIZES, 2, False),
}


def make(kind, leaves=tuple(AXES)):
    axes, like = {n: AXES[n] for n in leaves}, {n: LIKE[n] for n in leaves}
    if kind in PARTITIONS:
        sizes, n, stratified = PARTITIONS[kind]
        return psjax.random_partition(
            KEY, axes, sizes, num_elements=n, stratified=stratified, like=like
        )
    if kind == "an element that is not valid":
        selection = psjax.select(axes, INDICES["overlap"], like=like)
        selection.valid[1] = False
        return selection
    return psjax.select(axes, INDICES[kind], like=like)


KINDS = [*INDICES, *PARTITIONS, "an element that is not valid"]


def positions(entry, n, index):
    """Places in a dimension of size n that an element sees, None for padding; and if it is kept."""
    if entry is None:
        return list(range(n)), True
    found, start, kept = [], 0, "+" in entry
    for term in terms(entry):
        rows, sizes = [], []
        for factor in term:
            whole = factor if isinstance(factor, int) else SIZES[factor]
            sizes.append(whole)
            if factor in index:
                rows.append([int(i) for i in np.atleast_1d(index[factor])])
                kept = kept or np.ndim(index[factor]) == 1
            else:
                rows.append(list(range(whole)))
                kept = True
        for row in itertools.product(*rows):
            place = 0
            for i, whole in zip(row, sizes):
                place = place * whole + i
            padding = any(i >= whole for i, whole in zip(row, sizes))
            found.append(None if padding else start + place)
        start += int(np.prod(sizes))
    return found, kept


def matrix(name, index):
    """U_e of one leaf, 0 and 1, `[entries seen, entries]`, and the shape of what is seen."""
    shape, spec = SHAPES[name], [*AXES[name], *[None] * len(SHAPES[name])]
    chosen, seen = [], []
    for n, entry in zip(shape, spec):
        found, kept = positions(entry, n, index)
        chosen.append(found)
        if kept:
            seen.append(len(found))
    U = np.zeros((int(np.prod([len(x) for x in chosen])), int(np.prod(shape))))
    for row, place in enumerate(itertools.product(*chosen)):
        if None not in place:
            U[row, np.ravel_multi_index(place, shape)] = 1
    return U, tuple(seen)


def matrices(selection):
    """`{name: [(e, U_e, shape seen)]}` of the valid elements."""
    index = lambda e: {name: np.asarray(x)[e] for name, x in selection.indices.items()}
    valid = np.flatnonzero(selection.valid)
    return {name: [(int(e), *matrix(name, index(e))) for e in valid] for name in SHAPES}


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


W = {name: normal(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
MASKS = {
    "nothing": dict.fromkeys(SHAPES),
    "entries": {n: normal(s, 50 + i) > -0.5 for i, (n, s) in enumerate(SHAPES.items())},
    "rows, columns, leaves": dict.fromkeys(SHAPES)
    | {
        "flattened": normal((12, 1), 60) > 0,
        "fused": normal((1, 18), 61) > 0,
        "two": normal((16, 1), 62) > 0,
        "unequal": False,
        "skip": np.array([[True, False]]),
        "shared": np.True_,
    },
}


def full(keep, name):
    x = keep[name]
    return np.broadcast_to(True if x is None else x, SHAPES[name])


@functools.cache
def computed(kind, dropped="nothing"):
    """All that the library says of one kind of selection, as one compiled function."""
    selection = make(kind)
    if dropped != "nothing":
        selection = selection.drop(MASKS[dropped])
    # What invalid elements and padding hold is not zero.
    y = jax.tree.map(lambda x: normal(x.shape, x.size), jax.eval_shape(selection.gather, LIKE))

    @jax.jit
    def everything(selection, w, y):
        return {
            "gather": selection.gather(w),
            "scatter_add": selection.scatter_add(y, w),
            "scatter_mean": selection.scatter_mean(y, w),
            "counts": selection.counts(w),
        }

    return selection, y, jax.tree.map(np.asarray, everything(selection, W, y))


def assert_close(actual, expected, tolerance=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        where = jax.tree_util.keystr(path)
        assert np.shape(a) == np.shape(b), where
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=where)


def flat(x):
    return np.asarray(x).reshape(-1)


# ------------------------------------------------------------------------- against the matrices


@pytest.mark.parametrize(
    ("kind", "dropped"),
    [(kind, "nothing") for kind in KINDS]
    + [(kind, "entries") for kind in ("ragged", "rows and one row", "random partition, uneven")]
    + [(kind, "rows, columns, leaves") for kind in ("every axis", "random partition of all")],
)
def test_all_that_a_selection_does_is_what_its_matrices_do(kind, dropped):
    selection, y, got = computed(kind, dropped)
    keep = MASKS[dropped]
    for name, own in matrices(selection).items():
        w, mask = flat(W[name]), flat(full(keep, name)).astype(float)
        total, holders = np.zeros(w.size), np.zeros(w.size)
        assert got["gather"][name].shape == (selection.num_elements, *own[0][2])
        for e, U, seen in own:
            expected = (U @ (mask * w)).reshape(seen)
            np.testing.assert_array_equal(got["gather"][name][e], expected, err_msg=name)
            total += mask * (U.T @ flat(y[name][e]))
            holders += mask * U.sum(axis=0)
        mean = np.where(holders > 0, total / np.maximum(holders, 1), w)  # w + U^+ (y - U w)
        assert_close(got["scatter_add"][name], total.reshape(SHAPES[name]))
        assert_close(got["counts"][name], holders.reshape(SHAPES[name]), 0)
        assert_close(got["scatter_mean"][name], mean.reshape(SHAPES[name]))
        free = holders.reshape(SHAPES[name]) == 0
        np.testing.assert_array_equal(got["scatter_mean"][name][free], W[name][free])


def test_the_mean_is_the_pseudo_inverse():
    selection, y, got = computed("ragged")
    for name, own in matrices(selection).items():
        U = np.concatenate([U for _, U, _ in own])
        ys = np.concatenate([flat(y[name][e]) for e, _, _ in own])
        real = U.sum(axis=1) > 0
        w = flat(W[name])
        expected = w + np.linalg.pinv(U[real]) @ (ys[real] - U[real] @ w)
        np.testing.assert_allclose(flat(got["scatter_mean"][name]), expected, 0, 1e-12)


@pytest.mark.parametrize("kind", ["random partition", "random partition, stratified"])
def test_every_row_of_a_random_partition_has_one_holder(kind):
    _, _, got = computed(kind)
    for name in ("extra", "doubled", "skip"):
        divided = 4 if name == "extra" else (10 if kind == "random partition" else 4)
        divided = 8 if name == "doubled" else divided
        np.testing.assert_array_equal(got["counts"][name][:divided], 1)
        np.testing.assert_array_equal(got["counts"][name][divided:], 2)


def test_scatter_add_is_the_transpose_of_gather():
    selection, y, got = computed("rows and one row")
    transpose = jax.jit(lambda y: jax.linear_transpose(selection.gather, LIKE)(y)[0])
    assert_close(transpose(y), got["scatter_add"])


def test_the_parts_of_a_split_do_what_the_whole_does():
    selection, y, got = computed("ragged")
    parts, rows = selection.split(2), np.array([[0, 1], [2, 2]])
    parts_of = lambda w: jax.tree.map(lambda x: x[w], parts)
    fn = jax.jit(lambda s, y: (s.scatter_add(y, W), s.counts(W)))
    one = [fn(parts_of(w), jax.tree.map(lambda x: x[rows[w]], y)) for w in range(2)]  # noqa: B023
    add, counts = jax.tree.map(lambda *x: sum(x), *one)
    assert_close(add, got["scatter_add"])
    assert_close(counts, got["counts"], 0)


def test_new_index_sets_are_no_new_program():
    traces = []

    @jax.jit
    def fn(selection, w):
        traces.append(1)
        return selection.scatter_mean(selection.gather(w), w)

    for seed in range(3):
        rows = np.random.default_rng(seed).permutation(4).reshape(2, 2)
        assert_close(fn(psjax.select(AXES, {"hidden": rows}, like=LIKE), W), W, 1e-15)
    for seed in range(3):
        selection = psjax.random_partition(jax.random.key(seed), AXES, SIZES, num_elements=2)
        assert_close(fn(selection, W), W, 1e-15)
    assert len(traces) == 2


# ---------------------------------------------------------------------------- value and gradient


def element(w, scale):
    """A function of every entry, in its place, in which all entries are coupled."""
    inner = 0.0
    for i, name in enumerate(sorted(w)):
        x = w[name].reshape(-1)
        inner = inner + jnp.sum(jnp.sin(x + i) * jnp.cos(jnp.arange(1.0, 1 + x.size) * (i + 1)))
    return scale * jnp.tanh(inner / 5) + inner**2 / 50


SCALES = np.array([0.5, 2.0, -1.0, 0.7])


FEW = ("flattened", "unequal", "two", "itself", "plain", "shared")
V = {name: W[name] for name in FEW}


def few(kind, dropped="nothing"):
    """A selection of some leaves, and its row of arguments."""
    selection = make(kind, FEW)
    if dropped != "nothing":
        selection = selection.drop({name: MASKS[dropped][name] for name in FEW})
    return selection, SCALES[: selection.num_elements]


def plain(kind, dropped="nothing"):
    """Value, gradient and the Hessian times W of the sum, by dense matrices and the chain rule."""
    selection = make(kind)
    own, keep = matrices(selection), MASKS[dropped]
    value, grads = 0.0, {name: np.zeros(w.size) for name, w in V.items()}
    products = {name: np.zeros(w.size) for name, w in V.items()}
    for n, e in enumerate(np.flatnonzero(selection.valid)):
        inner, slope, seen = 0.0, 0.0, {}
        for i, name in enumerate(sorted(V)):
            U = own[name][n][1] * flat(full(keep, name))
            x, coefficients = U @ flat(W[name]), np.cos(np.arange(1.0, 1 + len(U)) * (i + 1))
            inner += np.sum(np.sin(x + i) * coefficients)
            slope += np.sum(np.cos(x + i) * coefficients * x)
            seen[name] = U, x, np.cos(x + i) * coefficients, -np.sin(x + i) * coefficients
        t = np.tanh(inner / 5)
        value += SCALES[e] * t + inner**2 / 50
        first = SCALES[e] * (1 - t**2) / 5 + inner / 25
        second = SCALES[e] * -2 * t * (1 - t**2) / 25 + 1 / 25
        for name, (U, x, d, dd) in seen.items():
            grads[name] += U.T @ (first * d)
            products[name] += U.T @ (second * slope * d + first * dd * x)
    shaped = lambda tree: {name: x.reshape(SHAPES[name]) for name, x in tree.items()}
    return (value, shaped(grads)), shaped(products)


@pytest.mark.parametrize(
    ("kind", "chunk_size"),
    [(kind, None) for kind in ("overlap", "every axis", "random partition, uneven")]
    + [("ragged", 1), ("ragged", 2), ("every axis, one row", 2), ("rows and one row", 1)]
    + [("an element that is not valid", 2)],
)
def test_value_and_grad_is_that_of_the_plain_sum(kind, chunk_size):
    selection, scales = few(kind)
    fn = jax.jit(psjax.value_and_grad(element, 0, chunk_size))
    assert_close(fn(V, selection, scales), plain(kind)[0])


def test_value_and_grad_with_dropped_weights():
    for kind in ("ragged", "rows and one row"):
        fn = jax.jit(psjax.value_and_grad(element, 0))
        got = fn(V, *few(kind, "entries"))
        assert_close(got, plain(kind, "entries")[0])


def test_element_gradients_scatter_to_the_whole():
    selection, scales = few("ragged")
    values, grads = jax.jit(psjax.element_value_and_grad(element, 0))(V, selection, scales)
    seen = jax.eval_shape(selection.gather, V)
    assert jax.tree.map(np.shape, grads) == jax.tree.map(lambda x: x.shape, seen)
    add = jax.jit(lambda y: selection.scatter_add(y, V))
    assert_close((values.sum(), add(grads)), plain("ragged")[0])


def test_the_scalar_has_the_second_derivative_of_the_plain_sum():
    f, (selection, scales) = psjax.partially_separable(element, 0), few("rows and one row")
    grad = jax.grad(lambda w: f(w, selection, scales))
    got = jax.jit(lambda w: jax.jvp(grad, (w,), (V,))[1])(jax.tree.map(jnp.asarray, V))
    assert_close(got, plain("rows and one row")[1], 1e-11)


def test_samples_are_selected_by_the_same_notation():
    """Three positions of every label, and rows of two kinds, one after another."""
    x = normal((6 * 3, 2), 70)
    rows = normal(6 + 2, 71)
    labels = np.array([[0, 5], [2, 3], [5, 1]])
    selection = psjax.select(P(), {"label": labels}, like=np.zeros(2), sizes={"label": 6})
    fn = psjax.value_and_grad(
        lambda w, x, r: jnp.sum(jnp.sin(x @ w) * jnp.arange(1.0, 7.0)) + jnp.sum(r**2 * w[0]),
        (P("3*label"), P("label+2")),
    )

    def whole(w):
        total = 0.0
        for own in labels:
            seen = np.concatenate([x[6 * p + own] for p in range(3)])
            total += jnp.sum(jnp.sin(seen @ w) * jnp.arange(1.0, 7.0))
            total += jnp.sum(np.concatenate([rows[own], rows[6:]]) ** 2) * w[0]
        return total

    w = jnp.array([0.3, -0.7])
    assert_close(jax.jit(fn)(w, selection, x, rows), jax.value_and_grad(whole)(w))


# ---------------------------------------------------------------------------- sizes, and refusals


def leaves(**shapes):
    return {name: np.zeros(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("axes", "shapes", "sizes"),
    [
        ({"a": P("4*h")}, {"a": (12,)}, {"h": 3}),
        ({"a": P("h+7")}, {"a": (9,)}, {"h": 2}),
        ({"a": P("h+h")}, {"a": (10,)}, {"h": 5}),
        ({"a": P("3*h+h+1")}, {"a": (9,)}, {"h": 2}),
        ({"a": P("h*d"), "b": P("d")}, {"a": (12,), "b": (4,)}, {"h": 3, "d": 4}),
        ({"a": P("h+d"), "b": P(None, "d+2")}, {"a": (7,), "b": (1, 6)}, {"h": 3, "d": 4}),
        (  # one after another, whatever the order of the leaves
            {"a": P("h*d"), "b": P("d*e"), "c": P("e+1")},
            {"a": (12,), "b": (20,), "c": (6,)},
            {"h": 3, "d": 4, "e": 5},
        ),
    ],
)
def test_sizes_are_what_the_dimensions_say(axes, shapes, sizes):
    selection = psjax.select(axes, {"h": [[0], [1]]}, like=leaves(**shapes))
    assert selection.sizes == sizes


def test_sizes_that_the_dimensions_do_not_say_may_be_given():
    like = leaves(a=(12,))
    selection = psjax.select(
        P("3*heads*dim"), {"heads": [[0], [1]]}, like=like["a"], sizes={"dim": 2}
    )
    assert selection.sizes == {"heads": 2, "dim": 2}
    np.testing.assert_array_equal(selection.gather(np.arange(12.0))[1], [2, 3, 6, 7, 10, 11])


REFUSED = {
    "not a multiple": ({"a": P("4*h")}, {"a": (17,)}, r"\['a'\] has size 17, but '4\*h'"),
    "nothing left": ({"a": P("h+7")}, {"a": (7,)}, r"\['a'\] has size 7, but 'h\+7'"),
    "less than nothing": ({"a": P("h+7")}, {"a": (5,)}, r"\['a'\] has size 5, but 'h\+7'"),
    "odd": ({"a": P("h+h")}, {"a": (9,)}, r"\['a'\] has size 9, but 'h\+h'"),
    "two leaves": (
        {"a": P("h*d"), "b": P("d")},
        {"a": (9,), "b": (2,)},
        r"\['a'\] has size 9, but 'h\*d' with the sizes {'d': 2}",
    ),
    "known and wrong": (
        {"a": P("2*h"), "b": P("h")},
        {"a": (8,), "b": (3,)},
        r"size .* 3.* 8|8.* 3",
    ),
    "second dimension": ({"a": P("h", "h+1")}, {"a": (3, 5)}, r"dimension 1 of \['a'\]"),
    "a product of two": ({"a": P("h*d")}, {"a": (9,)}, r"does not tell the sizes of \['h', 'd'\]"),
    "a sum of two": ({"a": P("h+d")}, {"a": (9,)}, r"does not tell the sizes of \['h', 'd'\]"),
    "itself": ({"a": P("h*h")}, {"a": (9,)}, r"does not tell the sizes of \['h'\]"),
    "a number alone": ({"a": P("7"), "b": P("h")}, {"a": (9,), "b": (2,)}, r"\['a'\] has size 9"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_sizes_that_do_not_fit_or_are_not_determined_are_refused(case):
    axes, shapes, message = REFUSED[case]
    with pytest.raises(ValueError, match=r"select\(axes=\.\.\.\): .*" + message):
        psjax.select(axes, {"h": [[0]]}, like=leaves(**shapes))


@pytest.mark.parametrize("entry", ["a**b", "0*a", "a*0", "a+", "+a", "*", "-3*a", "2.5*a"])
def test_what_is_no_dimension_is_refused_by_name(entry):
    with pytest.raises(ValueError, match=r"select\(axes=\.\.\.\): .*\['w'\].*"):
        psjax.select({"w": P(entry), "b": P("a")}, {"a": [[0]]}, like=leaves(w=(9,), b=(3,)))


def test_an_index_past_the_end_of_a_factor_is_refused():
    """14 is inside the dimension, and outside the axis."""
    with pytest.raises(ValueError, match=r"index 14 of element 0 is outside axis 'h' \(size 4\)"):
        psjax.select(P("4*h"), {"h": [[14]]}, like=np.zeros(16))


@pytest.mark.parametrize("method", ["gather", "counts"])
def test_parameters_of_another_size_are_refused(method):
    selection = psjax.select(P("4*h"), {"h": [[0], [1]]}, like=np.zeros(8))
    with pytest.raises(ValueError, match=rf"{method}\(.*has shape \(12,\).*'4\*h'.*8"):
        getattr(selection, method)(np.zeros(12))


@pytest.mark.parametrize(
    ("entry", "shape", "seen"),
    [("2*h*whole", (24,), 12), ("h+whole", (7,), 5), ("whole*h+3", (15,), 9)],
)
def test_an_axis_that_is_not_divided_stays_whole_in_a_product(entry, shape, seen):
    """Its size is that of the parameters, which `random_partition` needs for this."""
    w, axes = {"a": normal(shape, 80)}, {"a": P(entry)}
    selection = psjax.random_partition(KEY, axes, {"h": 4}, num_elements=2, like=w)
    y = selection.gather(w)
    assert y["a"].shape == (2, seen)
    assert_close(selection.scatter_mean(y, w), w, 1e-15)
    assert int(selection.counts(w)["a"].sum()) == 2 * seen
    with pytest.raises(
        ValueError, match=r"\['a'\] has axes .* size of 'whole' is not known; .*like="
    ):
        psjax.random_partition(KEY, axes, {"h": 4}, num_elements=2)


def test_a_partition_refuses_parameters_that_its_sizes_do_not_fit():
    selection = psjax.random_partition(KEY, {"a": P("2*h*3")}, {"h": 4}, num_elements=2)
    with pytest.raises(ValueError, match=r"gather\(.*\['a'\].*\(23,\)"):
        selection.gather(leaves(a=(23,)))


def test_one_weight_of_two_axes_is_an_element():
    """An element that sees a scalar: both axes are dropped."""
    w = np.arange(4.0).reshape(2, 2) + 1
    selection = psjax.select(P("i", "j"), {"i": [0, 1, 1], "j": [1, 0, 0]}, like=w)
    for chunk_size in (1, 2):
        value, grads = psjax.value_and_grad(lambda u: u**2, chunk_size=chunk_size)(w, selection)
        assert value == 4 + 9 + 9
        assert grads.tolist() == [[0, 4], [12, 0]]
