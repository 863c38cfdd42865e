"""Masks of the small separable model, and the network with zeros that they must come to."""

import jax
import jax.numpy as jnp
import numpy as np

import psjax
from tests import separable_model as model

C, SLOTS = 5, 3
AXES = model.AXES
TRUNK = {"trunk": False, "shift": False, "wide": None, "deep": None, "bias": None}
random = np.random.default_rng(0)
LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float64"), model.init(C))
KEEP = {
    "nothing": dict.fromkeys(LIKE),
    "the trunk": TRUNK,
    "weights": {name: random.random(x.shape) < 0.7 for name, x in LIKE.items()},
    "rows and columns": {
        "trunk": random.random((1, model.TRUNK)) < 0.5,
        "shift": None,
        "wide": np.array([1, 0, 1, 1, 0], bool)[:, None, None],
        "deep": np.array([[True], [False], [True]]),
        "bias": np.True_,
    },
    "weights of a row": TRUNK | {"deep": random.random(C) < 0.5, "wide": random.random(3) < 0.5},
}
ORDERED, UNORDERED = psjax.ordered_pairs(C), psjax.unordered_pairs(C)
BOTH = np.array([[0, 1], [1, 0]])  # h_kj and h_jk together

SELECTIONS = {
    "overlap": {"class": [[0, 1], [1, 2], [4, 2]]},
    "ragged": {"class": [[0, 1, 2], [4], [2, 3]]},
    "row dropped": {"class": [4, 0, 4]},
    "replicas": None,
    "partition": None,
}


def masked(keep, w):
    """The parameters with zeros, by NumPy's broadcasting."""
    return {name: x if keep[name] is None else jnp.where(keep[name], x, 0) for name, x in w.items()}


def full(keep, like=LIKE):
    """A mask of every entry."""
    whole = lambda k, shape: np.broadcast_to(True if k is None else np.asarray(k), shape)
    return {name: whole(keep[name], x.shape) for name, x in like.items()}


def incidence(axes, like, indices, keep):
    """Which weights each element holds, bool [E, n], entry by entry: the reference."""
    E = len(next(iter(indices.values())))
    parts = []
    for name, x in like.items():
        holds = np.zeros((E, *x.shape), bool)
        for e in range(E):
            spec = [*axes[name], *[None] * (len(x.shape) - len(axes[name]))]
            rows = [
                np.atleast_1d(indices[a][e]) if a in indices else np.arange(n)
                for a, n in zip(spec, x.shape)
            ]
            if rows:
                holds[(e, *np.ix_(*rows))] = True
            else:
                holds[e] = True
        parts.append((holds & full(keep, like)[name]).reshape(E, -1))
    return np.concatenate(parts, axis=1)


def pairs_of(pairs, num_classes=C, like=LIKE):
    index = {"class": pairs, "label": pairs}
    return psjax.select(AXES, index, like=like, sizes={"label": num_classes})


def batch_by_label(num_classes=C):
    x = np.random.default_rng(3).normal(size=(num_classes, SLOTS, model.INPUTS))
    return {"x": x, "weight": np.full((num_classes, SLOTS), 1 / (num_classes * SLOTS))}


def element(w, batch):
    return model.element(w, batch, BOTH)


def whole(w, num_classes=C):
    labels = np.repeat(np.arange(num_classes), SLOTS)
    return model.whole_loss(w, batch_by_label(num_classes)["x"].reshape(-1, model.INPUTS), labels)


def close(a, b, tolerance=1e-12):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), a, b)


def same_bits(a, b):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), a, b)
