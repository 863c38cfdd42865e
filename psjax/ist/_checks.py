"""`check_subnets`: a subnet must compute what the whole network does with its neurons alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from psjax._masks import kept
from psjax._notation import names
from psjax._select import axis_sizes
from psjax._selection import Selection
from psjax._types import Mask, Params, Spec
from psjax.axes import coupled_axes


def check_subnets(
    fn: Callable[..., Any],
    subnet_fn: Callable[..., Any],
    params: Any,
    selection: Selection,
    *args: Any,
    tolerance: float = 1e-4,
) -> str | None:
    r"""Raise if a layer reduces over a divided axis, so that a subnet is not part of the network.

    A layer must treat each divided neuron by itself. Call this once before training, on the host.
    It makes three comparisons, at the given parameters and at two random ones near them:

    - A subnet must compute what the whole network computes with every other entry zero. This finds
      layers that count the neurons or see their zeros: a layer normalisation, a softmax, a mean. It
      does not find what zeros do not change: a norm, a maximum, a gate, a cumulative sum.
    - All subnets are put together, with only the entries between them zero, and none may notice the
      others. Where the scores are a sum over the neurons, as those of a dense layer are, this means
      $f = \sum_s f_s - (n - 1) f_0$, with $f_s$ the scores of subnet s and $f_0$ those of the
      shared leaves alone.
    - Where the scores are not such a sum, for instance because they are normalised, the program of
      `fn` is read, as by `psjax.infer_axes`: a sum over the neurons of an axis must not meet them
      again, and no extreme value may be taken over them.

    If two elements hold the same divided row, only the first comparison is made.

    Args:
      fn: `fn(params, *args)` returns the scores of the whole network, of any shape, without
        dropout. JAX must be able to trace it.
      subnet_fn: the same function of a subnet.
      params: parameters of the whole network.
      selection: the subnets.
      *args: further arguments, such as a batch of inputs. The samples must differ.
      tolerance: largest difference allowed, relative to the largest score.

    Returns:
      None; or, if the comparisons cannot decide, a line that names the axis and the step of the
      program that is the reason.

    Raises:
      ValueError: the scores of a subnet differ, or all scores are zero or not finite.
    """
    for draw in range(3):
        drawn = _near(params, draw) if draw else params
        if draw and not np.isfinite(np.asarray(fn(drawn, *args))).all():
            continue
        untold = _check_at(fn, subnet_fn, drawn, selection, args, tolerance)
        if untold is not None:
            return untold
    return None


def _near(params: Params, seed: int):
    """Every weight times a positive random number, zeros a little above zero."""
    rng = np.random.default_rng(seed)

    def leaf(x: Array):
        x = jnp.asarray(x)
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            return x
        factor, small = np.exp(rng.normal(size=x.shape) / 2), np.abs(rng.normal(size=x.shape)) / 10
        return jnp.where(x == 0, jnp.asarray(small, x.dtype), x * jnp.asarray(factor, x.dtype))

    return jax.tree.map(leaf, params)


def _check_at(
    fn: Callable[..., Any],
    subnet_fn: Callable[..., Any],
    params: Params,
    selection: Selection,
    args: tuple[Any, ...],
    tolerance: float,
):
    """The comparisons of `check_subnets` at some parameters."""
    seen = selection.gather(params)
    leaves, treedef = jax.tree.flatten(selection.masked(params))
    masks = [_rows_of(selection, e, leaves) for e in np.flatnonzero(selection.valid)]
    scores = []
    for e, mask in zip(np.flatnonzero(selection.valid), masks, strict=True):
        alone = treedef.unflatten(map(kept, mask, leaves))
        small = subnet_fn(jax.tree.map(lambda x, e=e: x[e], seen), *args)
        large = fn(alone, *args)
        if jnp.shape(small) != jnp.shape(large):
            msg = (
                f"check_subnets: a subnet's scores have shape {jnp.shape(small)}, those of the "
                f"whole network {jnp.shape(large)}; pass two functions of the same output."
            )
            raise ValueError(msg)
        largest = float(jnp.max(jnp.abs(large)))
        if not 0 < largest < float("inf"):
            msg = (
                f"check_subnets: the largest score of subnet {e} is {largest}, which shows nothing;"
                " pass several samples that differ, and weights that are not all zero."
            )
            raise ValueError(msg)
        error = _distance(small, large, largest)
        if not error <= tolerance:
            what = f"of subnet {e} differ by {error:.2g} from those of the whole network with all"
            raise ValueError(_reduces(f"{what} other entries zero", selection))
        scores.append(np.asarray(large))
    if _shares_no_row(selection):
        of_leaves = lambda leaves: fn(treedef.unflatten(leaves), *args)
        return _check_together(of_leaves, leaves, selection, masks, scores, tolerance)
    return None


def _rows_of(selection: Selection, e: int | np.integer, leaves: Sequence[Any]):
    """Masks of the entries that element e has, one per leaf; None for shared leaves."""

    def mask(spec: Spec, ndim: int):
        held = None
        for d, name in enumerate(spec or ()):
            if name in selection.indices:
                rows = np.isin(np.arange(selection.sizes[name]), selection.indices[name][e])
                rows = rows.reshape([-1 if k == d else 1 for k in range(ndim)])
                held = rows if held is None else held & rows
        return held

    return [mask(spec, jnp.ndim(x)) for spec, x in zip(selection.specs, leaves, strict=True)]


def _check_together(
    fn: Callable[..., Any],
    leaves: Sequence[Any],
    selection: Selection,
    masks: Sequence[Sequence[Mask]],
    scores: Sequence[np.ndarray],
    tolerance: float,
):
    """The second and third comparison of `check_subnets`: masks and scores of the valid subnets."""
    any_of = [None if own[0] is None else np.any(own, axis=0) for own in zip(*masks)]
    leaves = list(map(kept, any_of, leaves))
    shared = fn([x if mask is None else jnp.zeros_like(x) for mask, x in zip(any_of, leaves)])
    together = fn(leaves)
    for x, entries in ((shared, "divided entries"), (together, "entries between subnets")):
        if not np.isfinite(x).all():
            raise ValueError(_reduces(f"are NaN or Inf with all {entries} zero", selection))
    largest = max(float(np.abs(x).max()) for x in (together, shared, *scores))
    total = sum(scores) - (len(scores) - 1) * shared
    if _distance(together, total, largest) <= tolerance:
        return None
    return _coupled(fn, leaves, selection)


def _coupled(fn: Callable[..., Any], leaves: Sequence[Any], selection: Selection):
    """Raise if the program couples the rows of a divided axis; return a line if it cannot tell."""
    divided = {n for spec in selection.specs for n in names(spec)} & set(selection.indices)
    sizes = axis_sizes("check_subnets", list(selection.specs), leaves, selection.sizes)[2]
    found = coupled_axes(fn, leaves, selection.specs, sizes, sorted(divided))
    for name in sorted(divided):
        told = found[name]
        if told.coupled is not None:
            what = (
                f"are not a sum over the subnets: in the operation {told.coupled.primitive!r}, "
                f"neurons of axis {name!r} meet a value that depends on another subnet's "
                f"({told.coupled})"
            )
            raise ValueError(_reduces(what, selection))
    for name in sorted(divided):
        if found[name].fixed is not None:
            return f"axis {name!r}: the program does not tell; {found[name].fixed}"
    return None


def _distance(a: ArrayLike, b: ArrayLike, largest: float):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) / largest


def _reduces(what: str, selection: Selection):
    return (
        f"check_subnets: the scores {what}. A layer reduces over an axis that is divided, one of "
        f"{sorted(selection.indices)} (a LayerNorm, a softmax, a norm, a maximum); normalise each "
        "neuron by itself (psjax.nn.SubnetNorm), or leave that axis out of the annotation."
    )


def _shares_no_row(selection: Selection):
    """Whether no two elements hold the same row of a divided axis."""
    names = {name for spec in selection.specs for name in spec or ()} & set(selection.indices)
    for name in names:
        rows = np.asarray(selection.indices[name])[np.asarray(selection.valid)]
        held = np.sort(rows[rows < selection.sizes[name]])
        if (held[1:] == held[:-1]).any():
            return False
    return True
