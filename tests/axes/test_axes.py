"""Axes found in a program: what they are called, what is fixed and why, and whom they are for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from tests.axes.registry import CASES


def weights():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return {"a": draw(5, 8), "b": draw(8, 6), "bias": draw(6), "c": draw(6, 3)}


def network(w, x):
    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"] + w["bias"]) @ w["c"]


X = jax.ShapeDtypeStruct((4, 5), jnp.float32)
SPECS = {
    "a": P("input_0", "hidden_0"),
    "b": P("hidden_0", "hidden_1"),
    "bias": P("hidden_1"),
    "c": P("hidden_1", "output_0"),
}


def test_names_follow_the_depth_and_are_the_same_at_every_call():
    w = jax.eval_shape(weights)
    axes = psjax.infer_axes(network, w, X)
    assert axes.specs == SPECS
    assert axes.sizes == {"input_0": 5, "hidden_0": 8, "hidden_1": 6, "output_0": 3}
    assert list(axes.sizes) == ["input_0", "hidden_0", "hidden_1", "output_0"]
    assert str(psjax.infer_axes(network, w, X)) == str(axes)
    assert axes.inputs == (P(None, "input_0"),)
    assert axes.outputs == (P(None, "output_0"),)
    # The order of the leaves in the tree does not matter.
    renamed = {"z": w["a"], "y": w["b"], "x": w["bias"], "u": w["c"]}
    other = lambda w, x: network({"a": w["z"], "b": w["y"], "bias": w["x"], "c": w["u"]}, x)
    assert psjax.infer_axes(other, renamed, X).specs["y"] == SPECS["b"]


def test_the_table_says_what_a_person_asks():
    axes = psjax.infer_axes(lambda w, x: network(w, jnp.cumsum(x, axis=1)), weights(), X)
    text = str(axes)
    assert "hidden_0     8  hidden  ['a'] 1, ['b'] 0" in text
    assert "it is accumulated in order (cumsum test_axes.py:" in text
    assert "['a'] 0 (size 5)" in text
    assert axes.specs["a"] == P(None, "hidden_0")


def test_axes_are_what_every_function_of_the_core_takes():
    w = weights()
    axes = psjax.infer_axes(network, w, X)
    index = {"hidden_0": [[0, 2], [1, 3]]}
    found = psjax.select(axes, index, like=w).gather(w)
    want = psjax.select(SPECS, index, like=w).gather(w)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    sizes = axes.divisible
    assert sizes == {"hidden_0": 8, "hidden_1": 6}
    one = psjax.ist.membership(0, 0, axes, sizes, 2)
    two = psjax.ist.membership(0, 0, SPECS, sizes, 2, like=w)
    jax.tree.map(np.testing.assert_array_equal, one.gather(w), two.gather(w))
    assert axes.shares(3) == {"hidden_0": 3, "hidden_1": 2}
    with pytest.raises(ValueError, match=r"shares\(7\): axis 'hidden_1' has 6 rows"):
        axes.shares(7)
    with pytest.raises(ValueError, match=r"parameters have other shapes than those of infer_axes"):
        psjax.select(axes, index, like={**w, "c": jnp.ones((6, 4))})


def test_renamed_axes():
    axes = psjax.infer_axes(network, weights(), X).rename(output_0="class", hidden_1="last")
    assert axes.specs["c"] == P("last", "class")
    assert axes["class"].kind == "output"
    assert axes.outputs == (P(None, "class"),)
    with pytest.raises(ValueError, match=r"no axis 'hiden_0'; pass one of \['input_0', 'hidden_0'"):
        axes.rename(hiden_0="x")
    with pytest.raises(ValueError, match=r"'hidden_0' \(8, hidden\) and 'last' \(6, hidden\)"):
        axes.rename(hidden_0="last")
    square = lambda w, x: jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"]
    same = {"a": jnp.ones((5, 4)), "b": jnp.ones((4, 4)), "c": jnp.ones((4, 3))}
    merged = psjax.infer_axes(square, same, X).rename(hidden_0="width", hidden_1="width")
    assert merged.specs["b"] == P("width", "width")
    assert merged.sizes == {"input_0": 5, "width": 4, "output_0": 3}
    psjax.check_axes(square, merged, same, jnp.ones((4, 5)))


@pytest.mark.parametrize(
    ("layer", "text", "primitive"),
    [
        (nn.standardize, "a sum over its rows meets them again", "sub"),
        (lambda h: h / jnp.linalg.norm(h, axis=1, keepdims=True), "meets them again", "div"),
        (nn.softmax, "an extreme value is taken over it", "reduce_max"),
        (lambda h: h * nn.sigmoid(h.sum(1, keepdims=True)), "meets them again", "mul"),
        (
            lambda h: jnp.concatenate([h, h.max(1, keepdims=True)], 1)[:, :6],
            "extreme",
            "reduce_max",
        ),
        (lambda h: nn.sigmoid(h).mean(1, keepdims=True) + 0 * h, "counts its rows", "reduce_sum"),
    ],
)
def test_what_can_be_permuted_but_not_divided(layer, text, primitive):
    fn = lambda w, x: layer(jnp.tanh(x @ w["a"]) @ w["b"] + w["bias"]) @ w["c"]
    w = weights()
    axes = psjax.infer_axes(fn, w, X)
    (name,) = [axis.name for axis in axes.axes.values() if axis.kind == "normalised"]
    assert axes[name].leaves == (("['b']", 1), ("['bias']", 0), ("['c']", 0))
    assert text in axes[name].coupled.text
    assert axes[name].coupled.primitive == primitive
    assert axes.divisible == {"hidden_0": 8}
    psjax.check_axes(fn, axes, w, jnp.ones((4, 5)) * jnp.arange(4.0)[:, None])
    with pytest.raises(ValueError, match=r"subnets of axis '.*' are not independent: .*test_axes"):
        psjax.ist.membership(0, 0, axes, {name: 6}, 2, like=w)


def test_a_primitive_without_a_rule_fixes_what_it_touches():
    fn = lambda w, x: jnp.fft.fft(jnp.tanh(x @ w["a"]) @ w["b"]).real @ w["c"]
    axes = psjax.infer_axes(fn, weights(), X)
    assert axes.unknown == {"fft": 1}
    assert axes.specs["b"] == P("hidden_0", None)
    assert "a primitive without a rule (fft test_axes.py:" in str(axes)


def test_dimensions_that_no_division_makes_alike_are_fixed():
    """Both `a * a` and `a + a`."""

    def products(w, x):
        y = x @ w
        pairs = (y[:, :, None] * y[:, None, :]).reshape(-1, 4)
        return pairs + jnp.concatenate([y, y], -1)

    axes = psjax.infer_axes(products, jnp.ones((3, 2)), jnp.ones((5, 3)))
    assert axes.specs == P("input_0", None)
    parts = lambda w, x: ((w * x)[::2][:1], (w * x)[::2][1:], (w * x)[:1], (w * x)[1:])
    assert psjax.infer_axes(parts, jnp.ones(4), jnp.ones(4)).specs == P(None)


@pytest.mark.parametrize("loop", ["while", "cond"])
def test_a_decision_by_all_rows_couples_them(loop):
    def fn(w, x):
        h = x @ w["a"]
        if loop == "while":
            h = jax.lax.while_loop(lambda h: jnp.sum(h) < 10.0, lambda h: 2 * h + 1, h)
        else:
            h = jax.lax.cond(jnp.sum(h) < 10.0, lambda h: 2 * h, lambda h: h, h)
        return jnp.tanh(h @ w["b"] + w["bias"]) @ w["c"]

    axes = psjax.infer_axes(fn, weights(), X)
    assert axes.divisible == {"hidden_0": 6}
    assert "a sum over its rows decides on them" in str(axes)


def test_a_callback_fixes_what_it_sees():
    def fn(w, x):
        h = jnp.tanh(x @ w["a"]) @ w["b"]
        jax.debug.callback(lambda h: None, h)
        return jnp.tanh(h) @ w["c"]

    axes = psjax.infer_axes(fn, weights(), X)
    assert axes.specs["b"] == P("hidden_0", None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(bias=P()), r"dimension 0 of \['bias'\] goes together with axis 'hidden_1'"),
        (dict(c=P(None, "output_0")), r"dimension 0 of \['c'\] goes together with axis 'hidden_1'"),
        (dict(bias=P("other")), r"'hidden_1' and 'other' are one axis, of 6 rows"),
        (dict(a=P("hidden_1", "hidden_0")), r"'hidden_1' has size 5 in \['a'\] but 6 in \['b'\]"),
        (dict(a=P("hidden_0")), r"'hidden_0' has size 5 in \['a'\] but 8 in \['b'\]"),
    ],
)
def test_a_wrong_annotation_is_named(change, message):
    psjax.check_axes(network, SPECS, weights(), jnp.ones((4, 5)))
    with pytest.raises(ValueError, match=message):
        psjax.check_axes(network, {**SPECS, **change}, weights(), jnp.ones((4, 5)))


def test_an_axis_whose_rows_are_told_apart_is_named():
    fn = lambda w, x: jnp.cumsum(jnp.tanh(x @ w["a"]), 1) @ w["b"] @ w["c"]
    with pytest.raises(ValueError, match=r"axis 'hidden_0' are told apart: it is accumulated"):
        psjax.check_axes(fn, {**SPECS, "bias": P()}, weights(), jnp.ones((4, 5)))


def test_a_wrong_rule_is_found_by_the_numbers(monkeypatch):
    """As if psjax thought that a cumulative sum treats all rows alike."""
    from psjax.axes._rules import RULES

    monkeypatch.setitem(RULES, "cumsum", RULES["tanh"])
    fn = lambda w, x: jnp.cumsum(jnp.tanh(x @ w["a"]), 1) @ w["b"] @ w["c"]
    axes = {**SPECS, "bias": P()}
    with pytest.raises(ValueError, match=r"permuting the 8 rows of axis 'hidden_0' changes"):
        psjax.check_axes(fn, axes, weights(), jnp.ones((4, 5)))


def test_a_function_that_keeps_count_is_told_so():
    calls = []

    def apply(params, x):
        calls.append(x)  # a side effect: a tracer that is kept
        return len(calls) * jnp.tanh(x @ params[0]) @ params[1]

    params, x = [jnp.ones((4, 8)), jnp.ones((8, 3))], jnp.ones((2, 4))
    axes = psjax.infer_axes(apply, params, x)
    with pytest.raises(ValueError, match="apply returns other results when it is called again"):
        psjax.check_axes(apply, axes, params, x)


def test_a_function_that_draws_numbers_of_its_own_is_told_so():
    rng = np.random.default_rng(0)
    apply = lambda w, x: rng.normal() * jnp.tanh(x @ w[0]) @ w[1]
    params, x = [jnp.ones((4, 8)), jnp.ones((8, 3))], jnp.ones((2, 4))
    axes = psjax.infer_axes(apply, params, x)
    with pytest.raises(ValueError, match="or NumPy's random numbers. JAX traces a function once"):
        psjax.check_axes(apply, axes, params, x)


def test_what_a_function_only_keeps_does_not_disturb():
    """A list of activations, as hooks make it: the results are the same."""
    seen = []
    apply = lambda w, x: (seen.append(h := jnp.tanh(x @ w[0])), h @ w[1])[1]
    params, x = [jnp.ones((4, 8)), jnp.ones((8, 3))], jnp.ones((2, 4))
    axes = psjax.infer_axes(apply, params, x)
    assert axes.divisible == {"hidden_0": 8}
    psjax.check_axes(apply, axes, params, x)


def test_experts_are_found_where_a_router_ranks_them():
    apply, params, inputs = CASES["mixture-of-experts"].make()
    axes = psjax.infer_axes(apply, params, *inputs)
    assert axes.specs["in"] == P("experts_0", "input_0", "hidden_0")
    assert axes.specs["router"] == P("input_0", "experts_0")


def test_heads_are_found_in_unequal_parts_of_a_fused_kernel():
    apply, params, inputs = CASES["grouped-query-fused"].make()
    axes = psjax.infer_axes(apply, params, *inputs)
    heads = "heads_0*hidden_0*hidden_1+heads_0*hidden_1+heads_0*hidden_2"
    assert axes.specs["qkv"] == P("input_0", heads)


def test_parts_of_a_concatenation_are_axes_of_their_own():
    apply, params, inputs = CASES["densenet"].make()
    axes = psjax.infer_axes(apply, params, *inputs)
    assert axes.specs["params"]["Conv_5"]["kernel"][2] == "hidden_0+hidden_2+hidden_4"


def test_subnets_of_a_residual_network_and_a_transformer_pass_the_check():
    for name, inner in (("gpt", ["heads_0", "heads_1"]), ("resnet18-batchnorm", ["hidden_1"])):
        apply, params, inputs = CASES[name].make()
        axes = psjax.infer_axes(apply, params, *inputs)
        half = {axis: axes.sizes[axis] // 2 for axis in inner}
        small = psjax.narrow(apply, axes, half)
        rows = {axis: np.arange(2 * size).reshape(2, -1) for axis, size in half.items()}
        selection = psjax.select(axes, rows, like=params)
        assert psjax.ist.check_subnets(apply, small, params, selection, *inputs) is None


def test_the_channels_that_residual_blocks_share_are_no_subnets_by_themselves():
    """What one block adds up over them the next adds to them again."""
    apply, params, inputs = CASES["resnet18-batchnorm"].make()
    axes = psjax.infer_axes(apply, params, *inputs)
    small = psjax.narrow(apply, axes, {"hidden_0": 4})
    selection = psjax.select(axes, {"hidden_0": np.arange(8).reshape(2, 4)}, like=params)
    with pytest.raises(
        ValueError, match=r"neurons of axis 'hidden_0' meet a value that depends on"
    ):
        psjax.ist.check_subnets(apply, small, params, selection, *inputs)


def test_parameters_without_arrays_are_refused():
    with pytest.raises(TypeError, match=r"infer_axes\(params=...\): the parameters have no arrays"):
        psjax.infer_axes(lambda w, x: x, {}, X)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_narrow_dtypes_can_be_checked(dtype):
    w = jax.tree.map(lambda x: x.astype(dtype), weights())
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), dtype)
    psjax.check_axes(network, psjax.infer_axes(network, w, x), w, x)


def test_integer_inputs_and_tied_weights():
    rng = np.random.default_rng(0)
    w = {"embed": jnp.asarray(rng.normal(size=(11, 6))), "up": jnp.asarray(rng.normal(size=(6, 9)))}

    def apply(w, ids):
        x = w["embed"][ids]
        return (jnp.tanh(x @ w["up"]) @ w["up"].T) @ w["embed"].T

    ids = jnp.asarray([[0, 3, 5], [1, 1, 10]])
    axes = psjax.infer_axes(apply, w, ids)
    assert axes.specs == {"embed": P(None, "hidden_0"), "up": P("hidden_0", "hidden_1")}
    psjax.check_axes(apply, axes, w, ids)


@pytest.mark.usefixtures("x64")
def test_five_lines_for_any_function():
    """The README's: axes, a narrower function, a step of subnets."""
    import optax

    w, x, y = weights(), jnp.ones((4, 5)), jnp.zeros(4, int)
    axes = psjax.infer_axes(network, w, x)
    small = psjax.narrow(network, axes, {name: n // 2 for name, n in axes.divisible.items()})
    nll = optax.softmax_cross_entropy_with_integer_labels
    update = psjax.local_update(lambda w, b: nll(small(w, b[0]), b[1]).mean(), optax.sgd(0.1))
    subnets = psjax.ist.membership(0, 0, axes, axes.divisible, 2, like=w)
    batches = jax.tree.map(lambda b: jnp.stack([b[None]] * 2), (x, y))
    found, _, metrics = jax.jit(update)(w, optax.sgd(0.1).init(w), subnets, batches)
    assert np.all(metrics.finite)
    assert all(jnp.any(a != b) for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(w)))
