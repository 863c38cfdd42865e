"""How many weights a score and an element depend on, and which scores depend on a weight."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from psjax._like import check_like
from psjax._masks import kept
from psjax._select import axis_sizes, replicas, selection_of
from psjax._types import Axes, Params
from psjax.structure._overlap import num_weights


class WeightCounts(NamedTuple):
    """Numbers of weights.

    Attributes:
      n: number of weights of the network.
      score: number that one score depends on, $n_j$.
      element: number that one element $h_{kj}$ depends on, $n_{kj}$.
      common: number that every score depends on.
    """

    n: int
    score: int
    element: int
    common: int


def count(axes: Any, like: Any, axis: str = "class", keep: Any = None) -> WeightCounts:
    """Count n, $n_j$, $n_{kj}$ and the common weights of an annotated model.

    Args:
      axes: as in `psjax.select`.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them; nothing is computed.
      axis: name of the class axis, which has two classes or more.
      keep: None, or a mask as in `Selection.drop`: count the weights that remain, as in figure 5.
        If classes keep different numbers, `score` and `element` are the largest. A weight that is
        kept counts, even if all weights after it are dropped.

    Raises:
      ValueError: as `psjax.select` and `Selection.drop`; no parameter has the axis, or it has only
        one class.
    """
    size = _check_axis("count", axes, like, axis)
    if size < 2:
        msg = (
            f"count(axis={axis!r}): the axis has size {size}, and an element is a pair of classes; "
            "pass a model of two classes or more."
        )
        raise ValueError(msg)
    drop = lambda s: s if keep is None else s.drop(keep)
    see = lambda rows: num_weights(drop(selection_of("count", axes, {axis: rows}, like)), like)
    num_classes = 2 if keep is None else size
    scores = see(np.arange(num_classes)[:, None])
    a, b = np.argsort(-scores, kind="stable")[:2]
    n, two = int(num_weights(drop(replicas(like, 1)), like)[0]), int(see([[a, b]])[0])
    return WeightCounts(n, int(scores[a]), two, int(scores[a] + scores[b]) - two)


def dependence(axes: Any, params: Any, axis: str = "class", keep: Any = None) -> Any:
    """Find which scores depend on each weight, as drawn in figures 1, 3 and 5 of the paper.

    Args:
      axes: as in `psjax.select`.
      params: the parameters.
      axis: name of the class axis.
      keep: None, or a mask as in `Selection.drop`.

    Returns:
      A tree like `params`, int32: j for a weight that only score j depends on, -1 for a weight that
      every score depends on, -2 for a dropped weight.

    Raises:
      ValueError: as `count`.
    """
    num_classes = _check_axis("dependence", axes, params, axis)
    rows = np.arange(num_classes)[:, None]
    selection = selection_of("dependence", axes, {axis: rows}, params)
    dropped = selection if keep is None else selection.drop(keep)
    check_like("dependence", dropped, params)
    own = jax.tree.map(
        lambda x: jnp.broadcast_to(
            jnp.arange(num_classes).reshape(-1, *[1] * (x.ndim - 1)), x.shape
        ).astype(jnp.int32),
        jax.eval_shape(selection.gather, params),
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.int32), params)
    owner, holders = selection.scatter_add(own, like), selection.counts(like)
    found = jax.tree.map(lambda o, h: jnp.where(h == 1, o, -1), owner, holders)
    leaves, treedef = jax.tree.flatten(found)
    masks = dropped.keep or [None] * len(leaves)
    return treedef.unflatten([kept(k, x, -2) for k, x in zip(masks, leaves)])


def _check_axis(call: str, axes: Axes, like: Params, axis: str):
    sizes = axis_sizes(call, axes, like)[2]
    if axis not in sizes:
        msg = f"{call}(axis={axis!r}): no parameter has this axis; pass one of {sorted(sizes)}."
        raise ValueError(msg)
    return sizes[axis]
