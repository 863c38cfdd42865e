"""Which weights a score depends on: what the program says, what Jacobians find, the counts."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from psjax import structure
from psjax.models import LeNet, PSNet
from psjax.structure._dependencies import from_jacobians, from_program
from tests.axes.registry import CASES
from tests.structure.test_count import CIFAR10, DIGITS, MNIST, annotated

AGREE = """psjax-psnet psjax-psnet-ideal psjax-psnet-patches psjax-lenet psjax-lenet-native mlp-relu
psjax-mlp-train mlp-weightnorm mlp-batchnorm-train maxout deep-sets lora dict-mlp bilinear
squeeze-excite shufflenet wavenet nnx-mlp""".split()
NETWORKS = {
    "LeNet MNIST": (psjax.models.lenet("mnist"), MNIST),
    "PSNet MNIST": (psjax.models.psnet("mnist"), MNIST),
    "PSNet MNIST 350": (psjax.models.psnet("mnist-53780"), MNIST),
    "LeNet CIFAR10": (psjax.models.lenet("cifar10"), CIFAR10),
    "PSNet CIFAR10": (psjax.models.psnet("cifar10"), CIFAR10),
}


def full(masks, params):
    """Masks in the shapes of the parameters, `[C, *shape]`."""
    wide = lambda m, x: np.broadcast_to(m, (len(m), *np.shape(x)))
    return jax.tree.map(wide, masks, params)


def assert_same(one, two, params):
    jax.tree.map(np.testing.assert_array_equal, full(one, params), full(two, params))


def of_model(model, image, keep=None):
    """Axes, shapes, and what is found without the axes."""
    axes, like = annotated(model, image)
    apply = lambda p, x: model.apply({"params": p}, x)
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    return axes, like, structure.dependencies(apply, like, images)


# ------------------------------------------------------------------------------------- two ways


@pytest.mark.parametrize("name", AGREE)
def test_the_program_says_what_jacobians_find(name):
    apply, params, inputs = CASES[name].make()
    assert_same(
        from_program(apply, params, *inputs), from_jacobians(apply, params, *inputs), params
    )


def test_a_function_of_many_forms_has_the_masks_of_its_jacobian_in_double_precision(x64):
    """A product, a sum of two terms and a transposed leaf, each with the axis of the classes."""

    def apply(w, x):
        both = x @ w["two"]  # [B, 2C]: a gate and its value
        gate, value = jnp.split(both, 2, axis=-1)
        y = jax.nn.sigmoid(gate) * value
        groups = jnp.tanh(x @ w["flat"]).reshape(-1, 4, 3)  # [B, C, 3]
        y = y + jnp.einsum("bci,ic->bc", groups, w["transposed"])
        return jnp.exp(y) * w["scale"] + jnp.concatenate([x @ w["a"], x @ w["b"]], -1) @ w["mixed"]

    shapes = {"two": (3, 8), "flat": (3, 12), "transposed": (3, 4), "scale": ()}
    shapes |= {"a": (3, 2), "b": (3, 5), "mixed": (7, 4), "unused": (2,)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(2, 3)))
    jacobian = jax.jacrev(apply)(params, x)  # [B, C, *shape]
    masks = full(from_program(apply, params, x), params)
    found = jax.tree.map(lambda j: np.any(np.asarray(j) != 0, axis=0), jacobian)
    jax.tree.map(np.testing.assert_array_equal, masks, found)
    assert_same(from_jacobians(apply, params, x), masks, params)
    assert masks["flat"].sum(axis=(1, 2)).tolist() == [9] * 4
    assert not masks["unused"].any()


def test_rows_that_are_cut_off_belong_to_no_score():
    """Of a head with variances, whose scores are the means."""
    apply = lambda w, x: jnp.split(jnp.tanh(x @ w["trunk"]) @ w["head"], 2, axis=-1)
    w = {"trunk": np.ones((3, 5)), "head": np.ones((5, 8))}
    found = structure.dependencies(apply, w, np.ones((2, 3)))
    assert found.masks["head"][:, 0].tolist() == np.eye(4, 8).tolist()
    assert found.counts == structure.WeightCounts(n=55, score=20, element=25, common=15)


def test_the_scores_may_lie_along_any_dimension():
    apply = lambda w, x: w["own"].T @ jnp.tanh(w["trunk"] @ x)
    w = {"trunk": np.ones((5, 3)), "own": np.ones((5, 4))}
    found = structure.dependencies(apply, w, np.ones((3, 7)), axis=0)
    assert found.counts == structure.WeightCounts(n=35, score=20, element=25, common=15)


# ------------------------------------------------------------------------- where Jacobians decide


class Head(nn.Module):
    """A linear classifier and what follows it."""

    last: str

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(3)(x))
        scores = nn.Dense(4)(x)
        mixed = {"none": lambda y: y, "log_softmax": nn.log_softmax, "dense": nn.Dense(4)}
        mixed["reversed"] = lambda y: y[:, ::-1]
        mixed["concatenated"] = lambda y: jnp.concatenate([y[:, :1] ** 2, y[:, 1:]], axis=-1)
        return mixed[self.last](scores)


def head(last):
    x = jax.random.normal(jax.random.key(1), (5, 2))
    model = Head(last)
    return model.apply, model.init(jax.random.key(0), x), x


@pytest.mark.parametrize("last", ["log_softmax", "dense"])
def test_a_head_that_mixes_the_classes_depends_on_everything(last):
    apply, variables, x = head(last)
    found = structure.dependencies(apply, variables, x)
    masks = found.masks["params"]
    own = masks.pop("Dense_2", None)
    assert all(mask.all() for mask in jax.tree.leaves(masks))
    assert own is None or own["kernel"][:, 0].tolist() == np.eye(4).tolist()


@pytest.mark.parametrize(
    ("last", "order"),
    [("none", [0, 1, 2, 3]), ("reversed", [3, 2, 1, 0]), ("concatenated", range(4))],
)
def test_scores_that_the_program_tells_apart_are_found_by_jacobians(last, order):
    apply, variables, x = head(last)
    found = structure.dependencies(apply, variables, x)
    expected = np.eye(4, dtype=bool)[list(order)]
    np.testing.assert_array_equal(found.masks["params"]["Dense_1"]["bias"], expected)
    assert found.masks["params"]["Dense_0"]["kernel"].shape == (4, 1, 1)
    assert found.counts == structure.WeightCounts(n=25, score=13, element=17, common=9)
    ways = set(jax.tree.leaves(found.how))
    assert ways == ({"program"} if last == "none" else {"jacobian"})
    assert ("by Jacobians" in str(found)) == (last != "none")


def test_rows_of_every_score_that_decide_how_often_a_loop_turns_belong_to_every_score():
    """The program alone must not take them for independent."""

    def apply(w, x):
        small = lambda y: jnp.sum(jnp.abs(y)) < 10
        return jax.lax.while_loop(small, lambda y: 2 * y, x @ w)

    with pytest.raises(ValueError, match="does not tell: .* each other's rows"):
        from_program(apply, np.ones((3, 4)), np.ones((2, 3)))


def test_a_leaf_read_by_a_loop_or_a_condition_counts_and_a_dead_one_does_not():
    def apply(w, x):
        def turn(carry, _):
            y, other = carry
            return (jnp.tanh(y @ w["turned"]), other + w["dead"]), None

        (y, _), _ = jax.lax.scan(turn, (x, jnp.zeros(2)), length=2)
        y = jax.lax.cond(x[0, 0] > 0, lambda y: y * w["then"], lambda y: y, y)
        y, _ = jax.lax.fori_loop(0, 3, lambda i, c: (c[0] + c[1], w["late"] * c[1]), (y, y))
        return jax.jit(lambda y, v: (y @ w["own"], v))(y, w["unused"])

    shapes = {"turned": (3, 3), "dead": (2,), "then": (), "late": (), "own": (3, 4), "unused": (2,)}
    w = {name: np.ones(shape) for name, shape in shapes.items()}
    masks = structure.dependencies(apply, w, jnp.ones((2, 3))).masks
    assert [name for name in shapes if not masks[name].any()] == ["dead", "unused"]
    assert masks["own"][:, 0].tolist() == np.eye(4).tolist()
    assert all(masks[name].all() for name in ("turned", "then", "late"))


# ---------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_are_those_of_the_annotated_axes(name):
    """Section 5 and the tables of the paper, of a program without names."""
    axes, like, found = of_model(*NETWORKS[name])
    assert found.counts == structure.count(axes, like)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_counts_under_dropout_are_those_of_the_annotated_axes(rate):
    """Section 6.1: weights one by one, and the trunk."""
    axes, like, found = of_model(PSNet(3, (2,), 2, (2,), (3, 2), (2, 1)), DIGITS)
    keep = psjax.dropout_mask(jax.random.key(0), like, rate, {"Conv_0": 1.0})
    assert found.count(keep) == structure.count(axes, like, keep=keep)
    assert found.count(keep).common == 0


@pytest.mark.parametrize(
    "model", [PSNet(3, (2,), 2, (2,), (3, 2), (2, 1)), LeNet(3, (2,), (4,), (3,), (2,))]
)
def test_masks_are_the_dependence_of_the_annotated_axes(model):
    axes, like, found = of_model(model, DIGITS)
    params = jax.tree.map(lambda x: np.zeros(x.shape), like)
    owner = lambda m: np.where(m.all(0), -1, m.argmax(0))
    got = jax.tree.map(owner, full(found.masks, like))
    jax.tree.map(np.testing.assert_array_equal, got, structure.dependence(axes, params))


def test_the_largest_score_and_pair_are_counted():
    """Where the masks of the scores are of unequal sizes and overlap."""
    apply = lambda w, x: jnp.stack(
        [x * w["a"].sum(), x * w["a"][:2].sum() * w["b"].sum(), x * w["c"].sum()], axis=-1
    )
    w = {"a": jnp.ones(6), "b": jnp.ones(3), "c": jnp.ones(4), "d": jnp.ones(2)}
    found = structure.dependencies(apply, w, jnp.ones(2))
    assert found.counts == structure.WeightCounts(n=15, score=6, element=10, common=0)


def test_variables_of_flax_and_statistics_are_leaves_like_others():
    apply, params, inputs = CASES["mlp-batchnorm"].make()
    found = structure.dependencies(apply, params, *inputs)
    assert jax.tree.structure(found.masks) == jax.tree.structure(params)
    assert set(found.masks) == {"params", "batch_stats"}
    axes = psjax.infer_axes(apply, params, *inputs).rename(output_0="class")
    assert found.counts == structure.count(axes, params)
    frozen = structure.dependencies(apply, flax.core.freeze(params), *inputs)
    assert_same(flax.core.unfreeze(frozen.masks), found.masks, params)


# ---------------------------------------------------------------------------------------- errors


def test_abstract_weights_are_refused_where_the_program_does_not_tell():
    apply, variables, x = head("log_softmax")
    like = jax.eval_shape(lambda: variables)
    match = r"dependencies\(params=...\): the program does not tell .*\['Dense_0'\].* abstract"
    with pytest.raises(ValueError, match=match):
        structure.dependencies(apply, like, x)
    with pytest.raises(ValueError, match=r"from_jacobians\(params=...\): .* without numbers"):
        from_jacobians(apply, like, x)


def test_boxes_are_refused():
    model = PSNet(3, (2,), 2, (2,), (3, 2), (2, 1))
    images = jnp.zeros((1, *DIGITS))
    boxed = jax.eval_shape(model.init, jax.random.key(0), images)
    with pytest.raises(ValueError, match=r"LogicallyPartitioned of Flax; pass flax.linen.unbox"):
        structure.dependencies(model.apply, boxed, images)


@pytest.mark.parametrize(
    ("apply", "axis", "match"),
    [
        (lambda w, x: (x * w).sum(), None, r"axis=None\): the result has shape \[\]"),
        (lambda w, x: x * w, 2, r"axis=2\): the result has shape \[2, 3\]"),
        (lambda w, x: (x * w)[:, :1], None, r"float32\[2, 1\]; .* two classes or more"),
        (lambda w, x: (x * w).argmax(-1), None, r"int32\[2\]; .* in floating point"),
    ],
)
def test_a_result_that_is_no_scores_is_refused(apply, axis, match):
    with pytest.raises(ValueError, match=match):
        structure.dependencies(apply, jnp.ones(3), jnp.ones((2, 3)), axis=axis)


def test_parameters_without_arrays_and_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="no arrays"):
        structure.dependencies(lambda w, x: x, {}, jnp.ones((2, 3)))
    apply = lambda w, x: jax.nn.log_softmax(x * w / 0.0)
    with pytest.raises(ValueError, match="in none of 32 draws"):
        structure.dependencies(apply, jnp.ones(3), jnp.ones((2, 3)))


def test_the_axes_of_the_classes_are_not_needed():
    """A model of no library, with its classes in the middle of a leaf."""
    apply = lambda w, x: jnp.einsum("bi,ick,k->bc", x, w["core"], w["last"])
    w = {"core": np.ones((2, 3, 4)), "last": np.ones(4)}
    found = structure.dependencies(apply, w, np.ones((5, 2)))
    assert found.counts == structure.count({"core": P(None, "class"), "last": P()}, w)
