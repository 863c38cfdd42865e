"""Every form of a loss is the same number; values and gradients stay finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import psjax
from psjax import losses
from tests import reference

MARGINS = {
    "psl": (losses.exponential, np.exp),
    "psl-squared": (losses.squared_exponential, lambda z: np.exp(2 * z)),
    "psl-bounded": (losses.bounded_exponential, lambda z: reference.safe_exp(z, 4.0)),
    "one-vs-each": (losses.softplus, lambda z: np.log1p(np.exp(z))),
    "squared-hinge": (losses.squared_hinge, lambda z: np.maximum(0, 1 + z) ** 2),
}
named_margins = pytest.mark.parametrize("name", MARGINS)


def _scores(num_classes=5, batch=11, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, num_classes)) * scale, rng.integers(0, num_classes, batch)


@named_margins
def test_whole_network_form_is_equation_6b(x64, name):
    scores, labels = _scores()
    margin_fn, phi = MARGINS[name]
    got = losses.psl_with_integer_labels(jnp.asarray(scores), jnp.asarray(labels), margin_fn)
    np.testing.assert_allclose(np.mean(got), reference.sum_of_elements(scores, labels, phi), 1e-12)


@named_margins
def test_sum_of_pairs_is_the_whole(x64, name):
    scores, labels = _scores()
    margin_fn, _ = MARGINS[name]
    total = 0.0
    for k, j in psjax.ordered_pairs(5):
        own = labels == k
        weight = jnp.full(own.sum(), 1 / len(labels))
        total += losses.pair(jnp.asarray(scores[own][:, [k, j]]), weight, margin_fn)
    whole = losses.psl_with_integer_labels(jnp.asarray(scores), jnp.asarray(labels), margin_fn)
    np.testing.assert_allclose(total, jnp.mean(whole), rtol=1e-12)


@named_margins
def test_block_of_all_classes_is_the_whole(x64, name):
    """With empty slots, whose scores are inf and must not matter."""
    scores, labels = _scores()
    margin_fn, _ = MARGINS[name]
    slots = np.bincount(labels).max() + 1
    by_label, weight = np.full((5, slots, 5), np.inf), np.zeros((5, slots))
    for k in range(5):
        own = scores[labels == k]
        by_label[k, : len(own)], weight[k, : len(own)] = own, 1 / len(labels)
    pairs = jnp.asarray(1 - np.eye(5))
    got = losses.block(jnp.asarray(by_label), jnp.asarray(weight), pairs, margin_fn)
    whole = losses.psl_with_integer_labels(jnp.asarray(scores), jnp.asarray(labels), margin_fn)
    np.testing.assert_allclose(got, jnp.mean(whole), rtol=1e-12)


def test_psl_is_the_exponential_of_nll_less_one(x64):
    scores, labels = map(jnp.asarray, _scores())
    psl = losses.psl_with_integer_labels(scores, labels)
    np.testing.assert_allclose(
        psl, jnp.exp(losses.nll_with_integer_labels(scores, labels)) - 1, rtol=1e-12
    )
    squared = losses.psl_with_integer_labels(scores, labels, losses.squared_exponential)
    doubled = losses.psl_with_integer_labels(2 * scores, labels)
    np.testing.assert_allclose(squared, doubled, rtol=1e-12)


def test_gradient_of_psl_is_nll_weighted_by_the_inverse_probability(x64):
    scores, labels = map(jnp.asarray, _scores())
    psl = jax.grad(lambda s: losses.psl_with_integer_labels(s, labels).sum())(scores)
    nll = jax.grad(lambda s: losses.nll_with_integer_labels(s, labels).sum())(scores)
    probability = jax.nn.softmax(scores)[jnp.arange(len(labels)), labels]
    np.testing.assert_allclose(psl, nll / probability[:, None], rtol=1e-11)


def test_nll_and_one_vs_all_equal_the_reference(x64):
    scores, labels = _scores()
    for got, want in (
        (losses.nll_with_integer_labels, reference.nll),
        (losses.one_vs_all_with_integer_labels, reference.one_vs_all),
    ):
        value = got(jnp.asarray(scores), jnp.asarray(labels))
        np.testing.assert_allclose(value, want(scores, labels), rtol=1e-12)


def test_one_vs_all_is_the_sum_of_its_class_elements(x64):
    scores, labels = map(jnp.asarray, _scores())
    parts = [losses.one_score(scores[:, j], labels == j) for j in range(5)]
    whole = losses.one_vs_all_with_integer_labels(scores, labels)
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-12)


def test_exponential_is_exact_up_to_the_bound_and_its_tangent_beyond(x64):
    z = jnp.array([-700.0, -1.0, 0.0, 39.0, 40.0, 41.0, 1e6])
    value, slope = jax.vmap(jax.value_and_grad(lambda z: losses.exponential(z, 40.0)))(z)
    np.testing.assert_allclose(value[:5], np.exp(z[:5]), rtol=1e-15)
    np.testing.assert_allclose(value[5:], np.exp(40.0) * (z[5:] - 39), rtol=1e-15)
    np.testing.assert_allclose(slope, np.exp(np.minimum(z, 40.0)), rtol=1e-15)
    assert losses.exponential(jnp.float64(299.0)) == np.exp(299.0)


@named_margins
@pytest.mark.parametrize("size", [1.0, 50.0, 89.0, 1e4, 1e16])
def test_value_and_squared_gradient_are_finite_in_float32(name, size):
    """Adam's second moment, the square of the gradient, must not be inf: it would stay so."""
    margin_fn, _ = MARGINS[name]
    scores = jnp.asarray([[size, -size, 0.0], [-size, size, 0.0]], jnp.float32)
    loss = lambda s: losses.psl_with_integer_labels(s, jnp.array([1, 2]), margin_fn).mean()
    value, grad = jax.value_and_grad(loss)(scores)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()
    if name.startswith("psl") or name == "one-vs-each":
        assert jnp.isfinite(jnp.square(grad)).all()


