"""Theorems about U_e: gather, its transpose, its pseudo-inverse; and what `select` refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from tests import reference

pytestmark = pytest.mark.usefixtures("x64", "strict")

AXES = {
    "row": P("i"),
    "both": P("i", "j"),
    "middle": P("j", None, "i"),
    "shared": P(),
}
SHAPES = {"row": (6,), "both": (6, 4), "middle": (4, 2, 6), "shared": (3,)}
LIKE = {name: jax.ShapeDtypeStruct(shape, np.float64) for name, shape in SHAPES.items()}
OVERLAP = {"i": [[0, 1, 2], [2, 3, 4], [4, 5, 0]]}

KEY = jax.random.key(0)
INDICES = {
    "partition": {"i": [[0, 3], [1, 4], [2, 5]]},
    "overlap": OVERLAP,
    "repeated": {"i": [[0, 1], [0, 1], [3, 4]]},  # the same element twice
    "ragged": {"i": [[0, 1, 2], [4], [2, 5]]},
    "identity": {"i": [range(6)]},
    "unsorted": {"i": [[5, 0], [3, 2]]},
    "row dropped": {"i": [4, 0, 4]},
    "two axes": {"i": [[0, 2], [1, 5], [2, 3]], "j": [[0, 1, 3], [1, 2, 3], [0, 1, 2]]},
    "two axes, ragged": {"i": [[0, 2], [1], [2, 3]], "j": [[0, 3], [1, 2, 3], [0]]},
    "two axes, one dropped": {"i": [3, 0, 3], "j": [[0, 1], [1, 2], [0, 3]]},
    "two axes, both dropped": {"i": [3, 0, 3], "j": [1, 1, 2]},
}
PARTITIONS = {
    "random partition": ({"i": 6, "j": 4}, 2, False),
    "random partition, uneven": ({"i": 6, "j": 4}, 4, False),
    "random partition of one axis": ({"j": 4}, 3, False),
    "random partition, stratified": ({"j": 4}, 2, True),
}
KINDS = [*INDICES, *PARTITIONS, "replicas", "split with padding", "part of a random partition"]
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind):
    if kind == "replicas":
        return psjax.replicas(LIKE, 3)
    if kind == "split with padding":  # the second worker: one element, and padding
        split = psjax.select(AXES, OVERLAP, like=LIKE).split(2)
        return jax.tree.map(lambda x: x[1], split)
    if kind == "part of a random partition":  # the second worker: one element, and padding
        split = psjax.random_partition(KEY, AXES, {"i": 6, "j": 4}, num_elements=3).split(2)
        return jax.tree.map(lambda x: x[1], split)
    if kind in PARTITIONS:
        sizes, n, stratified = PARTITIONS[kind]
        return psjax.random_partition(KEY, AXES, sizes, num_elements=n, stratified=stratified)
    return psjax.select(AXES, INDICES[kind], like=LIKE)


def elements(selection):
    """The indices of each valid element, for the reference."""
    return [
        {name: index[e] for name, index in selection.indices.items()}
        for e in np.flatnonzero(selection.valid)
    ]


def normal(shape, seed):
    return np.random.default_rng(seed).normal(size=shape)


W = {name: normal(shape, i) for i, (name, shape) in enumerate(SHAPES.items())}


@functools.cache
def computed(kind):
    """All that the library says of one kind of selection, as one compiled function."""
    selection = make(kind)
    y = jax.tree.map(
        lambda x: normal(x.shape, x.size), jax.eval_shape(selection.gather, LIKE)
    )  # what invalid elements and padding hold is not zero

    @jax.jit
    def everything(selection, w, y):
        gathered = selection.gather(w)
        return {
            "gather": gathered,
            "scatter_add": selection.scatter_add(y, w),
            "transpose": jax.linear_transpose(selection.gather, LIKE)(y)[0],
            "scatter_mean": selection.scatter_mean(y, w),
            "round trip": selection.scatter_mean(gathered, w),
            "counts": selection.counts(w),
        }

    return selection, y, jax.tree.map(np.asarray, everything(selection, W, y))


def assert_trees(actual, expected, **tolerance):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(
        lambda path, a, b: np.testing.assert_allclose(
            a, b, err_msg=jax.tree_util.keystr(path), **({"rtol": 1e-12} | tolerance)
        ),
        actual,
        expected,
    )


def assert_bitwise(actual, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)),
        jax.tree.map(np.asarray, actual),
        jax.tree.map(np.asarray, expected),
    )


# ------------------------------------------------------------------------- against the reference


@every_kind
def test_gather_is_the_product_with_the_selection_matrices(kind):
    selection, _, got = computed(kind)
    seen = elements(selection)
    for name, x in W.items():
        rows = [reference.gather(x, AXES[name], e) for e in seen]
        np.testing.assert_array_equal(got["gather"][name][selection.valid], np.stack(rows))
        assert not got["gather"][name][~selection.valid].any()


@every_kind
def test_scatter_add_is_the_sum_of_transposed_products(kind):
    selection, y, got = computed(kind)
    seen = elements(selection)
    expected = {
        name: reference.scatter_add(y[name][selection.valid], SHAPES[name], AXES[name], seen)
        for name in W
    }
    assert_trees(got["scatter_add"], expected)


@every_kind
def test_scatter_mean_is_the_pseudo_inverse(kind):
    selection, y, got = computed(kind)
    seen = elements(selection)
    expected = {
        name: reference.scatter_mean(y[name][selection.valid], x, AXES[name], seen)
        for name, x in W.items()
    }
    # pinv is an SVD; its entries are right to a few epsilons of the largest, not of each.
    assert_trees(got["scatter_mean"], expected, atol=1e-13)


@every_kind
def test_counts_are_the_diagonal_of_the_sum_of_projections(kind):
    selection, _, got = computed(kind)
    expected = {name: reference.counts(SHAPES[name], AXES[name], elements(selection)) for name in W}
    assert_trees(got["counts"], expected, rtol=0)
    assert all(x.dtype == np.int32 for x in got["counts"].values())


# ----------------------------------------------------------------------------------- the algebra


@every_kind
def test_scatter_add_is_the_transpose_of_gather(kind):
    _, y, got = computed(kind)
    dot = lambda a, b: sum(np.vdot(a[name], b[name]) for name in a)
    np.testing.assert_allclose(dot(got["gather"], y), dot(W, got["scatter_add"]), rtol=1e-12)
    assert_trees(got["scatter_add"], got["transpose"])


@every_kind
def test_scatter_mean_of_gather_is_the_identity(kind):
    assert_trees(computed(kind)[2]["round trip"], W, rtol=1e-15)


@pytest.mark.parametrize("kind", ["partition", "identity"])
def test_round_trip_on_a_partition_is_bitwise(kind):
    selection, _, got = computed(kind)
    private = [name for name in W if name != "shared" or selection.num_elements == 1]
    assert_bitwise({n: got["round trip"][n] for n in private}, {n: W[n] for n in private})


@every_kind
def test_scatter_mean_keeps_the_bits_of_what_nobody_holds(kind):
    _, _, got = computed(kind)
    for name, x in W.items():
        free = got["counts"][name] == 0
        assert_bitwise(got["scatter_mean"][name][free], x[free])


def test_scatter_mean_sets_integers_held_once_exactly_and_rounds_means_down():
    like = jnp.array([2**31 + 1, 7, 9], jnp.uint32)
    selection = psjax.select(P("i"), {"i": [[0, 1], [1, 2]]}, like=like)
    y = jnp.array([[2**32 - 1, 4], [3, 2**24 + 1]], jnp.uint32)
    got = selection.scatter_mean(y, like)
    assert got.dtype == jnp.uint32
    assert got.tolist() == [2**32 - 1, 3, 2**24 + 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "bool"])
def test_gather_keeps_the_dtype_of_every_leaf(dtype):
    like = jax.ShapeDtypeStruct((4,), dtype)
    selection = psjax.select(P("i"), {"i": [[0, 1], [2, 3]]}, like=like)
    assert jax.eval_shape(selection.gather, like).dtype == dtype


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scatters_keep_the_dtype_of_the_parameters(dtype):
    like = jnp.ones(4, dtype)
    selection = psjax.select(P("i"), {"i": [[0, 1], [1, 2]]}, like=like)
    assert selection.scatter_add(jnp.ones((2, 2), jnp.float32), like).dtype == dtype
    assert selection.scatter_mean(jnp.ones((2, 2), dtype), like).dtype == dtype


# --------------------------------------------------------------------------- elements left out


@pytest.mark.parametrize("kind", ["overlap", "two axes, ragged", "replicas"])
def test_where_leaves_out_elements_that_hold_nan(kind):
    selection, y, _ = computed(kind)
    where = np.array([True, False, True])
    y = {name: np.where(where.reshape(-1, *[1] * (x.ndim - 1)), x, np.nan) for name, x in y.items()}
    got = jax.jit(type(selection).scatter_mean)(selection, y, W, where)
    seen = [e for e, use in zip(elements(selection), where) if use]
    expected = {
        name: reference.scatter_mean(y[name][where], x, AXES[name], seen) for name, x in W.items()
    }
    assert_trees(got, expected, atol=1e-13)  # the SVD of pinv


def test_scatter_mean_where_nobody_counts_keeps_everything():
    selection, y, _ = computed("overlap")
    got = jax.jit(type(selection).scatter_mean)(selection, y, W, np.zeros(3, bool))
    assert_bitwise(got, W)


def test_padding_and_invalid_elements_may_hold_anything():
    selection, y, got = computed("split with padding")
    y = {name: x.copy() for name, x in y.items()}
    for x in y.values():
        x[~selection.valid] = np.nan
    add, mean = jax.jit(lambda s, y, w: (s.scatter_add(y, w), s.scatter_mean(y, w)))(
        selection, y, W
    )
    assert_bitwise(add, got["scatter_add"])
    assert_bitwise(mean, got["scatter_mean"])


# ----------------------------------------------------------------------------------- many devices


@pytest.mark.parametrize("mapped", ["pmap", "shard_map", "shard_map without vma"])
@pytest.mark.parametrize("kind", ["overlap", "two axes, ragged", "replicas"])
def test_scatter_mean_over_an_axis_equals_one_device(kind, mapped):
    selection, y, got = computed(kind)
    rows = np.array([[0, 1], [2, 2]])  # 3 elements on 2 devices, as split divides them
    split, y = selection.split(2), jax.tree.map(lambda x: x[rows], y)

    def mean(selection, y, w):
        return selection.scatter_mean(y, w, axis_name="d")

    if mapped == "pmap":
        fn = jax.pmap(
            mean, "d", in_axes=(0, 0, None), out_axes=None, devices=jax.local_devices()[:2]
        )
    else:
        own = lambda tree: jax.tree.map(lambda x: x[0], tree)
        fn = jax.jit(
            jax.shard_map(
                lambda selection, y, w: mean(own(selection), own(y), w),
                mesh=jax.sharding.Mesh(jax.devices()[:2], "d"),
                in_specs=(P("d"), P("d"), P()),
                out_specs=P(),
                check_vma=mapped == "shard_map",
            )
        )
    assert_trees(fn(split, y, W), got["scatter_mean"])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["overlap", "two axes, one dropped", "ragged", "replicas"])
def test_split_keeps_every_element_in_order_and_pads_with_invalid_ones(kind, n):
    selection = make(kind)
    split = selection.split(n)
    assert split.valid.shape == (n, -(-3 // n))
    assert split.valid.sum() == 3
    assert split.specs == selection.specs
    assert split.sizes == selection.sizes
    for name, index in selection.indices.items():
        np.testing.assert_array_equal(split.indices[name][split.valid], index)
    assert jax.tree.all(jax.tree.map(lambda x: isinstance(x, np.ndarray), split))


def test_split_of_a_traced_selection_is_that_of_the_host():
    selection = make("two axes, one dropped")
    assert_bitwise(jax.jit(lambda s: s.split(2))(selection), selection.split(2))


# ------------------------------------------------------------------------------------- a pytree


def test_a_new_index_set_is_a_new_argument_and_no_new_trace():
    traces = []

    @jax.jit
    def fn(selection, w):
        traces.append(1)
        return selection.scatter_mean(selection.gather(w), w)

    for seed in range(4):
        index = np.random.default_rng(seed).permutation(6).reshape(3, 2)
        selection = psjax.select(AXES, {"i": index}, like=LIKE)
        assert_trees(fn(selection, W), W)
    assert len(traces) == 1


def test_a_selection_is_a_pytree_of_its_index_arrays():
    selection = make("two axes")
    leaves, treedef = jax.tree.flatten(selection)
    assert len(leaves) == 3
    assert hash(treedef) == hash(jax.tree.structure(make("two axes")))
    assert treedef.unflatten(leaves).num_elements == 3
    assert jax.tree.map(lambda x: None, selection).valid is None  # the constructor checks nothing


def test_ragged_rows_are_padded_past_the_end():
    selection = make("ragged")
    assert selection.indices["i"].tolist() == [[0, 1, 2], [4, 6, 6], [2, 5, 6]]
    assert selection.indices["i"].dtype == np.int32


def test_indices_of_a_narrow_dtype_are_padded_past_a_wide_axis():
    rows = [np.array([0, 1], np.uint8), np.array([255], np.uint8)]
    selection = psjax.select(P("i"), {"i": rows}, like=np.zeros(300))
    assert selection.indices["i"].tolist() == [[0, 1], [255, 300]]


def test_axes_may_be_a_function_and_none_is_shared():
    like = {"a": np.zeros(2), "b": np.zeros(3)}
    selection = psjax.select(lambda like: {"a": P("i"), "b": None}, {"i": [[0]]}, like=like)
    assert selection.specs == (P("i"), P())


def test_an_axis_of_samples_has_the_size_that_is_given_or_its_largest_index():
    indices = {"i": [[0], [1]], "label": [0, 3]}
    assert psjax.select(AXES, indices, like=LIKE).sizes == {"i": 6, "j": 4, "label": 4}
    sizes = {"label": 10}
    assert psjax.select(AXES, indices, like=LIKE, sizes=sizes).sizes["label"] == 10


def test_samples_may_repeat_within_an_element_and_parameters_may_not():
    indices = {"i": [[0, 1]], "label": [[2, 2]]}
    assert psjax.select(AXES, indices, like=LIKE).indices["label"].tolist() == [[2, 2]]
    with pytest.raises(ValueError, match=r"element 1 holds row 3 of axis 'i' 2 times"):
        psjax.select(AXES, {"i": [[0, 1], [3, 3]]}, like=LIKE)


def test_pairs_are_all_pairs():
    assert psjax.ordered_pairs(3).tolist() == [[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]
    assert psjax.unordered_pairs(3).tolist() == [[0, 1], [0, 2], [1, 2]]
    assert len(psjax.ordered_pairs(10)) == 2 * len(psjax.unordered_pairs(10)) == 90


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("axes", "indices", "message"),
    [
        ({"row": P("i")}, OVERLAP, r"axes is not a tree like the parameters; .*\['both'\]"),
        (AXES | {"row": ("i",)}, OVERLAP, r"not a tree like the parameters"),
        (AXES | {"row": "i"}, OVERLAP, r"\['row'\] has axes 'i'; pass a PartitionSpec"),
        (AXES | {"row": P(("i", "j"))}, OVERLAP, r"\['row'\] has axes .*one entry per dimension"),
        (AXES | {"row": P("i", None)}, OVERLAP, r"\['row'\] has shape \(6,\) but axes"),
        (
            AXES | {"middle": P("j", "i")},
            OVERLAP,
            r"axis 'i' has size 6 in \['both'\] but 2 in \['middle'\]",
        ),
        (AXES, {"i": [[0, 1], [2, 6]]}, r"index 6 of element 1 is outside axis 'i' \(size 6\)"),
        (AXES, {"i": [[0, -1]]}, r"index -1 of element 0 is outside axis 'i' \(size 6\)"),
        (AXES, {"i": [2, 6]}, r"index 6 of element 1 is outside axis 'i'"),
        (
            AXES,
            {"i": [[0], [1]], "label": [0, -1]},
            r"index -1 of element 1 is outside axis 'label'",
        ),
        (AXES, {"i": [[0, 1], [3, 3, 1]]}, r"element 1 holds row 3 of axis 'i' 2 times"),
        (AXES, {"i": [[0], [1]], "j": [[0]]}, r"numbers of elements differ, {'i': 2, 'j': 1}"),
        (AXES, {"i": np.zeros((2, 2, 2), int)}, r"axis 'i' has indices of shape \(2, 2, 2\)"),
        (AXES, {"i": 3}, r"axis 'i' has indices of shape \(\)"),
        (AXES, {"i": [[[0, 1]], [[0]]]}, r"axis 'i' has an element of rank 2"),
        (AXES, {"i": [[]]}, r"axis 'i' has no index"),
        (AXES, {"i": np.zeros((0, 2), int)}, r"axis 'i' has no index"),
        (AXES, {}, r"nothing is selected; psjax.replicas"),
    ],
)
def test_select_refuses(axes, indices, message):
    with pytest.raises(ValueError, match=message):
        psjax.select(axes, indices, like=LIKE)


@pytest.mark.parametrize("index", [[[0.0, 1.0]], [[0, 1], [1.5]], [[True, False]], [["a"]]])
def test_select_refuses_indices_that_are_not_integers(index):
    with pytest.raises(TypeError, match=r"axis 'i' has indices of .*; pass integers"):
        psjax.select(AXES, {"i": index}, like=LIKE)


def test_select_refuses_another_size_of_an_axis_of_the_parameters():
    with pytest.raises(ValueError, match="axis 'i' is 7 here but 6 in like"):
        psjax.select(AXES, OVERLAP, like=LIKE, sizes={"i": 7})


@pytest.mark.parametrize("fn", [psjax.ordered_pairs, psjax.unordered_pairs])
def test_one_class_has_no_pairs(fn):
    with pytest.raises(ValueError, match=rf"{fn.__name__}\(1\): one class has no pairs"):
        fn(1)


def test_replicas_are_at_least_one():
    with pytest.raises(ValueError, match=r"replicas\(num_elements=0\): pass 1 or more"):
        psjax.replicas(LIKE, 0)


def test_split_refuses_no_workers_and_a_second_split():
    selection = make("overlap")
    with pytest.raises(ValueError, match=r"split\(0\): n must be positive"):
        selection.split(0)
    with pytest.raises(ValueError, match=r"selection \[E\], not \(3, 1\)"):
        selection.split(3).split(3)


def calls():
    w, y = W, computed("overlap")[1]
    return {
        "gather": lambda s, w: s.gather(w),
        "scatter_add": lambda s, w: s.scatter_add(y, w),
        "scatter_mean": lambda s, w: s.scatter_mean(y, w),
        "counts": lambda s, w: s.counts(w),
    }, w


@pytest.mark.parametrize("name", ["gather", "scatter_add", "scatter_mean", "counts"])
def test_methods_refuse_other_parameters_and_a_split_selection(name):
    methods, w = calls()
    call, selection = methods[name], make("overlap")
    with pytest.raises(ValueError, match=rf"{name}\(.*; they differ in \['row'\]"):
        call(selection, {key: x for key, x in w.items() if key != "row"})
    with pytest.raises(ValueError, match=r"\['row'\] has shape \(5,\), but axis 'i' .* had size 6"):
        call(selection, w | {"row": np.zeros(5)})
    with pytest.raises(ValueError, match=rf"{name}\(.* take this device's part"):
        call(selection.split(2), w)
