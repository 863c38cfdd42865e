"""Section 6.1 and figure 5: the structure under dropout, elements that share no weight."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import structure
from tests import separable_model as model
from tests.masks import (
    AXES,
    KEEP,
    LIKE,
    ORDERED,
    SELECTIONS,
    TRUNK,
    UNORDERED,
    C,
    batch_by_label,
    close,
    element,
    incidence,
    masked,
    pairs_of,
    same_bits,
    whole,
)

pytestmark = pytest.mark.usefixtures("x64")
every_mask = pytest.mark.parametrize("mask", KEEP)


# --------------------------------------------------------------------------------- the structure


def annotated(net, image):
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, *image)))
    axes = flax.linen.get_partition_spec(variables)["params"]
    return axes, flax.linen.unbox(variables)["params"]


PRESETS = {
    "mnist": ((28, 28, 1), (46740, 5610, 10180, 1040), (45700, 4570, 9140, 0)),
    "mnist-53780": ((28, 28, 1), (53780, 6314, 11588, 1040), (52740, 5274, 10548, 0)),
    "cifar10": ((32, 32, 3), (81750, 12279, 19998, 4560), (77190, 7719, 15438, 0)),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_without_the_first_convolution_a_psnet_is_ideal(preset):
    """Figure 5: no common weight, n_j = n/C, and scores that share nothing."""
    image, before, after = PRESETS[preset]
    axes, like = annotated(psjax.models.psnet(preset), image)
    keep = psjax.dropout_mask(jax.random.key(0), like, layers={"Conv_0": 1.0})
    assert structure.count(axes, like) == before
    assert structure.count(axes, like, keep=keep) == after
    scores = psjax.select(axes, {"class": np.arange(10)[:, None]}, like=like)
    np.testing.assert_array_equal(
        structure.overlap(scores.drop(keep), like), after[1] * np.eye(10, dtype=int)
    )
    shared = before[3] + (before[1] - before[3]) * np.eye(10, dtype=int)
    np.testing.assert_array_equal(structure.overlap(scores, like), shared)


def test_of_the_figure_s_network_the_scores_move_with_their_own_weights_alone():
    """Dependence after the drop against the gradients of the scores themselves."""
    net = psjax.models.PSNet(3, (2,), 1, (2,), kernel_sizes=(3, 2), pools=(2, 1))
    axes, like = annotated(net, (8, 8, 1))
    keep = psjax.dropout_mask(jax.random.key(0), like, layers={"Conv_0": 1.0})
    keep = jax.tree.map(lambda k: bool(k), keep)
    rng = np.random.default_rng(0)
    w = jax.tree.map(lambda x: rng.normal(size=x.shape), like)
    images = rng.normal(size=(2, 8, 8, 1))
    scores = lambda w: net.apply({"params": w}, images).sum(0)
    selection = psjax.replicas(w, 1).drop(keep)
    take = lambda w: jax.tree.map(lambda x: x[0], selection.gather(w))
    moved = jax.jit(jax.jacrev(lambda w: scores(take(w))))(w)

    def owner(jacobian):
        holds = np.asarray(jacobian) != 0  # [C, ...]
        assert np.all(holds.sum(0) <= 1)
        return np.where(holds.any(0), holds.argmax(0), -2)

    same_bits(structure.dependence(axes, w, keep=keep), jax.tree.map(owner, moved))


@pytest.mark.parametrize("kind", ["overlap", "ragged", "row dropped", "replicas", "two axes"])
@every_mask
def test_overlaps_are_those_of_dense_incidence(kind, mask):
    like, axes, keep = LIKE, AXES, KEEP[mask]
    if kind == "two axes":
        like = {"a": np.zeros((4, 2, 3)), "b": np.zeros((3,)), "c": np.zeros(())}
        axes = {"a": P("i", None, "j"), "b": P("j"), "c": P()}
        a = np.random.default_rng(1).random((4, 1, 3)) < 0.5
        keep = {
            "nothing": dict.fromkeys(like),
            "the trunk": {"a": None, "b": None, "c": False},
            "weights": {n: np.random.default_rng(2).random(x.shape) < 0.5 for n, x in like.items()},
            "rows and columns": {"a": a, "b": None, "c": True},
            "weights of a row": {"a": a[0], "b": a[0, 0], "c": False},
        }[mask]
        index = {"i": [[0, 1], [1, 2], [3, 1]], "j": [[0], [0, 1, 2], [2]]}
    else:
        index = SELECTIONS[kind] or {}
    plain = psjax.select(axes, index, like=like) if index else psjax.replicas(like, 3)
    selection = plain.drop(keep)
    holds = incidence(axes, like, index or {"nothing": [0] * 3}, keep).astype(int)
    np.testing.assert_array_equal(structure.overlap(selection, like), holds @ holds.T)
    np.testing.assert_array_equal(structure.num_weights(selection, like), holds.sum(1))


def test_an_element_that_is_not_valid_shares_nothing():
    selection = jax.tree.map(lambda x: x[1], pairs_of(UNORDERED[:3]).drop(TRUNK).split(2))
    got = structure.overlap(selection, LIKE)
    assert got[0, 0] > 0
    assert got[1].tolist() == [0, 0]


@every_mask
def test_counts_under_a_mask_are_those_of_dense_incidence(mask):
    keep = KEEP[mask]
    score = incidence(AXES, LIKE, {"class": np.arange(C)[:, None]}, keep)
    pair = incidence(AXES, LIKE, {"class": UNORDERED}, keep)
    want = (score.any(0).sum(), score.sum(1).max(), pair.sum(1).max(), score.all(0).sum())
    assert structure.count(AXES, LIKE, keep=keep) == want


# ------------------------------------------------------------------- elements that share no weight


@pytest.mark.parametrize("num_classes", range(2, 34))
def test_rounds_have_every_pair_once_and_no_class_twice(num_classes):
    got = structure.rounds(num_classes)
    assert got.dtype == np.int32
    odd = num_classes % 2
    assert got.shape == (num_classes - 1 + odd, num_classes // 2, 2)
    pairs = sorted(map(tuple, got.reshape(-1, 2).tolist()))
    assert pairs == [tuple(p) for p in psjax.unordered_pairs(num_classes).tolist()]
    for pairs in got.reshape(len(got), -1):
        assert len(set(pairs.tolist())) == num_classes - odd


@functools.cache
def like_of(num_classes):
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.tree.map(shape, jax.eval_shape(lambda: model.init(num_classes)))


def check_rounds(found, selection, like):
    """Every valid element once; no two of a round share a weight."""
    assert sorted(np.concatenate(found).tolist()) == np.flatnonzero(selection.valid).tolist()
    shared = structure.overlap(selection, like)
    for together in found:
        part = shared[np.ix_(together, together)]
        assert not np.any(part - np.diag(np.diag(part)))


@pytest.mark.parametrize("num_classes", [2, 3, 4, 7, 10, 13, 16])
@pytest.mark.parametrize("ordered", [False, True])
def test_without_the_trunk_all_pairs_take_the_fewest_rounds(num_classes, ordered):
    """A class is in C - 1 pairs, twice that if ordered; for odd C one sits out each round."""
    like = like_of(num_classes)
    pairs = (psjax.ordered_pairs if ordered else psjax.unordered_pairs)(num_classes)
    pairs = np.random.default_rng(0).permutation(pairs)
    selection = pairs_of(pairs, num_classes, like)
    found = structure.disjoint_rounds(selection.drop(TRUNK), like)
    check_rounds(found, selection.drop(TRUNK), like)
    assert len(found) == (1 + ordered) * (num_classes - 1 + num_classes % 2)


def test_with_the_trunk_every_element_is_alone():
    found = structure.disjoint_rounds(pairs_of(ORDERED), LIKE)
    assert [e.size for e in found] == [1] * len(ORDERED)
    partly = TRUNK | {"shift": None}  # one shared weight is enough
    assert len(structure.disjoint_rounds(pairs_of(ORDERED).drop(partly), LIKE)) == len(ORDERED)


@pytest.mark.parametrize("seed", range(5))
def test_rounds_of_any_elements_share_no_weight(seed):
    """Blocks of one to four classes, a selection with padding, and masks that cut overlaps."""
    rng, like = np.random.default_rng(seed), like_of(12)
    rows = [rng.permutation(12)[: rng.integers(1, 5)].tolist() for _ in range(15)]
    selection = psjax.select(AXES, {"class": rows}, like=like).drop(TRUNK)
    part = jax.tree.map(lambda x: x[1], selection.split(2))
    wide = rng.random((12, 1, 1)) < 0.5
    masks = TRUNK | {"deep": wide[:, 0, 0], "bias": wide[:, 0, 0], "wide": wide}
    for s in (selection, part, selection.drop(masks)):
        found = structure.disjoint_rounds(s, like)
        check_rounds(found, s, like)
        assert len(found) < 15


def test_a_few_pairs_never_take_more_rounds_than_greedily_or_by_the_circle():
    like = like_of(6)
    star = np.array([[0, 1], [0, 2], [0, 3]])  # greedily 3, by the circle 3
    matching = np.array([[0, 1], [2, 3], [4, 5]])  # greedily 1
    for pairs, rounds in ((star, 3), (matching, 1)):
        selection = pairs_of(pairs, 6, like).drop(TRUNK)
        assert len(structure.disjoint_rounds(selection, like)) == rounds


@pytest.mark.parametrize("num_classes", [5, 6])
def test_the_rounds_together_are_the_whole_gradient_of_the_network_without_its_trunk(num_classes):
    """As a scan over rounds, each a partition, and as one call with elements in that order."""
    like, w, batch = like_of(num_classes), model.init(num_classes), batch_by_label(num_classes)
    want = jax.jit(jax.value_and_grad(lambda w: whole(masked(TRUNK, w), num_classes)))(w)
    fn = psjax.value_and_grad(element, P("label"), chunk_size=num_classes // 2)

    selection = pairs_of(psjax.unordered_pairs(num_classes), num_classes, like).drop(TRUNK)
    together = structure.in_rounds(selection, like)
    assert together.disjoint == ("class", "label")
    assert together.valid.shape == (num_classes - 1 + num_classes % 2, num_classes // 2)
    assert together.valid.all()

    def body(total, selection):
        return jax.tree.map(jnp.add, total, fn(w, selection, batch)), None

    zeros = jax.tree.map(jnp.zeros_like, want)
    close(jax.jit(lambda: jax.lax.scan(body, zeros, together)[0])(), want)

    pairs = structure.rounds(num_classes).reshape(-1, 2)
    in_order = pairs_of(pairs, num_classes, like).drop(TRUNK)
    close(jax.jit(fn)(w, in_order, batch), want)


def test_a_round_s_gradient_goes_home_without_a_scatter():
    """Of 20 classes: elements that hold larger parts return by gathers in any case."""
    w = {"own": jnp.arange(40.0).reshape(20, 2), "columns": jnp.ones((3, 20))}
    axes = {"own": P("class"), "columns": P(None, "class")}
    selection = psjax.select(axes, {"class": psjax.unordered_pairs(20)}, like=w)
    first = jax.tree.map(lambda x: x[0], structure.in_rounds(selection, w))
    plain = psjax.select(axes, {"class": first.indices["class"]}, like=w, specialize=False)
    fn = psjax.value_and_grad(lambda w: sum(jnp.sum(jnp.sin(x)) for x in w.values()), None, 10)
    adds = lambda s: str(jax.make_jaxpr(fn)(w, s)).count("scatter-add")
    assert (adds(plain), adds(first)) == (2, 0)
    close(fn(w, first), fn(w, plain))


def test_padding_within_an_element_is_not_trained_in_rounds():
    """Two sets of classes, with their padding as large as the axis: not a partition of it."""
    w = {"own": jnp.arange(1.0, 7.0)}
    plain = psjax.select({"own": P("class")}, {"class": [[0, 1, 2], [3]]}, like=w)
    loss = lambda w, batch: jnp.sum(w["own"]) ** 2 / 2
    update = psjax.local_update(loss, optax.sgd(0.01))
    batches = {"x": jnp.zeros((2, 3, 1))}
    together = structure.in_rounds(plain, w)
    assert together.disjoint == ()
    first = jax.tree.map(lambda x: x[0], together)
    opt_state = optax.sgd(0.01).init(w)
    close(update(w, opt_state, first, batches)[0], update(w, opt_state, plain, batches)[0])


def test_rounds_of_unequal_size_are_padded_with_elements_that_are_not_valid():
    like = like_of(6)
    selection = pairs_of(np.array([[0, 1], [0, 2], [3, 4]]), 6, like).drop(TRUNK)
    together = structure.in_rounds(selection, like)
    assert together.valid.tolist() == [[True, True], [True, False]]
    fn = psjax.value_and_grad(element, P("label"), chunk_size=2)
    parts = [jax.tree.map(lambda x, r=r: x[r], together) for r in range(2)]
    run = jax.jit(fn)
    got = [run(model.init(6), part, batch_by_label(6)) for part in parts]
    close(jax.tree.map(jnp.add, *got), run(model.init(6), selection, batch_by_label(6)))


def test_a_divided_selection_is_not_dropped_or_counted():
    split = pairs_of(UNORDERED).drop(TRUNK).split(2)
    with pytest.raises(ValueError, match="drop first and split then"):
        split.drop(TRUNK)
    for fn in (structure.overlap, structure.num_weights, structure.disjoint_rounds):
        with pytest.raises(ValueError, match=r"leaves of shape \(2, 5\)"):
            fn(split, LIKE)


def test_rounds_of_one_class_are_refused():
    with pytest.raises(ValueError, match=r"rounds\(1\): one class has no pairs"):
        structure.rounds(1)


def test_rounds_of_nothing_are_refused():
    selection = jax.tree.map(lambda x: x[2], pairs_of(UNORDERED[:2]).split(3))
    with pytest.raises(ValueError, match="no element of the selection is valid"):
        structure.in_rounds(selection, LIKE)
