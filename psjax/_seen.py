"""What the elements of a selection see, what they share once; and how its gradient returns.

A part of the elements, `[E]`, with runs of equal rows; or one element, `[]`. The functions take the
`Selection` first, and leaves and specs flat.
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
    """What the elements see of the leaves, what they share once.

    Returns:
      A list: a leaf with no selected axis as it is, `[...]`; a leaf whose selected axes are all
      of `run_axes`, one row per run, `[E / run_length, ...]`; any other, `[E, ...]`. Of one
      element, `[...]`.
    """
    lead = selection.valid.ndim
    heads = _heads(selection) if lead else selection
    own = lambda spec: heads if _in_run(selection, spec) else selection
    return [
        gather_leaf(jnp.asarray(x), spec, own(spec).indices, lead, selection.sizes)
        for x, spec in zip(leaves, selection.specs, strict=True)
    ]


def over(selection: Elements, fn: Callable[..., Any], seen: Sequence[Array]):
    """`fn(*leaves)` of every element, from what `see` returned: `[E, ...]`."""
    if not selection.valid.ndim:
        return fn(*seen)
    E, r = selection.num_elements, selection.run_length
    shared = [not selected(spec, selection.indices) for spec in selection.specs]
    if all(shared):  # replicas of one whole
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
    """Add gradients of what `see` returned to `totals`, where they belong, without masks."""
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
    """The same, in which elements that are not valid see what a valid one sees.

    Their values are masked, but a NaN among them would get past a mask in derivatives. An
    element takes the place of the first valid one of its run, a run without any that of the
    first run that has one.
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
    """The first element of every run, valid where any of its run is."""
    r = selection.run_length
    if r == 1:
        return selection
    indices = {name: selection.indices[name][::r] for name in selection.run_axes}
    valid = jnp.asarray(selection.valid).reshape(-1, r).any(axis=1)
    return dataclasses.replace(
        selection, indices=indices, valid=valid, disjoint=(), run_length=1, run_axes=()
    )


def _in_run(selection: Elements, spec: Spec):
    """Whether the elements of a run see the same rows of such a leaf."""
    own = [name for name in names(spec) if name in selection.indices]
    return bool(own) and set(own) <= set(selection.run_axes)