EXPONENTIALS = {
    "exponential": (losses.exponential, 1, {"float32": 40.0, "float64": 300.0}),
    "squared": (losses.squared_exponential, 2, {"float32": 40.0, "float64": 300.0}),
    "bounded": (losses.bounded_exponential, 1, {"float32": 4.0, "float64": 4.0}),
}
EVERY_WAY = {
    "reverse": (jax.grad, lambda fn: jax.grad(jax.grad(fn))),
    "forward": (jax.jacfwd, lambda fn: jax.jacfwd(jax.jacfwd(fn))),
    "mixed": (jax.jacrev, jax.hessian),
}


@pytest.mark.parametrize("name", EXPONENTIALS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("way", EVERY_WAY)
def test_derivatives_of_the_exponentials_are_right_at_every_margin(x64, name, dtype, way):
    """The tangent's slope is e^B and its curvature 0, also where its value is no float any more."""
    fn, factor, bounds = EXPONENTIALS[name]
    bound = bounds[dtype]
    tiny, most = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).max)
    z = [-np.inf, -most, -1e22, -700, -1, -tiny, 0, 1, bound / factor, bound + 1, 1e6, 1e16, 1e22]
    z = jnp.array([*z, most / 3, most, np.inf], dtype)
    first, second = (jax.jit(jax.vmap(d(fn)))(z) for d in EVERY_WAY[way])
    below = np.asarray(z) <= bound / factor
    power = np.exp(factor * np.clip(np.asarray(z, np.float64), -1e4, bound / factor))
    tolerance = {"rtol": 1e-5 if dtype == "float32" else 1e-13, "atol": tiny}
    np.testing.assert_allclose(first, factor * power, **tolerance)
    np.testing.assert_allclose(second, np.where(below, factor**2 * power, 0), **tolerance)
    assert first.dtype == second.dtype == dtype


