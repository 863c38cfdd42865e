"""Masks of the weights that a selection drops: one for each leaf, or None."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr


def _kept(keep, x, other=0):
    """`x` where `keep` is True, `other` where a weight is dropped; `x` itself without a mask."""
    if keep is None:
        return x
    keep, x = jnp.asarray(keep), jnp.asarray(x)
    keep = keep.reshape((1,) * (x.ndim - keep.ndim) + keep.shape)
    return jnp.where(keep, x, jnp.asarray(other, x.dtype))


def _masks(keep, paths):
    """The leaves of a tree of masks, flat, one for every path."""
    found = jax.tree_util.tree_leaves_with_path(keep, is_leaf=lambda x: x is None)
    by_path = {keystr(path): x for path, x in found}
    wrong = [p for p in by_path if p not in paths and by_path[p] is not None]
    odd = sorted({*wrong, *(p for p in paths if p not in by_path)})
    if odd:
        msg = (
            "Selection.drop(keep): keep is not a tree like the parameters; they differ in "
            f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}. Write None where nothing is "
            "dropped."
        )
        raise ValueError(msg)
    return tuple(_mask(path, by_path[path]) for path in paths)


def _mask(path, x):
    if x is None:
        return None
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if x.dtype != bool:
        msg = (
            f"Selection.drop(keep): {path} is {x.dtype}{list(x.shape)}; write None, a bool or an "
            "array of bool, True for what is kept."
        )
        raise TypeError(msg)
    return x


def _both(path, a, b):
    """What two masks of one leaf keep together."""
    if a is None or b is None:
        return b if a is None else a
    if not _broadcasts(a.shape, b.shape, either=True):
        msg = (
            f"Selection.drop(keep): {path} has a mask of shape {b.shape}, but one of shape "
            f"{a.shape} already; both must broadcast to the leaf."
        )
        raise ValueError(msg)
    ndim = max(a.ndim, b.ndim)
    align = lambda x: x.reshape((1,) * (ndim - x.ndim) + x.shape)
    return align(a) & align(b)


def _broadcasts(shape, to, either=False):
    """Whether an array broadcasts to a shape; with `either`, whether two do to a third."""
    try:
        wide = np.broadcast_shapes(shape, to)
    except ValueError:
        return False
    return either or wide == tuple(to)
