"""What the elements of a selection see, without repeating what they share; and its gradient.

The selection is a part of the elements, `[E]`, with runs of equal rows, or one element, `[]`. The
functions take the `Selection` first, and leaves and specs flat.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array

from psjax._leaf import gather_leaf, selected
from psjax._notation import names
from psjax._runs import on_host
from psjax._types import Spec

Elements: TypeAlias = Any  # a `Selection`, whose module imports this one


def see(selection: Elements, leaves: Sequence[ArrayLike]):
    """What the elements see of the leaves, without repeating shared leaves.

    Returns:
      A list. A leaf with no selected axis is unchanged, `[...]`. A leaf with selected axes only
      from `run_axes` has one row per run, `[E / run_length, ...]`. Any other has `[E, ...]`. For
      one element, all have `[...]`.
    """
    lead = selection.valid.ndim
    heads = _heads(selection) if lead else selection
    own = lambda spec: heads if _in_run(selection, spec) else selection
    return [
        gather_leaf(jnp.asarray(x), spec, own(spec).indices, lead, selection.sizes)
        for x, spec in zip(leaves, selection.specs, strict=True)
    ]


def over(selection: Elements, fn: Callable[..., Any], seen: Sequence[Array]):
    """Apply `fn(*leaves)` to each element, on what `see` returned: `[E, ...]`."""
    if not selection.valid.ndim:
        return fn(*seen)
    E, r = selection.num_elements, selection.run_length
    shared = [not selected(spec, selection.indices) for spec in selection.specs]
    if all(shared):  # all elements see the same
        return jax.tree.map(lambda y: jnp.broadcast_to(y, (E, *y.shape)), fn(*seen))
    if r == 1 or not selection.run_axes:
        return jax.vmap(fn, in_axes=tuple(None if s else 0 for s in shared))(*seen)
    in_run = [_in_run(selection, spec) for spec in selection.specs]
    own = [not (s or i) for s, i in zip(shared, in_run)]
    inner = lambda *seen: jax.vmap(fn, in_axes=tuple(0 if o else None for o in own))(*seen)
    if not any(own):
        inner = lambda *seen: jax.tree.map(lambda y: jnp.broadcast_to(y, (r, *y.shape)), fn(*seen))
    rows = [y.reshape(E // r, r, *y.shape[1:]) if o else y for y, o in zip(seen, own)]
    if r == E:
        return inner(*[y if s else y[0] for y, s in zip(rows, shared)])
    out = jax.vmap(inner, in_axes=tuple(None if s else 0 for s in shared))(*rows)
    return jax.tree.map(lambda y: y.reshape(E, *y.shape[2:]), out)


def give_back(selection: Elements, totals: Sequence[Array], seen: Sequence[Array]):
    """Add gradients of what `see` returned to their places in `totals`; masks are left out."""
    if not selection.valid.ndim:
        return selection.add_to(totals, seen, jnp.asarray(selection.valid))
    heads, out = _heads(selection), []
    holders = selection.holders(jnp.asarray(selection.valid))
    of_runs = heads.holders(jnp.asarray(heads.valid))
    for total, y, spec in zip(totals, seen, selection.specs, strict=True):
        if not selected(spec, selection.indices):
            out.append(total + y.astype(total.dtype))
        else:
            out.append((of_runs if _in_run(selection, spec) else holders).add(total, y, spec))
    return out


def settled(selection: Elements):
    """The same selection, but elements that are not valid see what a valid element sees.

    Their values are masked, but derivatives would carry a NaN among them past the mask. Such an
    element sees what the first valid element of its run sees, or, if its run has none, that of the
    first run with a valid element.
    """
    if on_host(selection.valid) and np.all(selection.valid):
        return selection
    r, q = selection.run_length, selection.num_elements // selection.run_length
    valid = jnp.asarray(selection.valid).reshape(q, r)
    found, first = jnp.any(valid, axis=1), jnp.argmax(valid, axis=1)
    run = jnp.where(found, jnp.arange(q), jnp.argmax(found))
    place = jnp.where(valid, jnp.arange(r)[None], first[:, None])[run]
    rows = (run[:, None] * r + place).reshape(-1)
    indices = {name: jnp.asarray(index)[rows] for name, index in selection.indices.items()}
    return dataclasses.replace(selection, indices=indices)


def _heads(selection: Elements):
    """The first element of every run; valid if any element of the run is."""
    r = selection.run_length
    if r == 1:
        return selection
    indices = {name: selection.indices[name][::r] for name in selection.run_axes}
    valid = jnp.asarray(selection.valid).reshape(-1, r).any(axis=1)
    return dataclasses.replace(
        selection, indices=indices, valid=valid, disjoint=(), run_length=1, run_axes=()
    )


def _in_run(selection: Elements, spec: Spec):
    """Whether the elements of a run see the same rows of a leaf with this spec."""
    own = [name for name in names(spec) if name in selection.indices]
    return bool(own) and set(own) <= set(selection.run_axes)