@named_margins
def test_derivatives_of_a_loss_are_finite_wherever_its_scores_are(name):
    """In float32 the value may be inf; a margin above e^80 is one of the scores' tangents."""
    margin_fn, _ = MARGINS[name]
    scores = jnp.array([[1e22, 0.0, -1e22], [3e38, -3e38, 0.0], [-1e22, 1.0, np.inf]], jnp.float32)
    labels = jnp.array([1, 1, 2])
    loss = lambda s, y: losses.psl_with_integer_labels(s, y, margin_fn)
    derivatives = jax.jit(jax.vmap(lambda s, y: (jax.grad(loss)(s, y), jax.hessian(loss)(s, y))))
    grad, hessian = derivatives(scores, labels)
    assert not jnp.isnan(grad).any()
    assert jnp.isfinite(grad).all() or name == "squared-hinge"  # which is 2 (1 + z), twice 6e38
    assert jnp.isfinite(hessian).all()
    assert not grad[2].any()  # the label's score is infinitely larger


def test_a_nan_margin_stays_nan_in_value_and_gradient():
    for fn, _, _ in EXPONENTIALS.values():
        assert np.isnan(jax.value_and_grad(fn)(jnp.nan)).all()


def test_a_low_bound_bounds_the_gradient():
    z = jnp.linspace(-5, 100, 50)
    slope = jax.vmap(jax.grad(losses.bounded_exponential))(z)
    assert slope.max() <= np.exp(4.0) * (1 + 1e-6)


@pytest.mark.parametrize("dtype", [np.int32, np.int8])
@pytest.mark.parametrize("name", [*MARGINS, "nll", "one-vs-all"])
def test_labels_out_of_range_give_nan_never_a_number(name, dtype):
    """In the value and in every entry of the gradient, of that sample alone."""
    loss = _loss_of_labels(name)
    labels = jnp.array([-1, 4, 0, -100, 100, 3], dtype)
    outside = np.array([True, True, False, True, True, False])
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
    got, grad = jax.jit(lambda s: (loss(s, labels), jax.grad(lambda s: loss(s, labels).sum())(s)))(
        scores
    )
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.isnan(got), outside)
    np.testing.assert_array_equal(np.isnan(grad), np.repeat(outside[:, None], 4, 1))
    assert np.isfinite(got[~outside]).all()
    assert np.isfinite(grad[~outside]).all()


def _loss_of_labels(name):
    if name in MARGINS:
        return functools.partial(losses.psl_with_integer_labels, margin_fn=MARGINS[name][0])
    return {
        "nll": losses.nll_with_integer_labels,
        "one-vs-all": losses.one_vs_all_with_integer_labels,
    }[name]


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("name", ["psl", "nll", "one-vs-all"])
def test_a_label_is_the_same_number_in_every_type(x64, name, dtype):
    """Also with more classes than the type can hold: class 256 is not 0 in uint8."""
    labels = np.array([0, 44, 127, 3], dtype)
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)))

    @jax.jit
    def run(labels):
        loss = lambda s: _loss_of_labels(name)(s, labels)
        return loss(scores), jax.grad(lambda s: loss(s).sum())(scores)

    for got, want in zip(run(labels), run(labels.astype(np.int32)), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64, np.uint32])
@pytest.mark.parametrize("name", ["psl", "nll", "one-vs-all"])
def test_a_label_that_int32_would_wrap_into_range_is_outside(x64, name, dtype):
    outside = 2**32 + 1 if dtype != np.uint32 else 2**32 - 1
    labels = jnp.asarray(np.array([1, outside], dtype))
    got = jax.jit(lambda s: _loss_of_labels(name)(s, labels))(jnp.zeros((2, 4)))
    np.testing.assert_array_equal(np.isnan(got), [False, True])


