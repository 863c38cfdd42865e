"""How many weights a score and an element loss depend on, and which.

Section 5 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned
neural network training*, G-2023-36: a score sees the common weights and its class's own, an element
of two classes the common weights and two classes' own.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psjax._select import _axis_sizes, select
from psjax._selection import Selection


class WeightCounts(NamedTuple):
    """Numbers of weights.

    Attributes:
      n: of the whole network.
      score: behind one score, $n_j$.
      element: behind one element $h_{kj}$, $n_{kj}$.
      common: behind every score.
    """

    n: int
    score: int
    element: int
    common: int


def num_weights(selection: Selection, like: Any) -> np.ndarray:
    """How many weights each element of a selection sees, `int64[E]`; padding counts for nothing.

    Args:
      selection: the index sets.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
    """
    shapes = jax.eval_shape(selection.gather, like)
    sizes = np.zeros(selection.num_elements, np.int64)
    for spec, x in zip(selection.specs, jax.tree.leaves(shapes)):
        entries = np.full(selection.num_elements, int(np.prod(x.shape[1:])))
        for name in spec or ():
            index = selection.indices.get(name)
            if index is not None and index.ndim == 2:
                real = np.sum(index < selection.sizes[name], axis=1)
                entries = entries // index.shape[1] * real
        sizes += entries
    return np.where(selection.valid, sizes, 0)


def count(axes: Any, like: Any, axis: str = "class") -> WeightCounts:
    """Count n, $n_j$, $n_{kj}$ and the common weights of an annotated model.

    Args:
      axes: as in `psjax.select`.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them; nothing is computed.
      axis: name of the class axis, of two classes at least.

    Raises:
      ValueError: from `psjax.select`, for axes that do not fit; an axis that no parameter has.
    """
    _check_axis("count", axes, like, axis)
    n = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(like))
    one = int(num_weights(select(axes, {axis: [[0]]}, like=like), like)[0])
    two = int(num_weights(select(axes, {axis: [[0, 1]]}, like=like), like)[0])
    return WeightCounts(n, one, two, 2 * one - two)


def dependence(axes: Any, params: Any, axis: str = "class") -> Any:
    """Which scores depend on each weight, as the figures 1 and 3 of the paper draw it.

    Returns:
      A tree like `params`, int32: the class whose score alone sees the weight, or -1 for a weight
      that every score sees.

    Raises:
      ValueError: as `count`.
    """
    _check_axis("dependence", axes, params, axis)
    selection = select(axes, {axis: [[0]]}, like=params)
    num_classes = selection.sizes[axis]
    selection = select(axes, {axis: np.arange(num_classes)[:, None]}, like=params)
    own = jax.tree.map(
        lambda x: jnp.broadcast_to(
            jnp.arange(num_classes).reshape(-1, *[1] * (x.ndim - 1)), x.shape
        ).astype(jnp.int32),
        jax.eval_shape(selection.gather, params),
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), params)
    owner, holders = selection.scatter_add(own, like), selection.counts(like)
    return jax.tree.map(lambda o, h: jnp.where(h == 1, o, -1), owner, holders)


def _check_axis(call, axes, like, axis):
    sizes = _axis_sizes(axes, like)[2]
    if axis not in sizes:
        msg = f"{call}(axis={axis!r}): no parameter has this axis; write one of {sorted(sizes)}."
        raise ValueError(msg)
