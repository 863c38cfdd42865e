"""The weight counts of section 5 and of the paper's tables, counted without computing anything."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import structure
from psjax.models import LeNet, PSNet
from tests import reference

MNIST, CIFAR10, DIGITS = (28, 28, 1), (32, 32, 3), (8, 8, 1)


def annotated(model, image):
    """Axes and shapes of a model's parameters."""
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *image)))
    axes = flax.linen.get_partition_spec(variables)["params"]
    return axes, flax.linen.unbox(variables)["params"]


# n, behind a score, behind an element, common. The paper prints 44426 for the first, 53780 and
# 11588 for the third, all four of the last; the second has the layers that its text names.
TABLE = {
    "LeNet MNIST": (psjax.models.lenet("mnist"), MNIST, (44426, 43661, 43746, 43576)),
    "PSNet MNIST": (psjax.models.psnet("mnist"), MNIST, (46740, 5610, 10180, 1040)),
    "PSNet MNIST 350": (psjax.models.psnet("mnist-53780"), MNIST, (53780, 6314, 11588, 1040)),
    "LeNet CIFAR10": (psjax.models.lenet("cifar10"), CIFAR10, (104182, 103273, 103374, 103172)),
    "PSNet CIFAR10": (psjax.models.psnet("cifar10"), CIFAR10, (81750, 12279, 19998, 4560)),
}


@pytest.mark.parametrize("name", TABLE)
def test_weight_counts_are_those_of_the_table(name):
    model, image, counts = TABLE[name]
    axes, like = annotated(model, image)
    assert structure.count(axes, like) == structure.WeightCounts(*counts)


def test_the_paper_s_lenet_for_cifar10_has_a_first_layer_of_one_channel():
    axes, like = annotated(psjax.models.lenet("cifar10"), (32, 32, 1))
    assert structure.count(axes, like).n == 103882


@pytest.mark.parametrize("name", TABLE)
def test_weight_counts_are_those_of_the_reference_s_masks(name):
    model, image, _ = TABLE[name]
    axes, like = annotated(model, image)
    shapes = [x.shape for x in jax.tree.leaves(like)]
    specs = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, P))
    assert structure.count(axes, like) == reference.weight_counts(shapes, specs, 10)


@pytest.mark.parametrize("num_classes", [2, 5, 10])
def test_of_the_ideal_network_a_score_sees_one_share_and_an_element_two(num_classes):
    """Section 5.3: without common weights, n_j = n/C and n_kj = 2n/C exactly."""
    model = PSNet(num_classes, (), 3, (4,), kernel_sizes=(3,), pools=(2,))
    n, score, element, common = structure.count(*annotated(model, DIGITS))
    assert common == 0
    assert n == num_classes * score
    assert element == 2 * score


def test_counts_hold_for_an_axis_that_is_not_the_first():
    axes, like = {"a": P(None, "class"), "b": P()}, {"a": np.zeros((4, 3)), "b": np.zeros(5)}
    assert structure.count(axes, like) == (17, 9, 13, 5)


# ------------------------------------------------------------------------- of any selection


def test_an_element_sees_what_its_index_sets_hold_and_padding_is_nothing():
    like = {"a": np.zeros((6, 4)), "b": np.zeros((2, 6)), "c": np.zeros(3)}
    axes = {"a": P("i", "j"), "b": P(None, "i"), "c": P()}
    index = {"i": [[0, 1, 2], [5], [2, 3]], "j": [[0], [0, 1, 2, 3], [2, 3]]}
    selection = psjax.select(axes, index, like=like)
    expected = [3 * 1 + 2 * 3 + 3, 1 * 4 + 2 * 1 + 3, 2 * 2 + 2 * 2 + 3]
    assert structure.num_weights(selection, like).tolist() == expected
    last = jax.tree.map(lambda x: x[1], selection.split(2))
    assert structure.num_weights(last, like).tolist() == [expected[2], 0]
    dropped = psjax.select(axes, {"i": [0, 5], "j": [[0, 1], [2, 3]]}, like=like)
    assert structure.num_weights(dropped, like).tolist() == [2 + 2 + 3] * 2
    assert structure.num_weights(psjax.replicas(like, 2), like).tolist() == [24 + 12 + 3] * 2


def test_the_elements_of_a_model_are_its_pairs():
    model, image, counts = TABLE["PSNet MNIST"]
    axes, like = annotated(model, image)
    selection = psjax.select(axes, {"class": psjax.ordered_pairs(10)}, like=like)
    assert set(structure.num_weights(selection, like)) == {counts[2]}


# ---------------------------------------------------------------------------------- dependence


def test_dependence_marks_exactly_the_private_entries():
    """Against the gradients of the scores themselves: a weight is of the scores it moves."""
    model = PSNet(3, (2,), 1, (2,), kernel_sizes=(3, 2), pools=(2, 1))
    axes, like = annotated(model, DIGITS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), like)
    images = rng.normal(size=(2, *DIGITS))
    moved = jax.jit(jax.jacrev(lambda w: model.apply({"params": w}, images).sum(0)))(params)

    def owner(jacobian):
        holds = np.asarray(jacobian) != 0  # [C, ...]
        assert np.all((holds.sum(0) == 1) | holds.all(0))
        return np.where(holds.all(0), -1, holds.argmax(0))

    got = structure.dependence(axes, params)
    jax.tree.map(np.testing.assert_array_equal, got, jax.tree.map(owner, moved))
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("int32")}


def test_dependence_of_a_lenet_is_in_its_last_layer_alone():
    model = LeNet(3, (2,), (4,), kernel_sizes=(3,), pools=(2,))
    axes, like = annotated(model, DIGITS)
    params = jax.tree.map(lambda x: np.zeros(x.shape), like)
    private = jax.tree.map(lambda x: bool(np.any(x >= 0)), structure.dependence(axes, params))
    assert {name for name, layer in private.items() if any(layer.values())} == {"FanOutDense_0"}


def test_dependence_holds_for_an_axis_that_is_not_the_first():
    axes, params = {"a": P(None, "class"), "b": P()}, {"a": np.ones((2, 3)), "b": np.ones(2)}
    got = structure.dependence(axes, params)
    assert got["a"].tolist() == [[0, 1, 2]] * 2
    assert got["b"].tolist() == [-1, -1]


def test_a_network_of_one_class_has_no_element():
    with pytest.raises(
        ValueError, match=r"count\(axis='class'\): .* size 1, .* two classes or more"
    ):
        structure.count({"a": P("class")}, {"a": np.zeros(1)})


@pytest.mark.parametrize("fn", [structure.count, structure.dependence])
def test_an_axis_that_no_parameter_has_is_refused(fn):
    axes, like = {"a": P("class")}, {"a": np.zeros(3)}
    with pytest.raises(ValueError, match=r"\(axis='clas'\): no parameter has this axis; .*'class'"):
        fn(axes, like, axis="clas")
