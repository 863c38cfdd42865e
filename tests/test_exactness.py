"""Theorems about numbers: one rounding, no wrapping, no NaN of what nobody holds, complex too."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import psjax

pytestmark = pytest.mark.usefixtures("x64")

HALF = ["bfloat16", "float16"]
UNIT = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative, of one rounding to nearest


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def wide(tree):
    """Every leaf in float64, NumPy's."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def rounded(x, dtype):
    return np.asarray(x, np.float64).astype(jnp.dtype(dtype))


def assert_close(actual, expected, tolerance=1e-12):
    """Relative to the largest entry of the leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected)):
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale, err_msg=where)


# ------------------------------------------------------------------------- sums in narrow dtypes


@pytest.mark.parametrize("chunk_size", [1, 7, 100, None])
@pytest.mark.parametrize("dtype", HALF)
def test_a_sum_of_a_hundred_elements_is_rounded_once(dtype, chunk_size):
    """Each gives about 0.99 * 4 = 3.96. JAX itself rounds the gradient of a chunk."""
    w = jnp.ones(4, dtype)
    selection = psjax.replicas(w, 100)
    element = lambda u: jnp.asarray(0.99, dtype) * jnp.sum(u)
    value, grads = jax.jit(psjax.value_and_grad(element, chunk_size=chunk_size))(w, selection)
    one, slope = float(jax.jit(element)(w)), float(jnp.asarray(0.99, dtype))
    assert value.dtype == grads.dtype == dtype
    assert value == rounded(100 * one, dtype)
    if chunk_size == 1:
        np.testing.assert_array_equal(np.asarray(grads), rounded(np.full(4, 100 * slope), dtype))
    np.testing.assert_allclose(wide(grads), np.full(4, 100 * slope), rtol=2 * UNIT[dtype])


C = 101  # 10100 elements, in runs of 100


@functools.cache
def many(dtype):
    """Elements in runs, each of which adds about 1 to every entry that it sees."""
    pairs = psjax.ordered_pairs(C)
    axes = {"rows": P("class"), "shared": P(), "scale": P()}
    positive = lambda shape, seed: np.random.default_rng(seed).uniform(0.5, 1.5, shape)
    params = {"rows": positive((C, 3), 0), "shared": positive(5, 1), "scale": positive((), 2)}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    x = jnp.asarray(positive((C, 5), 3) / 4, dtype)
    indices = {"class": pairs, "label": pairs[:, 0]}
    return params, x, psjax.select(axes, indices, like=params)


def product(u, x):
    """Its gradients are positive: `shared` and `scale` by what the run has, and by its own."""
    return jnp.sum(u["shared"] * x) * u["scale"] * jnp.mean(u["rows"])


def exact(dtype):
    """Value and gradient of the whole sum in float64, by the class sums: no loop over pairs."""
    params, x, selection = many(dtype)
    w, x = wide(params), wide(x)
    pairs = selection.indices["class"]
    trunk = np.array([np.sum(w["shared"] * x[k]) for k in range(C)])
    mean = np.array([np.mean(w["rows"][pair]) for pair in pairs])
    label, scale = pairs[:, 0], w["scale"]
    rows = np.zeros_like(w["rows"])
    for (k, j), t in zip(pairs, trunk[label]):
        rows[k] += t * scale / 6
        rows[j] += t * scale / 6
    shared = sum(x[k] * mean[label == k].sum() * scale for k in range(C))
    total = np.sum(trunk[label] * mean)
    return total * scale, {"rows": rows, "shared": shared, "scale": np.asarray(total)}


@pytest.mark.parametrize("chunk_size", [1, 100, 10_100, None])
def test_ten_thousand_elements_of_one_sign_in_bfloat16(chunk_size):
    """Below 1 %: what an element computes in 16 bits is off by as much as one operation is."""
    params, x, selection = many("bfloat16")
    fn = jax.jit(psjax.value_and_grad(product, P("label"), chunk_size))
    value, grads = wide(fn(params, selection, x))
    right, gradient = exact("bfloat16")
    np.testing.assert_allclose(value, right, rtol=0.01)
    for name in gradient:
        np.testing.assert_allclose(grads[name], gradient[name], rtol=0.01, err_msg=name)


@pytest.mark.parametrize("how", ["partially_separable", "element_value_and_grad", "shuffled"])
def test_ten_thousand_elements_of_one_sign_by_other_ways(how):
    params, x, selection = many("bfloat16")
    if how == "partially_separable":
        f = psjax.partially_separable(product, P("label"))
        grads = jax.jit(jax.grad(f))(params, selection, x)
    elif how == "shuffled":
        selection = selection[np.random.default_rng(0).permutation(C * (C - 1))]
        fn = psjax.value_and_grad(product, P("label"), 50)
        grads = jax.jit(fn)(params, selection, x)[1]
    else:
        fn = psjax.element_value_and_grad(product, P("label"))
        home = lambda w, s, x: s.scatter_add(fn(w, s, x)[1], w)
        grads = jax.jit(home)(params, selection, x)
    gradient = exact("bfloat16")[1]
    for name, g in wide(grads).items():
        np.testing.assert_allclose(g, gradient[name], rtol=0.01, err_msg=name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["overlap", "one row", "replicas"])
def test_scatter_add_of_ten_thousand_is_rounded_once(kind, dtype):
    E, rng = 10_000, np.random.default_rng(0)
    w = {"own": jnp.zeros((20, 2), dtype), "shared": jnp.zeros(3, dtype)}
    axes = {"own": P("i"), "shared": P()}
    index = np.stack([rng.permutation(20)[:3] for _ in range(E)])
    if kind == "replicas":
        selection = psjax.replicas(w, E)
    else:
        selection = psjax.select(axes, {"i": index if kind == "overlap" else index[:, 0]}, like=w)
    shapes = jax.eval_shape(selection.gather, w)
    y = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), dtype), shapes)
    got = jax.jit(lambda s, y: (s.scatter_add(y, w), s.scatter_mean(y, w)))(selection, y)
    ys, rows = wide(y), {"overlap": index, "one row": index[:, :1]}.get(kind)
    own, holders = np.zeros((20, 2)), np.full(20, E)
    if rows is None:
        own = ys["own"].sum(axis=0)
    else:
        parts = ys["own"].reshape(-1, 2)
        np.add.at(own, rows.reshape(-1), parts)
        holders = np.bincount(rows.reshape(-1), minlength=20)
    add = {"own": own, "shared": ys["shared"].sum(axis=0)}
    mean = {"own": own / holders[:, None], "shared": add["shared"] / E}
    for actual, expected in zip(got, (add, mean)):
        for name in w:
            assert actual[name].dtype == dtype
            error = np.abs(wide(actual[name]) / expected[name] - 1)
            assert error.max() < UNIT[dtype], name


# ----------------------------------------------------------------------------------------- means


@pytest.mark.parametrize("dtype", [*HALF, "float32"])
def test_the_mean_of_equal_weights_is_the_weight(dtype):
    """The sum of 100 weights of 1000 is past the largest float16."""
    w = {"a": jnp.full(3, 1000, dtype), "b": jnp.full((4, 2), -1000, dtype)}
    overlap = {"i": [[0, 1, 2]] * 60 + [[1, 2, 3]] * 40}
    for selection in (
        psjax.replicas(w, 100),
        psjax.select({"a": P(), "b": P("i")}, overlap, like=w),
    ):
        got = jax.jit(lambda s: s.scatter_mean(s.gather(w), w))(selection)
        assert_close(wide(got), wide(w), 1e-6 if dtype == "float32" else 0)
        assert jax.tree.map(lambda x: x.dtype, got) == jax.tree.map(lambda x: x.dtype, w)


@pytest.mark.parametrize("dtype", HALF)
def test_local_steps_of_rate_0_change_nothing(dtype):
    w = jnp.full(3, 1000, dtype)
    optimizer = optax.sgd(0.0, momentum=0.5)
    update = psjax.local_update(lambda w, x: jnp.sum(w * x), optimizer)
    batches = jnp.ones((100, 2, 3), dtype)
    state = optimizer.init(w)
    got, _, metrics = jax.jit(update)(w, state, psjax.replicas(w, 100), batches)
    np.testing.assert_array_equal(np.asarray(got), np.asarray(w))
    assert metrics.finite.all()


INTEGERS = ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_means_of_extreme_integers_do_not_wrap_and_round_down(dtype):
    """Held by 1, by 7, by all 100; all largest, all smallest, mixed; against Python's integers."""
    info, E = np.iinfo(dtype), 100
    rows = [[0, 1, 2] if e < 1 else [1, 2] if e < 7 else [2] for e in range(E)]
    selection = psjax.select(P("i"), {"i": rows}, like=np.zeros(4, dtype))
    rng = np.random.default_rng(0)
    mixed = rng.choice(np.array([info.min, info.max], dtype), (E, 3))
    odd = rng.integers(info.min, info.max, (E, 3), dtype, endpoint=True)
    w = np.array([1, 2, 3, info.max], dtype)
    mean = jax.jit(lambda y: selection.scatter_mean(y, w))
    for y in (np.full((E, 3), info.max, dtype), np.full((E, 3), info.min, dtype), mixed, odd):
        expected, got = [], mean(y)
        for i in range(3):
            held = [int(y[e, own.index(i)]) for e, own in enumerate(rows) if i in own]
            expected.append(sum(held) // len(held))
        assert got.dtype == dtype
        assert [int(x) for x in got] == [*expected, info.max]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_sums_of_integers_that_fit_are_exact(dtype):
    """Replicas and rows; a sum that ends at the largest number, whatever it passes."""
    info = np.iinfo(dtype)
    like = np.zeros(2, dtype)
    y = np.array([[info.max, 1], [0, info.min], [0, 2], [0, 3]], dtype)
    expected = [info.max, info.min + 6]
    for selection in (
        psjax.replicas(like, 4),
        psjax.select(P("i"), {"i": [[0, 1]] * 4}, like=like),
    ):
        got = jax.jit(lambda s: s.scatter_add(y, like))(selection)
        assert got.dtype == dtype
        assert [int(x) for x in got] == expected


@pytest.mark.parametrize("kind", ["overlap", "ragged", "partition", "replicas", "random"])
def test_of_bools_the_sum_is_any_and_the_mean_is_all(kind):
    like, rng = np.zeros((6, 2), bool), np.random.default_rng(0)
    w = rng.random((6, 2)) < 0.5
    rows = {
        "overlap": [[0, 1, 2], [2, 1, 4], [4, 1, 0]],
        "ragged": [[0, 1, 2], [1], [2, 1]],
        "partition": [[0, 3], [1, 4], [2, 5]],
        "replicas": [list(range(6))] * 3,
    }
    if kind == "replicas":
        selection = psjax.replicas(like, 3)
    elif kind == "random":
        selection = psjax.random_partition(jax.random.key(0), P("i"), {"i": 6}, num_elements=3)
        rows["random"] = np.asarray(selection.indices["i"]).tolist()
    else:
        selection = psjax.select(P("i"), {"i": rows[kind]}, like=like)
    y = rng.random(jax.eval_shape(selection.gather, like).shape) < 0.6
    if kind != "replicas":
        np.testing.assert_array_equal(selection.gather(w)[0], w[np.array(rows[kind][0])])
    some, every = np.zeros((6, 2), bool), w.copy()
    for i in range(6):
        held = [y[e, own.index(i)] for e, own in enumerate(rows[kind]) if i in own]
        if held:
            some[i], every[i] = np.any(held, axis=0), np.all(held, axis=0)
    add, mean = jax.jit(lambda s: (s.scatter_add(y, like), s.scatter_mean(y, w)))(selection)
    assert add.dtype == mean.dtype == bool
    np.testing.assert_array_equal(add, some)
    np.testing.assert_array_equal(mean, every)


# ---------------------------------------------------------------------- 400 trees, against loops

DTYPES = "float64 float32 bfloat16 float16 int8 int32 uint8 int64 bool complex64 complex128".split()
NAMES = {"i": 6, "j": 5, "k": 4}


def random_tree(rng):
    """Specs, shapes and dtypes of one to four leaves; some axis is in one of them."""
    axes, shapes, dtypes = {}, {}, {}
    for n in range(rng.integers(1, 5)):
        names = list(rng.permutation([*NAMES, None, None]))[: rng.integers(0 if n else 1, 4)]
        names = names if n else ["i", *(x for x in names if x != "i")]
        axes[f"{n}"] = P(*names)
        shapes[f"{n}"] = tuple(2 if x is None else NAMES[x] for x in names)
        shapes[f"{n}"] += (3,) * int(rng.random() < 0.3)
        dtypes[f"{n}"] = str(rng.choice(DTYPES))
    return axes, shapes, dtypes


def random_indices(rng, axes, plan):
    """Index sets of the shapes of a plan, `{name: (kind, m)}`, for all elements."""
    E, indices = plan["E"], {}
    for name, (kind, m) in plan["axes"].items():
        n = NAMES[name]
        if kind == "row":
            indices[name] = rng.integers(0, n, E)
        elif kind == "partition":
            indices[name] = np.array_split(rng.permutation(n), E)
        else:
            rows = [rng.permutation(n)[:m] for _ in range(E)]
            short = [m, *rng.integers(1, m + 1, E - 1)] if kind == "ragged" else [m] * E
            indices[name] = [row[:s] for row, s in zip(rows, short)]
    return indices


def places(spec, shape, indices, e):
    """Where element e's entries stand, an integer array of the shape it sees."""
    chosen, seen = [], []
    for d, n in enumerate(shape):
        name = spec[d] if d < len(spec) else None
        index = indices.get(name)
        rows = np.arange(n) if index is None else np.atleast_1d(index[e])
        chosen.append(rows)
        if index is None or np.ndim(index[e]):
            seen.append(len(rows))
    grid = [np.ravel_multi_index(at, shape) for at in itertools.product(*chosen)]
    return np.array(grid, int).reshape(seen)


def small(rng, shape, dtype):
    """Numbers of which every sum here is exact in every dtype."""
    x = rng.integers(0 if dtype.startswith("u") else -3, 4, shape)
    if dtype.startswith("complex"):
        x = x + 1j * rng.integers(-3, 4, shape)
    return x.astype(jnp.dtype(dtype))


@pytest.mark.parametrize("seed", range(20))
def test_random_trees_are_what_loops_say(seed):
    """20 trees, 20 index sets each: gather, scatter_add, scatter_mean and counts."""
    rng = np.random.default_rng(seed)
    axes, shapes, dtypes = random_tree(rng)
    used = {x for spec in axes.values() for x in spec if x is not None}
    kinds = ["rows", "rows", "ragged", "row", "partition"]
    chosen = ["i", *(x for x in sorted(used - {"i"}) if rng.random() < 0.6)]
    plan = {"E": int(rng.integers(1, 5)), "axes": {}}
    for name in chosen:
        plan["axes"][name] = str(rng.choice(kinds)), int(rng.integers(1, NAMES[name] + 1))
    like = {n: jax.ShapeDtypeStruct(shapes[n], dtypes[n]) for n in shapes}

    @jax.jit
    def everything(s, w, y):
        return s.gather(w), s.scatter_add(y, w), s.scatter_mean(y, w), s.counts(w)

    for _ in range(20):
        indices = random_indices(rng, axes, plan)
        selection = psjax.select(axes, indices, like=like)
        w = {n: small(rng, shapes[n], dtypes[n]) for n in shapes}
        seen = jax.eval_shape(selection.gather, like)
        y = {n: small(rng, x.shape, dtypes[n]) for n, x in seen.items()}
        gathered, add, mean, counts = jax.tree.map(np.asarray, everything(selection, w, y))
        for n, x in w.items():
            held = [[] for _ in range(x.size)]
            for e in range(plan["E"]):
                at = places(axes[n], shapes[n], indices, e)
                corner = tuple(slice(0, m) for m in at.shape)
                assert gathered[n][e].shape == y[n][e].shape
                np.testing.assert_array_equal(gathered[n][e][corner], x.reshape(-1)[at])
                rest = np.array(gathered[n][e])
                rest[corner] = 0
                assert not rest.any()
                for place, value in zip(at.reshape(-1), y[n][e][corner].reshape(-1)):
                    held[place].append(value)
            assert [len(h) for h in held] == counts[n].reshape(-1).tolist()
            assert gathered[n].dtype == add[n].dtype == mean[n].dtype == x.dtype
            expected = [total(h, dtypes[n]) for h in held]
            np.testing.assert_array_equal(add[n].reshape(-1), np.array(expected, x.dtype))
            expected = [average(h, dtypes[n]) if h else v for h, v in zip(held, x.reshape(-1))]
            expected = np.array(expected, x.dtype)
            if dtypes[n] in ULP:  # shares of a mean are divided first, and then added
                error = np.abs(mean[n].reshape(-1) - expected)
                assert np.max(error, initial=0) <= 12 * ULP[dtypes[n]]
            else:
                np.testing.assert_array_equal(mean[n].reshape(-1), expected)


ULP = {"float32": 2.0**-24, "complex64": 2.0**-24, "float64": 2.0**-53, "complex128": 2.0**-53}


def total(held, dtype):
    if dtype == "bool":
        return any(held)
    if dtype.startswith("complex"):
        return sum(complex(x) for x in held)
    return int(sum(float(x) for x in held)) if "int" in dtype else sum(float(x) for x in held)


def average(held, dtype):
    if dtype == "bool":
        return all(held)
    if "int" in dtype:
        return sum(int(x) for x in held) // len(held)
    return total(held, dtype) / len(held)


# --------------------------------------------------------- NaN of what is not valid, or not there


def poles(u, row, sample):
    """Poles at 0; every pair of entries is coupled, the shared ones too."""
    inner = jnp.sum(jnp.log(u["x"]) / u["x"]) + jnp.sum(u["k"] ** 2) * u["c"][0]
    return inner * row / sample["a"] + u["c"][1] ** 3 * inner**2 / jnp.prod(u["x"])


N = 7
LIKE = {"x": np.zeros(N), "k": np.zeros((2, N)), "c": np.zeros(2)}
AXES = {"x": P("i"), "k": P(None, "i"), "c": P()}
ROWS = np.array([[0, 1], [1, 2], [5, 6], [2, 3], [3, 0], [6, 5]])
LABELS = np.array([0, 0, 1, 2, 3, 3])


def clean():
    params = {"x": np.arange(1.0, 1 + N), "k": normal(2, N, seed=1), "c": np.array([0.5, 0.8])}
    return params, np.abs(normal(6, seed=2)) + 0.5, {"a": np.arange(1.0, 5.0)}


def plain(params, rows, samples, elements):
    total = jnp.zeros(())
    for e in elements:
        u = {"x": params["x"][ROWS[e]], "k": params["k"][:, ROWS[e]], "c": params["c"]}
        total = total + poles(u, rows[e], {"a": samples["a"][LABELS[e]]})
    return total


def orders(f):
    """Value, gradient, Hessian."""
    return jax.jit(lambda w: (f(w), jax.grad(f)(w), jax.hessian(f)(w)))


@functools.cache
def right(elements):
    params, rows, samples = clean()
    fn = orders(lambda w: plain(w, rows, samples, elements))
    return jax.tree.map(np.asarray, fn(jax.tree.map(jnp.asarray, params)))


VALID = {  # elements 2 and 5 see rows 5, 6 alone; element 2 alone sees sample 1
    "the middle": [True, True, False, True, True, False],
    "the first": [False, True, False, True, True, False],
    "nobody": [False] * 6,
}


@pytest.mark.parametrize("valid", VALID)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_nothing_of_invalid_elements_reaches_a_result_in_any_order(valid, bad):
    """Their parameters, their rows and their samples are NaN, Inf or a pole."""
    params, rows, samples = jax.tree.map(np.copy, clean())
    params["x"][5:], params["k"][:, 5:] = bad, bad
    rows[[2, 5]] = bad
    samples["a"][1] = bad
    selection = psjax.select(AXES, {"i": ROWS, "label": LABELS}, like=LIKE)
    selection.valid[:] = VALID[valid]
    elements = tuple(int(e) for e in np.flatnonzero(VALID[valid]))
    results = programs()
    for chunk_size in results:
        got = results[chunk_size](jax.tree.map(jnp.asarray, params), selection, rows, samples)
        if elements:
            assert_close(got, right(elements), 1e-11)
        else:
            assert not any(np.any(x) for x in jax.tree.leaves(got))


@functools.cache
def programs():
    in_axes = (0, P("label"))
    fs = {c: psjax.partially_separable(poles, in_axes, c) for c in (1, 4)}
    run = lambda f: jax.jit(lambda w, *args: orders(lambda w: f(w, *args))(w))
    return {chunk_size: run(f) for chunk_size, f in fs.items()}


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_nothing_of_invalid_elements_reaches_explicit_results(bad):
    params, rows, samples = jax.tree.map(np.copy, clean())
    params["x"][5:], rows[[2, 5]], samples["a"][1] = bad, bad, bad
    selection = psjax.select(AXES, {"i": ROWS, "label": LABELS}, like=LIKE)
    selection.valid[[2, 5]] = False
    in_axes, elements = (0, P("label")), (0, 1, 3, 4)
    aux = lambda *operands: (poles(*operands), operands[1] * 2)
    whole = psjax.value_and_grad(aux, in_axes, 4, has_aux=True)
    (value, rows_2), grads = jax.jit(whole)(params, selection, rows, samples)
    assert_close((value, grads), right(elements)[:2], 1e-11)
    np.testing.assert_array_equal(rows_2, np.where(selection.valid, 2 * rows, 0))
    each = psjax.element_value_and_grad(poles, in_axes, 4)
    values, stacked = jax.jit(each)(params, selection, rows, samples)
    assert not any(np.any(np.asarray(x)[[2, 5]]) for x in jax.tree.leaves((values, stacked)))
    home = selection.scatter_add(stacked, params)
    assert_close((values.sum(), home), right(elements)[:2], 1e-11)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_padding_invalid_elements_and_dropped_slots_hold_is_never_scattered(bad):
    selection = psjax.select(P("i"), {"i": [[0, 1, 2], [2], [3, 4]]}, like=np.zeros(6))
    selection.valid[2] = False
    keep = np.array([True, False, True, True, True, True])
    y = np.array([[1.0, bad, 2.0], [4.0, bad, bad], [bad, bad, bad]])
    w = np.array([10.0, bad, 12.0, 13.0, 14.0, 15.0])
    dropped = selection.drop(keep)
    run = jax.jit(lambda s: (s.scatter_add(y, w), s.scatter_mean(y, w), s.gather(w)))
    add, mean, gathered = run(dropped)
    assert add.tolist() == [1, 0, 6, 0, 0, 0]
    np.testing.assert_array_equal(mean, [1, bad, 3, 13, 14, 15])  # which keeps what it was
    assert gathered.tolist() == [[10, 0, 12], [12, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_a_derivative_at_a_slot_of_padding_stays_there(chunk_size):
    """The slope of the root at the 0 of padding is Inf, and its second derivative NaN."""
    rows, like = [[0, 1, 2], [1], [3, 0]], {"x": np.zeros(N), "c": np.float64(0)}
    selection = psjax.select({"x": P("i"), "c": P()}, {"i": rows}, like=like)
    fn = lambda u: jnp.sum(jnp.sqrt(u["x"])) + u["c"] ** 3
    f = psjax.partially_separable(fn, chunk_size=chunk_size)
    w = {"x": jnp.arange(1.0, 1 + N), "c": jnp.asarray(2.0)}
    whole = lambda w: sum(fn({"x": w["x"][jnp.array(own)], "c": w["c"]}) for own in rows)
    assert_close(orders(lambda w: f(w, selection))(w), orders(whole)(w))


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_nothing_of_a_dropped_weight_reaches_a_result_in_any_order(chunk_size):
    rows = np.array([[0, 1], [1, 2], [4, 3]])
    keep = {"x": np.arange(N) != 1, "k": np.array([[True], [False]]), "c": None}
    params = clean()[0]

    def smooth(u):
        inner = jnp.sum(jnp.sin(u["x"])) + jnp.sum(u["k"] ** 2) * u["c"][0]
        return inner * u["c"][1] + inner**2

    selection = psjax.select(AXES, {"i": rows}, like=LIKE).drop(keep)
    f = psjax.partially_separable(smooth, chunk_size=chunk_size)

    def whole(w):
        w = {n: x if keep[n] is None else jnp.where(keep[n], x, 0.0) for n, x in w.items()}
        seen = [{"x": w["x"][r], "k": w["k"][:, r], "c": w["c"]} for r in rows]
        return sum(map(smooth, seen))

    expected = orders(whole)(jax.tree.map(jnp.asarray, params))
    ours = orders(lambda w: f(w, selection))
    explicit = jax.jit(psjax.value_and_grad(smooth, chunk_size=chunk_size))
    for bad in (np.nan, np.inf):
        w = {"x": np.where(keep["x"], params["x"], bad), "k": params["k"].copy(), "c": params["c"]}
        w["k"][1] = bad
        got = ours(jax.tree.map(jnp.asarray, w))
        assert_close(got, expected, 1e-11)
        assert_close(explicit(w, selection), expected[:2])
        assert not np.any(np.asarray(got[1]["x"])[1])
        assert not np.any(np.asarray(got[1]["k"])[1])


# --------------------------------------------------------------------------- complex parameters

Z = normal(5, seed=1) + 1j * normal(5, seed=2)
SHARED = np.complex128(0.3 - 0.8j)
TANGENT = {"z": normal(5, seed=3) + 1j * normal(5, seed=4), "s": np.complex128(1.5 + 0.5j)}
PAIRS = np.array([[0, 1], [1, 2], [2, 4], [4, 0]])


def modulus(u):
    """Real, and a function neither of z nor of its conjugate alone."""
    inner = jnp.sum(u["z"] ** 2) * u["s"] + u["z"][0] * jnp.conj(u["z"][1])
    return jnp.real(inner) ** 2 + jnp.imag(inner * u["s"]) + jnp.abs(u["z"][1]) ** 4


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_derivatives_with_respect_to_complex_parameters_are_those_of_the_plain_sum(chunk_size):
    w = {"z": jnp.asarray(Z), "s": jnp.asarray(SHARED)}
    selection = psjax.select({"z": P("i"), "s": P()}, {"i": PAIRS}, like=w)
    whole = lambda w: sum(modulus({"z": w["z"][pair], "s": w["s"]}) for pair in PAIRS)
    f = psjax.partially_separable(modulus, chunk_size=chunk_size)
    ours = lambda w: f(w, selection)

    def everything(f):
        grad = jax.grad(f)
        return jax.jit(
            lambda w, v: {
                "grad": jax.value_and_grad(f)(w),
                "jvp": jax.jvp(f, (w,), (v,)),
                "vjp": jax.vjp(f, w)[1](jnp.ones(())),
                "forward over reverse": jax.jvp(grad, (w,), (v,)),
                "linearize": jax.linearize(f, w)[1](v),
            }
        )(w, TANGENT)

    expected = everything(whole)
    assert_close(everything(ours), expected, 1e-11)
    explicit = jax.jit(psjax.value_and_grad(modulus, chunk_size=chunk_size))(w, selection)
    assert_close(explicit, expected["grad"], 1e-11)


def test_a_complex_slope_by_hand():
    """Two elements (Re z0 z1)^2 of z = (2, 3i), (1 + i, 2): JAX's gradient is a - ib of a + ib."""
    z = jnp.array([1.0 + 2.0j, 3.0 - 1.0j])
    selection = psjax.replicas(z, 2)
    f = psjax.partially_separable(lambda u: jnp.real(jnp.sum(u**2)))
    value, gradient = jax.value_and_grad(f)(z, selection)
    assert_close(value, jnp.asarray(2 * (1 - 4 + 9 - 1.0)))
    assert_close(gradient, 2 * 2 * z)  # of Re z^2 it is 2 z, as JAX has it
    tangent = jnp.array([1.0j, 0.0j])
    slope = jax.jvp(lambda z: f(z, selection), (z,), (tangent,))[1]
    assert_close(slope, jnp.asarray(2 * np.real(2 * (1 + 2j) * 1j)))
