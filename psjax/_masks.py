"""Masks of the weights that a selection drops, one per leaf or None; and random masks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import PRNGKeyArray, PyTree

from psjax._types import Mask, Struct


def dropout_mask(
    key: jax.Array, like: Any, rate: float = 0.0, layers: Mapping[str, float] | None = None
) -> Any:
    r"""Draw which weights and which whole layers are kept: a mask for `Selection.drop`.

    Single weights are dropped independently (L. Wan et al., *Regularization of Neural Networks
    using DropConnect*, 2013). To drop whole neurons, make a mask `[rows, 1]` yourself. A dropped
    layer changes the structure of the loss: without the layers that all scores share, elements of
    different classes do not overlap (`psjax.structure.disjoint_rounds`). See section 6.1 of
    P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural
    network training*, G-2023-36.

    **Nothing is rescaled.** For inverted dropout, which keeps the expectation of a weight, divide
    by $1 - r$ inside the element function, and predict with the whole weights::

        def element_fn(w, batch):
            w = jax.tree.map(lambda x: x / (1 - rate), w)

    Args:
      key: a PRNG key; may be traced, so that one compiled step serves every draw. Devices that
        share the parameters must share it.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
      rate: $r$ in `[0, 1]`, the probability that a weight is dropped, independently of all others.
      layers: `{path: probability}` that a whole layer is dropped, with one draw for all its leaves.
        A path is written `"Conv_0"` or `"block/Conv_0/kernel"`. Single weights of a layer that is
        kept are dropped at `rate`.

    Returns:
      A tree like the parameters, where True means kept. A leaf is None if nothing can be dropped,
      `bool[]` if the whole leaf is dropped or kept, and `bool[...]` of the leaf's shape otherwise.
      The form depends on the arguments only, not on the draw.

    Raises:
      ValueError: a probability is outside `[0, 1]`, or no parameter has the path.

    Example:
      >>> import jax, jax.numpy as jnp, psjax
      >>> w = {"Conv_0": jnp.ones((2, 2)), "Dense_0": jnp.ones(3)}
      >>> psjax.dropout_mask(jax.random.key(0), w, layers={"Conv_0": 1.0})
      {'Conv_0': Array(False, dtype=bool), 'Dense_0': None}
    """
    layers = dict(layers or {})
    for name, p in {"rate": rate, **{f"layers[{path!r}]": p for path, p in layers.items()}}.items():
        if not 0 <= p <= 1:
            msg = f"dropout_mask: {name} is {p}; pass a probability from 0 to 1."
            raise ValueError(msg)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
    paths = ["/".join(_key_name(k) for k in path) for path, _ in leaves]
    under = {layer: {p for p in paths if f"{p}/".startswith(f"{layer}/")} for layer in layers}
    for layer, found in under.items():
        if not found:
            tops = sorted({p.split("/")[0] for p in paths})
            msg = (
                f"dropout_mask(layers=...): no parameter has the path {layer!r}; those at the top "
                f"are {tops}, and deeper ones are written 'block/Conv_0'."
            )
            raise ValueError(msg)
    layers_key, *keys = jax.random.split(key, 1 + len(leaves))
    draws = jax.random.split(layers_key, max(1, len(layers)))
    kept = {
        layer: jax.random.bernoulli(draw, np.float32(1 - p))
        for draw, (layer, p) in zip(draws, sorted(layers.items()))
    }

    def mask(path: str, x: Struct, key: PRNGKeyArray):
        whole = [kept[layer] for layer in kept if path in under[layer]]
        if rate:
            whole.append(jax.random.bernoulli(key, np.float32(1 - rate), x.shape))
        out = None
        for m in whole:
            out = m if out is None else out & m
        return out

    masks = [mask(path, x, k) for path, (_, x), k in zip(paths, leaves, keys, strict=True)]
    return treedef.unflatten(masks)


def _key_name(entry: Any):
    """The name in a path entry: a dictionary's key, an attribute, a place in a list."""
    return jax.tree_util.keystr((entry,), simple=True)


def kept(keep: Mask | bool, x: ArrayLike, other: Any = 0) -> Any:
    """`x` where `keep` is True, `other` where a weight is dropped; `x` itself without a mask."""
    if keep is None:
        return x
    keep, x = jnp.asarray(keep), jnp.asarray(x)
    keep = keep.reshape((1,) * (x.ndim - keep.ndim) + keep.shape)
    return jnp.where(keep, x, jnp.asarray(other, x.dtype))


def masks_of(keep: PyTree, paths: Sequence[str]):
    """The masks as a flat tuple, one per path."""
    found = jax.tree_util.tree_leaves_with_path(keep, is_leaf=lambda x: x is None)
    by_path = {keystr(path): x for path, x in found}
    wrong = [p for p in by_path if p not in paths and by_path[p] is not None]
    odd = sorted({*wrong, *(p for p in paths if p not in by_path)})
    if odd:
        msg = (
            "Selection.drop(keep): keep is not a tree like the parameters; they differ in "
            f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}. Pass None where nothing is "
            "dropped."
        )
        raise ValueError(msg)
    return tuple(_mask(path, by_path[path]) for path in paths)


def _mask(path: str, x: Any) -> Mask:
    if x is None:
        return None
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if x.dtype != bool:
        msg = (
            f"Selection.drop(keep): {path} is {x.dtype}{list(x.shape)}; pass None, a bool or an "
            "array of bool, True for what is kept."
        )
        raise TypeError(msg)
    return x


def both(path: str, a: Mask, b: Mask):
    """The mask that keeps what two masks of a leaf both keep."""
    if a is None or b is None:
        return b if a is None else a
    if not broadcasts(a.shape, b.shape, either=True):
        msg = (
            f"Selection.drop(keep): {path} has a mask of shape {b.shape}, but one of shape "
            f"{a.shape} already; both must broadcast to the leaf."
        )
        raise ValueError(msg)
    ndim = max(a.ndim, b.ndim)
    align = lambda x: x.reshape((1,) * (ndim - x.ndim) + x.shape)
    return align(a) & align(b)


def broadcasts(shape: Sequence[int], to: Sequence[int], either: bool = False):
    """Whether a shape broadcasts to another; with `either`, whether both do to a third."""
    try:
        wide = np.broadcast_shapes(shape, to)
    except ValueError:
        return False
    return either or wide == tuple(to)
