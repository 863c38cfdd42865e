"""Theorems about `check_elements`: which elements add up to a loss, and why others do not."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from tests import separable_model as model

C, L = 4, 12
PAIRS = psjax.ordered_pairs(C)


def by_label(x, labels):
    """The samples of each label, padded with the last sample at weight 0."""
    rows = [np.flatnonzero(labels == k) for k in range(C)]
    most = max(map(len, rows))
    index = np.array([np.resize(np.append(r, len(labels) - 1), most) for r in rows])
    for i, r in enumerate(rows):
        index[i, : len(r)] = r
    weight = np.array([np.arange(most) < len(r) for r in rows]) / len(labels)
    return {"x": x[index], "weight": jnp.asarray(weight, x.dtype)}


def phi(scores):
    return jnp.exp(scores[:, 1] - scores[:, 0])


class Problem:
    """The elements of (6b) on the small network, with whatever is wrong with them."""

    def __init__(self, scores=model.scores, dtype=float):
        self.scores = scores
        self.params = model.init(C, dtype)
        x, labels = model.make_data(C, L, dtype)
        self.whole_args = (x, labels)
        self.batch = by_label(x, labels)
        self.selection = self.select(PAIRS, PAIRS[:, 0])

    def select(self, pairs, label):
        return psjax.select(model.AXES, {"class": pairs, "label": label}, like=self.params)

    def element(self, w, batch):
        return jnp.sum(batch["weight"] * phi(self.scores(w, batch["x"])))

    def whole(self, w, x, labels):
        return jnp.mean(psjax.losses.psl_with_integer_labels(self.scores(w, x), labels))

    def check(self, element=None, whole=None, selection=None, **kwargs):
        psjax.check_elements(
            element or self.element,
            whole or self.whole,
            kwargs.pop("params", self.params),
            selection or self.selection,
            kwargs.pop("batch", self.batch),
            in_axes=P("label"),
            whole_args=self.whole_args,
            **kwargs,
        )

    def message(self, **kwargs):
        with pytest.raises(ValueError, match="check_elements: the elements do not add up") as e:
            self.check(**kwargs)
        return str(e.value)


# ------------------------------------------------------------------------------ what adds up passes


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_the_elements_of_the_loss_pass_in_any_precision(x64, dtype):
    Problem(dtype=dtype).check()


@pytest.mark.parametrize(("seed", "noise"), [(0, 0), (1, 0.5)])
def test_they_pass_at_any_parameters_and_in_chunks(x64, seed, noise):
    Problem().check(seed=seed, chunk_size=3, noise=noise)


def test_one_flat_batch_may_serve_both(x64):
    p = Problem()

    def element(w, pair, x, labels):
        return jnp.sum((labels == pair[0]) * phi(p.scores(w, x))) / L

    selection = psjax.select(model.AXES, {"class": PAIRS}, like=p.params)
    fn = lambda w, _, x, labels: p.whole(w, x, labels)
    in_axes = (0, None, None)
    args = (jnp.asarray(PAIRS), *p.whole_args)
    psjax.check_elements(element, fn, p.params, selection, *args, in_axes=in_axes)


def test_a_log_softmax_in_the_model_does_not_change_margins(x64):
    """c_j - c_k is the same before and after: the elements still add up, and training is right."""
    Problem(lambda w, x: jax.nn.log_softmax(model.scores(w, x))).check()


def test_masked_weights_are_zero_in_both(x64):
    p = Problem()
    keep = {**dict.fromkeys(model.AXES), "trunk": np.arange(7) % 2 == 0}
    p.check(selection=p.selection.drop(keep))


def test_parameters_that_are_zero_are_moved(x64):
    """At zero parameters every margin is 0, and samples of the wrong label cost the same."""
    p = Problem()
    wrong = p.select(PAIRS, PAIRS[:, 1])
    zero = jax.tree.map(jnp.zeros_like, p.params)
    assert "indices" in p.message(params=zero, selection=wrong)


def test_the_functions_may_be_compiled_ones(x64):
    p = Problem()
    p.check(whole=jax.jit(p.whole), element=jax.jit(p.element))


# ----------------------------------------------------------- what does not is found, with its cause


def test_samples_of_the_other_label(x64):
    p = Problem()
    message = p.message(selection=p.select(PAIRS, PAIRS[:, 1]))
    assert "They agree with indices {'label': class[:, 0]}" in message
    for leaf in p.params:
        assert f"['{leaf}']" in message


def test_samples_of_the_other_label_where_weights_are_masked(x64):
    p = Problem()
    keep = {**dict.fromkeys(model.AXES), "trunk": np.arange(7) % 2 == 0}
    message = p.message(selection=p.select(PAIRS, PAIRS[:, 1]).drop(keep))
    assert "They agree with indices {'label': class[:, 0]}" in message


@pytest.mark.parametrize("power", [1, -1])
def test_a_forgotten_division_by_the_size_of_the_batch(x64, power):
    p = Problem()
    batch = {**p.batch, "weight": p.batch["weight"] * L**power}
    message = p.message(batch=batch)
    times = {1: f"are {L} times", -1: f"are 1/{L} times"}[power]
    assert f"Value and gradient of the elements {times} those of whole_loss" in message
    assert f"{L} is the length of whole_args[0]" in message
    assert "(a forgotten 1/L)" in message


def test_pairs_that_are_there_twice(x64):
    p = Problem()
    twice = np.concatenate([PAIRS, PAIRS])
    message = p.message(selection=p.select(twice, twice[:, 0]))
    assert "are 2 times those of whole_loss. A weight" in message


def test_a_factor_of_the_gradient_beside_a_constant(x64):
    p = Problem()
    message = p.message(whole=lambda w, *args: 1 + p.whole(w, *args) / 3)
    assert (
        "The gradient of the elements is 3 times those of whole_loss, but the value is not"
        in message
    )


def test_a_constant_term(x64):
    """(6a) of the paper counts j = y, (6b) does not: 1 per sample."""
    p = Problem()
    message = p.message(whole=lambda w, *args: 1 + p.whole(w, *args))
    assert "The gradient agrees and the value differs by -1:" in message
    assert "the gradient agrees in 5 leaves" in message


def normalised(scores, axis):
    return lambda w, x: (c := scores(w, x)) / jnp.linalg.norm(c, axis=axis, keepdims=True)


def test_a_norm_over_the_scores(x64):
    message = Problem(normalised(model.scores, -1)).message()
    assert re.search(r"rows \[\d, \d, \d\] of axis 'class' act together", message)
    assert "no element holds all of them" in message
    line = normalised.__code__.co_firstlineno + 1
    assert f"a sum over its rows meets them again (div test_checks.py:{line})" in message


def test_outputs_that_are_no_class_scores(x64):
    """Probabilities of all classes: a network of two of them gives other ones, and is told so."""
    p = Problem()

    def apply(w, x):
        return jax.nn.softmax(model.scores(w, x))

    x, labels = p.whole_args
    axes = psjax.infer_axes(apply, p.params, x)
    (name,) = (axis.name for axis in axes.axes.values() if axis.kind == "output")
    pair_scores = psjax.narrow(apply, axes, {name: 2})

    def element(w, pair, x, labels):
        return jnp.sum((labels == pair[0]) * phi(pair_scores(w, x))) / L

    def whole(w, _, x, labels):
        margins = [phi(apply(w, x)[:, pair]) for pair in PAIRS]
        return sum(jnp.sum((labels == k) * m) for (k, _), m in zip(PAIRS, margins)) / L

    selection = psjax.select(axes, {name: PAIRS}, like=p.params)
    args = (jnp.asarray(PAIRS), x, labels)
    line = apply.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"act together .*test_checks.py:{line}\)"):
        psjax.check_elements(element, whole, p.params, selection, *args, in_axes=(0, None, None))


def test_a_batch_norm_in_the_trunk(x64):
    def scores(w, x):
        x = (x - x.mean(0)) / (x.std(0) + 1e-3)
        return model.scores(w, x)

    message = Problem(scores).message()
    assert (
        "whole_loss is not a sum over samples: what one sample adds depends on the others"
        in message
    )
    assert "batch normalisation" in message


def one_against_all(scores):
    """Elements of one score each, over all samples."""
    params, (x, labels) = model.init(C), model.make_data(C, L)
    axes, rows = model.AXES, np.arange(C)[:, None]
    selection = psjax.select(axes, {"class": rows}, like=params)
    sign = jnp.asarray(1 - 2 * (labels == rows), x.dtype)
    loss = lambda sign, c: jnp.sum(jax.nn.softplus(sign * c)) / L
    psjax.check_elements(
        lambda w, sign: loss(sign, scores(w, x)[:, 0]),
        lambda w: loss(sign, scores(w, x).T),
        params,
        selection,
        sign,
        in_axes=0,
        whole_args=(),
    )


def test_a_log_softmax_in_the_model_before_one_against_all(x64):
    one_against_all(model.scores)
    with pytest.raises(ValueError, match=r"rows \[\d, \d\] of axis 'class' act together"):
        one_against_all(lambda w, x: jax.nn.log_softmax(model.scores(w, x)))


def stopped(name):
    def scores(w, x):
        return model.scores({**w, name: jax.lax.stop_gradient(w[name])}, x)

    return scores


@pytest.mark.parametrize("name", ["trunk", "wide", "bias"])
def test_a_leaf_whose_gradient_is_missing_is_named_alone(x64, name):
    p = Problem()
    other = Problem(stopped(name))
    message = p.message(element=other.element)
    assert re.findall(r"gradient of \['(\w+)'\]", message) == [name]
    assert "the gradient agrees in 4 leaves" in message
    assert "The value agrees and the gradient does not" in message


@pytest.mark.parametrize(
    ("names", "kind"),
    [(["trunk", "shift"], "that every element sees whole"), (["bias"], "with a selected axis")],
)
def test_where_only_leaves_of_one_kind_differ_they_are_said_to(x64, names, kind):
    """A penalty that only the whole loss has."""
    p = Problem()
    penalty = lambda w: sum(jnp.sum(jnp.sin(w[name])) for name in names)
    message = p.message(whole=lambda w, *args: p.whole(w, *args) + penalty(w))
    assert sorted(re.findall(r"gradient of \['(\w+)'\]", message)) == sorted(names)
    assert f"Only leaves {kind} differ" in message


def test_another_loss_altogether(x64):
    p = Problem()
    squared = lambda w, x, labels: jnp.mean(
        psjax.losses.psl_with_integer_labels(p.scores(w, x), labels, psjax.losses.softplus)
    )
    assert "No single cause fits: the two functions differ in the loss" in p.message(whole=squared)


def test_numbers_that_are_not_finite(x64):
    p = Problem()
    message = p.message(whole=lambda w, *args: p.whole(w, *args) / 0)
    assert "Some numbers are NaN or Inf" in message


def test_many_leaves_are_not_all_listed(x64):
    w = [jnp.asarray(1.0 + i) for i in range(20)]
    selection = psjax.replicas(w, 1)
    element, whole = (lambda w: sum(w)), (lambda w: sum(x**2 for x in w))
    with pytest.raises(ValueError, match="and 12 more leaves"):
        psjax.check_elements(element, whole, w, selection)


@pytest.mark.parametrize("tolerance", [None, 1e-3])
def test_a_difference_below_the_tolerance_passes_and_above_it_raises(x64, tolerance):
    p = Problem()
    small = tolerance or 1.5e-8
    scaled = lambda factor: functools.partial(
        p.check, whole=lambda w, *a: factor * p.whole(w, *a), tolerance=tolerance
    )
    scaled(1 + small / 2)()
    with pytest.raises(ValueError, match="do not add up"):
        scaled(1 + 2 * small)()


# ---------------------------------------------------------------------------------------- bad input


def test_a_whole_loss_that_is_no_scalar_is_refused(x64):
    p = Problem()
    with pytest.raises(
        ValueError, match=r"check_elements: whole_loss must return .* float64\[12\]"
    ):
        p.check(whole=lambda w, x, labels: p.scores(w, x)[:, 0])


def test_the_elements_of_a_model_of_the_library_in_one_line():
    """The contract's example, in float32."""
    net = psjax.models.psnet("digits", num_classes=4)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(L, 8, 8, 1)), jnp.float32)
    labels = jnp.arange(L) % 4
    variables = jax.jit(net.init)(jax.random.key(0), images)
    params, axes = nn.unbox(variables)["params"], nn.get_partition_spec(variables)["params"]
    two = net.clone(num_classes=2)

    def h(w, batch):
        scores = two.apply({"params": w}, batch["image"])
        return jnp.sum(batch["weight"] * phi(scores))

    @jax.jit
    def whole_loss(w, images, labels):
        scores = net.apply({"params": w}, images)
        return jnp.mean(psjax.losses.psl_with_integer_labels(scores, labels))

    batch = {
        "image": images.reshape(L // 4, 4, 8, 8, 1).swapaxes(0, 1),
        "weight": jnp.full((4, L // 4), 1 / L, jnp.float32),
    }
    pairs = psjax.ordered_pairs(4)
    selection = psjax.select(axes, {"class": pairs, "label": pairs[:, 0]}, like=params)
    own = {"in_axes": P("label"), "whole_args": (images, labels)}
    psjax.check_elements(h, whole_loss, params, selection, batch, **own)
