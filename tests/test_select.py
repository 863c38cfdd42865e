"""What `axes`, `like`, `sizes` and `indices` mean to the functions that make selections."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

import psjax
from psjax import ist, plan, structure

KEY = jax.random.key(0)
LIKE = {
    "trunk": {"kernel": np.zeros((5, 4)), "bias": np.zeros(4)},
    "head": {"kernel": np.zeros((6, 4)), "bias": np.zeros(6)},
}
WHOLE = {
    "trunk": {"kernel": P(), "bias": P()},
    "head": {"kernel": P("class"), "bias": P("class")},
}
ROWS = {"class": [[0, 1], [1, 2], [4, 5]]}
SIZES = {"class": 6}

# Every function that takes `axes`, as a call of it that divides or selects the axis `class`.
CALLS = {
    "select": lambda axes, like: psjax.select(axes, ROWS, like=like),
    "random_partition": lambda axes, like: psjax.random_partition(
        KEY, axes, SIZES, num_elements=2, like=like
    ),
    "membership": lambda axes, like: ist.membership(0, 3, axes, SIZES, 2, like=like),
    "Store": lambda axes, like: plan.Store(axes, like, 2),
    "count": lambda axes, like: structure.count(axes, like),
    "dependence": lambda axes, like: structure.dependence(axes, like),
    "Plan.selection": lambda axes, like: plan.pairs(6, 2).selection(axes, like),
}
every_call = pytest.mark.parametrize("call", CALLS)


def same(a, b):
    if isinstance(a, plan.Store):
        return (a.axes, a.num_classes) == (b.axes, b.num_classes)
    if isinstance(a, psjax.Selection):
        return a == b
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


# ------------------------------------------------------------------------------- trees of axes


@every_call
@pytest.mark.parametrize(
    "axes",
    [
        {"trunk": None, "head": P("class")},
        {"trunk": P(), "head": {"kernel": P("class"), "bias": P("class")}},
        {"trunk": {"kernel": None, "bias": None}, "head": P("class")},
        lambda like: {"trunk": None, "head": P("class")},
    ],
    ids=["prefix", "shared prefix", "none", "function"],
)
def test_an_entry_stands_for_the_whole_subtree_under_it(call, axes):
    assert same(CALLS[call](axes, LIKE), CALLS[call](WHOLE, LIKE))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("tree",), meta_fields=())
@dataclasses.dataclass(frozen=True)
class Module:
    """A pytree that can be called, as the modules of equinox."""

    tree: dict

    def __call__(self, x):
        raise NotImplementedError


@every_call
def test_a_callable_pytree_is_a_tree_of_axes_and_no_function(call):
    axes, like = Module({"trunk": None, "head": P("class")}), Module(LIKE)
    assert same(CALLS[call](axes, like), CALLS[call](Module(WHOLE), like))


def test_one_entry_may_stand_for_all_parameters():
    like = {"a": np.zeros((3, 2)), "b": np.zeros(3)}
    assert psjax.select(P("i"), {"i": [[0]]}, like=like).specs == (P("i"), P("i"))


@every_call
def test_parameters_that_are_none_have_no_leaf(call):
    like = {**LIKE, "frozen": None, "empty": {}}
    expected = CALLS[call](WHOLE, LIKE)
    for rest in ({"frozen": None, "empty": {}}, {"frozen": P(), "empty": P()}, {"frozen": P("x")}):
        axes = {**WHOLE, **rest}
        got = CALLS[call](axes, like)
        if isinstance(got, psjax.Selection):
            assert got == expected
            params = jax.tree.map(jnp.asarray, like)
            assert got.scatter_mean(got.gather(params), params)["frozen"] is None
        elif isinstance(got, plan.Store):
            assert got.whole(got.shard(like))["frozen"] is None
        else:
            assert got is not None


@every_call
def test_axes_that_lack_a_part_of_the_parameters_are_refused_by_name(call):
    with pytest.raises(ValueError, match=r"has no entry for \['trunk'\]\['bias'\], .*None: all el"):
        CALLS[call]({"head": P("class")}, LIKE)
    with pytest.raises(ValueError, match=r"the parameters have no \['head'\]\['scale'\]"):
        CALLS[call]({"trunk": None, "head": {**WHOLE["head"], "scale": P("class")}}, LIKE)
    with pytest.raises(ValueError, match=r"have no \['trunk'\]\['bias'\]\['x'\]"):
        CALLS[call]({"trunk": {"kernel": P(), "bias": {"x": P()}}, "head": P("class")}, LIKE)


@every_call
@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"kernel": P("class")}, r"has no entry for \['head'\]\['bias'\]"),
        (P("class", "width", None), r"\['head'\]\['bias'\] has shape \(6,\) but axes"),
        (P("class", "class"), r"\['head'\]\['bias'\] has shape|axis 'class' has size 6 in"),
        ({"kernel": P(None, "class"), "bias": P("class")}, r"axis 'class' has size 6 in .*but 4 "),
        (
            {"kernel": P("4*"), "bias": P("class")},
            r"\['head'\]\['kernel'\] has axes .*'4\*' does not d",
        ),
        ({"kernel": P("4*class"), "bias": P("class")}, r"dimension 0 of .* has size 6, but '4\*cl"),
        ({"kernel": P("a*b"), "bias": P("class")}, r"does not tell the sizes of \['a', 'b'\]"),
        ({"kernel": "class", "bias": P("class")}, r"\['head'\]\['kernel'\] has axes 'class'; pass"),
        ({"kernel": np.zeros(3), "bias": P("class")}, r"has an array in \['head'\]\['kernel'\]"),
    ],
)
def test_every_error_about_axes_names_the_function_that_was_called(call, head, message):
    with pytest.raises(ValueError, match=rf"^{call}\(axes=\.\.\.\): .*{message}"):
        CALLS[call]({"trunk": None, "head": head}, LIKE)


@every_call
def test_what_is_no_array_among_the_parameters_is_refused(call):
    like = {**LIKE, "activation": jnp.tanh}
    with pytest.raises(
        ValueError, match=rf"^{call}\(like=\.\.\.\): \['activation'\] is .*not an array"
    ):
        CALLS[call]({**WHOLE, "activation": None}, like)


# --------------------------------------------------------------------------- metadata of Flax


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_boxes_of_metadata_are_nodes_of_the_tree_and_stay(box):
    w = jnp.arange(6.0)
    boxed = {"w": box(w, ("class",)), "b": jnp.ones(2)}
    axes = nn.get_partition_spec(boxed)
    fn = psjax.value_and_grad(lambda u: jnp.sum(nn.unbox(u)["w"] ** 2) + jnp.sum(u["b"]))
    expected = fn(nn.unbox(boxed), psjax.select(axes, ROWS, like=nn.unbox(boxed)))
    for given in (axes, nn.get_partition_spec, {"w": P("class"), "b": None}):
        selection = psjax.select(given, ROWS, like=boxed)
        value, grads = fn(boxed, selection)
        assert isinstance(grads["w"], box)
        assert value == expected[0]
        assert same(nn.unbox(grads), expected[1])
        assert isinstance(selection.scatter_mean(selection.gather(boxed), boxed)["w"], box)


def test_variables_of_nnx_are_nodes_of_the_tree_and_a_prefix_names_their_axes():
    model = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
    _, params = nnx.split(model)
    selection = psjax.select({"kernel": P(None, "class"), "bias": P("class")}, ROWS, like=params)
    seen = selection.gather(params)
    assert isinstance(seen["bias"], nnx.Param)
    assert seen["kernel"].get_value().shape == (3, 4, 2)


# ------------------------------------------------------------------ partitions with `like`


@pytest.mark.parametrize("call", ["random_partition", "membership"])
def test_a_partition_with_the_parameters_is_the_one_without_and_checks_their_sizes(call):
    assert CALLS[call](WHOLE, LIKE) == CALLS[call](WHOLE, None)
    like = {**LIKE, "head": {"kernel": np.zeros((7, 4)), "bias": np.zeros(7)}}
    with pytest.raises(ValueError, match=rf"^{call}\(sizes=...\): axis 'class' is 6 here but 7 in"):
        CALLS[call](WHOLE, like)
    with pytest.raises(ValueError, match=rf"^{call}\(axes=...\): axes is a function .*like="):
        CALLS[call](lambda like: WHOLE, None)


def test_a_partition_of_a_product_of_axes_takes_the_other_sizes_from_the_parameters():
    like = {"qkv": np.zeros((5, 24)), "out": np.zeros((8, 5))}
    axes = {"qkv": P(None, "3*heads*dim"), "out": P("heads*dim")}
    draw = functools.partial(psjax.random_partition, KEY, axes, {"heads": 4}, num_elements=2)
    with pytest.raises(ValueError, match=r"\['out'\] has axes .* size of 'dim' is not known; pass"):
        draw()
    assert draw(like=like).sizes == {"heads": 4, "dim": 2}  # 'heads' is given, so 'dim' follows
    axes["norm"], like["norm"] = P("dim"), np.zeros(2)
    selection = psjax.random_partition(KEY, axes, {"heads": 4}, num_elements=2, like=like)
    assert selection.sizes == {"heads": 4, "dim": 2}
    w = jax.tree.map(lambda x: jnp.arange(1.0, x.size + 1).reshape(x.shape), like)
    seen = selection.gather(w)
    assert jax.tree.map(jnp.shape, seen) == {"qkv": (2, 5, 12), "out": (2, 4, 5), "norm": (2, 2)}
    for e, heads in enumerate(selection.indices["heads"]):
        expected = w["qkv"].reshape(5, 3, 4, 2)[:, :, heads].reshape(5, 12)
        np.testing.assert_array_equal(seen["qkv"][e], expected)
    assert same(selection.scatter_mean(seen, w), w)


# ----------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["clas", "Class", "classes", "calss"])
def test_a_slip_of_an_axis_is_refused_with_the_nearest_name(name):
    indices = {name: ROWS["class"]}
    message = rf"^select\(indices=...\): no parameter has an axis '{name}'; the nearest is 'class'"
    with pytest.raises(ValueError, match=message):
        psjax.select(WHOLE, indices, like=LIKE)
    assert psjax.select(WHOLE, indices, like=LIKE, sizes={name: 6}).sizes[name] == 6
    for call in (psjax.random_partition, ist.membership):
        args = (KEY,) if call is psjax.random_partition else (0, 0)
        count = "num_elements" if call is psjax.random_partition else "num_subnets"
        with pytest.raises(
            ValueError, match=rf"no parameter has an axis '{name}'; the nearest is "
        ):
            call(*args, WHOLE, {name: 6}, **{count: 2})


@pytest.mark.parametrize("name", ["label", "batch", "sample", "task", "slot"])
def test_another_name_selects_samples(name):
    axes = {"a": P("patch"), "b": P("class")}
    like = {"a": np.zeros(3), "b": np.zeros(6)}
    selection = psjax.select(axes, {**ROWS, name: [0, 3, 1]}, like=like)
    assert selection.sizes == {"patch": 3, "class": 6, name: 4}


# --------------------------------------------------------------------------------------- numbers


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
def test_sizes_are_positive_integers(size):
    message = rf"\(sizes=...\): axis 'class' has size {size}; pass an integer"
    with pytest.raises(ValueError, match=r"^select" + message):
        psjax.select(WHOLE, ROWS, like=LIKE, sizes={"class": size})
    with pytest.raises(ValueError, match=r"^random_partition" + message):
        psjax.random_partition(KEY, WHOLE, {"class": size}, num_elements=2)
    with pytest.raises(ValueError, match=r"^membership" + message):
        ist.membership(0, 0, WHOLE, {"class": size}, 2)


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (0, r"=0\): pass 1 or more"),
        (-2, r"=-2\): pass 1 or more"),
        (2.0, r"=2.0\): pass 1 or more"),
        (7, r"=7\): num_\w+=7 exceeds size 6 of axis 'class'"),
    ],
)
def test_numbers_of_elements_are_refused_by_the_user_s_word(number, message):
    with pytest.raises(ValueError, match=r"^random_partition\(num_elements" + message):
        psjax.random_partition(KEY, WHOLE, SIZES, num_elements=number)
    with pytest.raises(ValueError, match=r"^membership\(num_subnets" + message):
        ist.membership(0, 0, WHOLE, SIZES, number)
    if number != 7:
        with pytest.raises(ValueError, match=r"^replicas\(num_elements" + message):
            psjax.replicas(LIKE, number)


@pytest.mark.parametrize("name", ["seed", "round_number"])
@pytest.mark.parametrize("number", [-1, 2**32, 2**70, np.int64(-1)])
def test_a_round_outside_32_bits_is_refused(name, number):
    given = {"seed": 0, "round_number": 0, name: number}
    with pytest.raises(ValueError, match=rf"^membership\({name}=-?\d+\): pass an integer from 0"):
        ist.membership(**given, axes=WHOLE, sizes=SIZES, num_subnets=2)


@pytest.mark.parametrize("number", [1.0, True, "1", np.arange(2), None])
def test_a_round_is_an_integer(number):
    with pytest.raises(TypeError, match=r"^membership\(round_number=.*\): pass an integer"):
        ist.membership(0, number, WHOLE, SIZES, 2)


def test_the_last_round_may_be_traced_and_is_the_host_s():
    last = 2**32 - 1
    draw = lambda number: ist.membership(last, number, WHOLE, SIZES, 2).indices
    assert same(jax.jit(draw)(np.uint32(last)), draw(last))


# ------------------------------------------------------------------------------------ index sets


def test_masked_places_hold_no_row():
    index = np.array([[9, 2, 0], [1, 9, 9], [2, 5, 9]])
    masked = np.ma.masked_equal(index, 9)
    selection = psjax.select(WHOLE, {"class": masked}, like=LIKE)
    assert selection.indices["class"].tolist() == [[6, 2, 0], [1, 6, 6], [2, 5, 6]]
    ragged = psjax.select(WHOLE, {"class": [[1], [2, 5]]}, like=LIKE)
    assert psjax.select(WHOLE, {"class": masked[1:, :2]}, like=LIKE) == ragged
    labels = psjax.select(WHOLE, {"label": np.ma.masked_equal([[9, 3], [1, 9]], 9)}, like=LIKE)
    assert labels.sizes["label"] == 4
    with pytest.raises(ValueError, match="index 9 of element 0 is outside"):
        psjax.select(WHOLE, {"class": np.ma.masked_equal(index, 2)}, like=LIKE)


@pytest.mark.parametrize("seed", range(3))
def test_ragged_rows_are_padded_as_row_by_row(seed):
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(6)[: rng.integers(0, 7)] for _ in range(50)]
    rows[7], rows[8] = [], range(3)
    expected = np.full((50, max(map(len, rows))), 6)
    for e, row in enumerate(rows):
        expected[e, : len(row)] = row
    got = psjax.select(WHOLE, {"class": rows}, like=LIKE).indices["class"]
    np.testing.assert_array_equal(got, expected)
