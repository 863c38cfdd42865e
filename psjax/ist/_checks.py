"""Whether a subnet computes what the whole network does with its neurons alone."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psjax._masks import kept
from psjax._selection import Selection


def check_subnets(
    fn: Callable[..., Any],
    subnet_fn: Callable[..., Any],
    params: Any,
    selection: Selection,
    *args: Any,
    tolerance: float = 1e-4,
) -> None:
    r"""Raise if a layer reduces over a divided axis, so that a subnet is no part of the network.

    A layer must treat each divided neuron by itself. On the host, once before a training:

    - A subnet must compute what the whole network does with every other entry zero. This finds
      what counts the neurons or sees their zeros: a layer normalisation, a softmax, a mean. It does
      not find what zeros do not change: a norm, a maximum, a mask of the largest, a cumulative sum.
    - So all subnets are put together too, only the entries between them zero, and none may notice
      the others. Where the scores are a sum over the neurons, as of a dense layer, this is
      $f = \sum_s f_s - (n - 1) f_0$, with $f_s$ the scores of subnet s and $f_0$ those of the
      shared leaves alone. Where they are none, such as scores normalised by their batch, it takes
      the leaves without which $f_0$ is left, one by one: without the others' entries in such a
      leaf, though their neurons are there, the scores must be $f_s$.

    Both at these weights and samples: a maximum that changes nothing here is not found. For scores
    that are no sum and that the neurons reach through several leaves, as over a skip connection,
    the second comparison may raise where nothing reduces, and may pass what does. Elements with a
    divided row in common are only checked by the first.

    Args:
      fn: `fn(params, *args)`, scores of the whole network, of any shape; without dropout.
      subnet_fn: the same of a subnet.
      params: of the whole network.
      selection: the subnets.
      *args: such as a batch of inputs, of samples that differ.
      tolerance: largest difference allowed, relative to the largest score.

    Raises:
      ValueError: the scores of a subnet differ, or show nothing.
    """
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
                f"whole network {jnp.shape(large)}; write two functions of the same output."
            )
            raise ValueError(msg)
        largest = float(jnp.max(jnp.abs(large)))
        if not 0 < largest < float("inf"):
            msg = (
                f"check_subnets: the largest score of subnet {e} is {largest}, which shows nothing;"
                " give several samples that differ, and weights that are not all zero."
            )
            raise ValueError(msg)
        error = _distance(small, large, largest)
        if not error <= tolerance:
            what = f"of subnet {e} differ by {error:.2g} from those of the whole network with all"
            raise ValueError(_reduces(f"{what} other entries zero", selection))
        scores.append(np.asarray(large))
    if _shares_no_row(selection):
        of_leaves = lambda leaves: np.asarray(fn(treedef.unflatten(leaves), *args))
        _check_together(of_leaves, leaves, selection, masks, scores, tolerance)


def _rows_of(selection, e, leaves):
    """What element e holds of every leaf: masks that broadcast to them, None for shared leaves."""

    def mask(spec, ndim):
        held = None
        for d, name in enumerate(spec or ()):
            if name in selection.indices:
                rows = np.isin(np.arange(selection.sizes[name]), selection.indices[name][e])
                rows = rows.reshape([-1 if k == d else 1 for k in range(ndim)])
                held = rows if held is None else held & rows
        return held

    return [mask(spec, jnp.ndim(x)) for spec, x in zip(selection.specs, leaves, strict=True)]


def _check_together(fn, leaves, selection, masks, scores, tolerance):
    """The second comparison of `check_subnets`: masks and scores of the valid subnets."""
    any_of = [None if own[0] is None else np.any(own, axis=0) for own in zip(*masks)]
    leaves = list(map(kept, any_of, leaves))
    divided = [i for i, mask in enumerate(any_of) if mask is not None]
    with_leaves = lambda new: fn([new.get(i, x) for i, x in enumerate(leaves)])
    shared, together = with_leaves({i: jnp.zeros_like(leaves[i]) for i in divided}), with_leaves({})
    for x, entries in ((shared, "divided entries"), (together, "entries between subnets")):
        if not np.isfinite(x).all():
            raise ValueError(_reduces(f"are NaN or Inf with all {entries} zero", selection))
    largest = max(float(np.abs(x).max()) for x in (together, shared, *scores))
    total = sum(scores) - (len(scores) - 1) * shared
    error = _distance(together, total, largest)
    if error <= tolerance:
        return
    # Something reduces, or the scores are no sum. Without a leaf that leads to them f_0 is left.
    without = lambda i: with_leaves({i: jnp.zeros_like(leaves[i])})
    ends = [i for i in divided if _distance(without(i), shared, largest) <= tolerance]
    if not ends:
        msg = (
            "check_subnets: the scores are no sum over the subnets. Either a layer reduces over an "
            f"axis that is divided, one of {sorted(selection.indices)}, or the scores are "
            "normalised; which, cannot be told where several leaves lead to them. Write functions "
            "of the scores before they are normalised."
        )
        raise ValueError(msg)
    for e, mask, expected in zip(np.flatnonzero(selection.valid), masks, scores, strict=True):
        without_others = (with_leaves({i: kept(mask[i], leaves[i])}) for i in ends)
        errors = [_distance(x, expected, largest) for x in without_others]
        if not all(error <= tolerance for error in errors):
            what = f"of subnet {e} change by {max(errors):.2g} where the others' neurons are there"
            raise ValueError(_reduces(what, selection))


def _distance(a, b, largest):
    return float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) / largest


def _reduces(what, selection):
    return (
        f"check_subnets: the scores {what}. A layer reduces over an axis that is divided, one of "
        f"{sorted(selection.indices)} (a LayerNorm, a softmax, a norm, a maximum); normalise each "
        "neuron by itself (psjax.nn.SubnetNorm), or leave that axis out of the annotation."
    )


def _shares_no_row(selection):
    """Whether no two elements hold the same row of a divided axis."""
    names = {name for spec in selection.specs for name in spec or ()} & set(selection.indices)
    for name in names:
        rows = np.asarray(selection.indices[name])[np.asarray(selection.valid)]
        held = np.sort(rows[rows < selection.sizes[name]])
        if (held[1:] == held[:-1]).any():
            return False
    return True
