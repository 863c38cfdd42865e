"""A small network whose scores are an axis of its weights, as plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import psjax

AXES = {
    "trunk": P(),
    "shift": P(),
    "wide": P("class", None, None),
    "deep": P(None, "class"),
    "bias": P("class"),
}
INPUTS, TRUNK, WIDTH = 5, 7, 3


def init(num_classes, dtype=float, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {
        "trunk": (INPUTS, TRUNK),
        "shift": (),
        "wide": (num_classes, TRUNK, WIDTH),
        "deep": (WIDTH, num_classes),
        "bias": (num_classes,),
    }
    return {name: jnp.asarray(rng.normal(size=s) / 2, dtype) for name, s in shapes.items()}


def scores(w, x):
    """`[batch, INPUTS] -> [batch, C]`."""
    hidden = jnp.tanh(x @ w["trunk"] + w["shift"])
    return (
        jnp.einsum("bcd,dc->bc", jnp.tanh(jnp.einsum("bt,ctd->bcd", hidden, w["wide"])), w["deep"])
        + w["bias"]
    )


def element(w, batch, pairs):
    """A block of s classes, the samples of the first l."""
    x = batch["x"]
    c = scores(w, x.reshape(-1, INPUTS)).reshape(*x.shape[:2], -1)
    return psjax.losses.block(c, batch["weight"], pairs)


def make_data(num_classes, size, dtype=float, seed=1):
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(size, INPUTS)), dtype)
    return x, rng.integers(0, num_classes, size).astype(np.int32)


def whole_loss(w, x, labels):
    """The mean loss of a batch on the whole network."""
    return jnp.mean(psjax.losses.psl_with_integer_labels(scores(w, x), jnp.asarray(labels)))


def own_batch(x, rows, step):
    """The leaves of one step's batches, `[workers, T, l, S, ...]`."""
    weight = jnp.asarray(rows.weights[step], x.dtype)
    return {"x": psjax.data.take(x, rows.indices[step]), "weight": weight}


def whole_value_and_grad(w, x, labels):
    return jax.value_and_grad(whole_loss)(w, x, labels)
