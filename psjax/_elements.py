"""A loop over chunks of elements, and how elements see further arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr
from jaxtyping import PyTree

from psjax._notation import names, size_of
from psjax._select import nearest
from psjax._selection import Selection
from psjax._types import InAxes

ELEMENT = "element of the selection"  # the axis of arguments mapped with in_axes=0


def over_chunks(selection: Selection, chunk_size: Any, body: Callable, init: Any, *operands: Any):
    """`jax.lax.scan` of `body(carry, part, *operands) -> carry, out` over parts of a selection.

    A part is a selection of `chunk_size` elements or fewer, `[chunk]`, or of one element, `[]`. If
    elements come in runs, a part consists of whole runs, or is a piece of one. `out` is returned as
    `[E, ...]`. A single part is evaluated without a scan. Parts have no masks: apply
    `Selection.masked` before and after.

    Args:
      selection: of `[E]`.
      chunk_size: a number of elements; or two, for CPUs and for other platforms: the platform that
        the program is lowered for decides. None: 1 and E.
      body: as in `jax.lax.scan`.
      init: the carry before the first part.
      *operands: passed whole to every part.
    """
    chunk_size = (1, selection.num_elements) if chunk_size is None else chunk_size
    on_cpu, elsewhere = chunk_size if isinstance(chunk_size, tuple) else (chunk_size,) * 2
    run = lambda size: lambda *args: _over_chunks(size, body, *args)
    if on_cpu == elsewhere:
        return run(on_cpu)(selection, init, *operands)
    return jax.lax.platform_dependent(
        selection, init, *operands, cpu=run(on_cpu), default=run(elsewhere)
    )


def _over_chunks(
    chunk_size: int, body: Callable[..., Any], selection: Selection, init: PyTree, *operands: PyTree
):
    step = lambda carry, part: body(carry, part, *operands)
    E, r = selection.num_elements, selection.run_length
    # As few chunks as the size allows, and as even as possible, for less padding. Padding repeats
    # an element: an element of zeros could give NaN, which second derivatives carry past a mask.
    if chunk_size >= r:
        runs, per_chunk = E // r, chunk_size // r
        num = -(-runs // per_chunk)
        size = -(-runs // num) * r
        parts = selection.parts(num, size, r)
        trim = lambda y: y[:E]
    else:
        cuts = -(-r // chunk_size)
        size = -(-r // cuts)
        num = E // r * cuts
        parts = selection.cut_runs(cuts, size)
        of_runs = lambda y: y.reshape(E // r, cuts * size, *y.shape[1:])[:, :r]
        trim = lambda y: of_runs(y).reshape(E, *y.shape[1:])
    if num > 1 or size == 1:  # else every chunk would gather all rows of the leaf
        parts = dataclasses.replace(parts, disjoint=())
    if size == 1:
        parts = dataclasses.replace(parts, run_length=1, run_axes=())
        parts = jax.tree.map(lambda x: x[:, 0], parts)
    if num == 1:
        carry, out = step(init, jax.tree.map(lambda x: jnp.asarray(x)[0], parts))
        out = jax.tree.map(lambda y: y[None], out)
    else:
        carry, out = jax.lax.scan(step, init, jax.tree.map(jnp.asarray, parts))
    rows = lambda y: y if size == 1 else y.reshape(-1, *y.shape[2:])
    return carry, jax.tree.map(lambda y: trim(rows(y)), out)


def view(call: str, selection: Selection, in_axes: Any, params: Any, args: tuple) -> Selection:
    """What the elements see of `(params, *args)`."""
    selection.check(call, params)
    E = selection.num_elements
    specs = list(selection.specs)
    for axes, arg in zip(each_in_axes(call, in_axes, args), args):
        spec = axes if isinstance(axes, P) else P() if axes is None else P(ELEMENT)
        specs += [spec] * len(jax.tree.leaves(arg))
    seen = selection
    if any(ELEMENT in names(spec) for spec in specs):
        indices = {**selection.indices, ELEMENT: jnp.arange(E, dtype=jnp.int32)}
        sizes = tuple(sorted({**selection.sizes, ELEMENT: E}.items()))
        distinct = (*selection.distinct, ELEMENT)
        seen = dataclasses.replace(selection, indices=indices, axis_sizes=sizes, distinct=distinct)
    rest = iter(specs[len(selection.specs) :])
    for i, arg in enumerate(args):
        for path, x in jax.tree_util.tree_leaves_with_path(arg):
            _check_argument(call, seen, next(rest), f"argument {i}{keystr(path)}", jnp.shape(x))
    unused = sorted(set(selection.indices) - {name for spec in specs for name in names(spec)})
    if unused:
        known = [name for spec in selection.specs for name in names(spec)]
        near = nearest(unused[0], known)
        hint = f" (nearest: {near!r})" if near else ""
        msg = (
            f"{call}: the selection has indices of {unused}, which neither a parameter nor "
            f"in_axes={in_axes} names; every element would see all of it. Name it in "
            f"in_axes=P({unused[0]!r}), or, if a dimension of the parameters was meant, name that "
            f"dimension in axes{hint}."
        )
        raise ValueError(msg)
    more = len(specs) - len(selection.specs)
    return seen.of(specs, (params, *args), (*(selection.keep or ()), *[None] * more))


def each_in_axes(call: str, in_axes: InAxes, args: tuple[Any, ...]):
    """`in_axes` as a tuple with one entry per argument: None, 0 or a `PartitionSpec`."""
    if not isinstance(in_axes, tuple) or isinstance(in_axes, P):
        in_axes = (in_axes,) * len(args)
    if len(in_axes) != len(args):
        msg = f"{call}: in_axes has {len(in_axes)} entries for {len(args)} arguments."
        raise ValueError(msg)
    for i, axes in enumerate(in_axes):
        if not (axes is None or isinstance(axes, P) or (type(axes) is int and axes == 0)):
            msg = (
                f"{call}: in_axes[{i}] is {axes!r}; pass None, 0 or a PartitionSpec of axis names "
                "of the selection."
            )
            raise ValueError(msg)
    return in_axes


def _check_argument(call: str, seen: Selection, spec: P, where: str, shape: tuple[int, ...]):
    for name in names(spec):
        if name not in seen.indices:
            msg = f"{call}: in_axes names {name!r}, but the selection has no indices of it."
            raise ValueError(msg)
    for d, entry in enumerate(spec):
        if entry is None:
            continue
        size = size_of(entry, seen.sizes)
        if d >= len(shape) or shape[d] != size:
            msg = (
                f"{call}: {where} has shape {shape}; dimension {d} must be {entry!r}, of size "
                f"{size}."
            )
            raise ValueError(msg)


def check_chunk_size(call: str, chunk_size: int | None):
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        msg = f"{call}(chunk_size={chunk_size}): pass a positive integer, or None."
        raise ValueError(msg)