@named_margins
@pytest.mark.parametrize("form", ["pair", "block", "unused pairs of a block"])
def test_what_has_no_weight_has_no_part_in_any_derivative(x64, form, name):
    """Value, gradient and Hessian are those of the samples and pairs with a weight, else 0."""
    margin_fn, _ = MARGINS[name]
    rng = np.random.default_rng(0)
    if form == "pair":
        scores, weight = rng.normal(size=(3, 2)), np.array([0.5, 0, 0.25])
        unused = np.repeat(weight[:, None] == 0, 2, 1)
        loss = lambda s, w: losses.pair(s, w, margin_fn)
    else:
        scores, weight, pairs = rng.normal(size=(2, 2, 3)), np.full((2, 2), 0.25), 1 - np.eye(2, 3)
        if form == "block":
            weight[0, 1] = weight[1, 0] = 0
            unused = np.repeat(weight[..., None] == 0, 3, 2)
        else:
            pairs[:, 2] = 0
            unused = np.zeros(scores.shape, bool)
            unused[..., 2] = True
        loss = lambda s, w: losses.block(s, w, jnp.asarray(pairs), margin_fn)
    derivatives = (loss, jax.grad(loss), jax.grad(loss, 1), jax.hessian(loss))
    run = jax.jit(lambda s, w: [fn(s, w) for fn in derivatives])
    want = run(jnp.where(unused, -0.3, scores), weight)
    assert all(np.isfinite(x).all() for x in want)
    assert not want[1][unused].any()
    assert not want[2][weight == 0].any()
    assert not want[3][unused].any()
    assert want[3][~unused].any()
    for filler in (np.nan, np.inf, -np.inf, 1e30):
        got = run(jnp.where(unused, filler, scores), weight)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("any_type")
def test_bad_input_is_named():
    loss = losses.psl_with_integer_labels
    with pytest.raises(TypeError, match="labels are float32; pass integers"):
        loss(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"scores have shape \(3,\) and labels \(3,\)"):
        loss(jnp.zeros(3), jnp.zeros(3, int))
    with pytest.raises(ValueError, match="1 class; a margin needs two scores"):
        loss(jnp.zeros((2, 1)), jnp.zeros(2, int))
    with pytest.raises(ValueError, match=r"scores have shape \(2, 3\)"):
        losses.pair(jnp.zeros((2, 3)), jnp.zeros(2))
    with pytest.raises(ValueError, match="pass scores"):
        losses.block(jnp.zeros((2, 4, 3)), jnp.zeros((2, 4)), jnp.zeros((2, 2)))
    for pairs in (jnp.zeros(3), jnp.zeros((2, 2, 3)), 1.0):
        with pytest.raises(ValueError, match=r"pairs \(.*pass scores .* pairs \[l, s\]"):
            losses.block(jnp.zeros((2, 4, 3)), jnp.zeros((2, 4)), pairs)
    with pytest.raises(ValueError, match=r"weight \(2,\), pairs \(2, 3\); pass"):
        losses.block(jnp.zeros((2, 3)), jnp.zeros(2), jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="l <= s"):
        losses.block(jnp.zeros((3, 4, 2)), jnp.zeros((3, 4)), jnp.zeros((3, 2)))
    for name in ("pls", "PSL"):
        match = rf"\('{name}'\): no such loss; pass one of .*\. Did you mean 'psl'\?"
        with pytest.raises(ValueError, match=match):
            losses.margin_function(name)
    with pytest.raises(ValueError, match=r"pass one of \[.*\]\.$"):
        losses.margin_function("nothing alike")
    with pytest.raises(ValueError, match="this loss has no bound"):
        losses.margin_function("one-vs-each", 4.0)


def test_the_names_are_the_functions():
    for name, (fn, _) in MARGINS.items():
        assert losses.margin_function(name) is fn
    assert isinstance(losses.margin_function("psl", 4.0), functools.partial)
