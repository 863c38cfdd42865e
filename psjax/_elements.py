"""A loop over the elements of a selection, some at a time, and what they see of the arguments."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._selection import Selection

ELEMENT = "element of the selection"  # the axis of arguments mapped with in_axes=0


def over_chunks(selection: Selection, chunk_size: int | None, body: Callable, init: Any):
    """`jax.lax.scan` of `body(carry, part) -> carry, out` over parts of a selection.

    A part is a selection of some elements, `[chunk]`, or of one, `[]`; `out` comes back `[E, ...]`.
    One part, no scan. Masks stay outside: `Selection.masked` before and after.
    """
    if chunk_size is None:
        chunk_size = 1 if jax.default_backend() == "cpu" else selection.num_elements
    # As few chunks as the size allows, then as even as they can be: less padding. Padding repeats
    # the last element: one of zeros could make NaN, which gets past a mask in second derivatives.
    num = -(-selection.num_elements // chunk_size)
    size = -(-selection.num_elements // num)
    parts = selection.parts(num, size)
    if num > 1 or size == 1:
        parts = dataclasses.replace(
            parts, disjoint=()
        )  # a chunk's gather of all would cost as many
    if size == 1:
        parts = jax.tree.map(lambda x: x[:, 0], parts)
    if num == 1:
        carry, out = body(init, jax.tree.map(lambda x: jnp.asarray(x)[0], parts))
        out = jax.tree.map(lambda y: y[None], out)
    else:
        carry, out = jax.lax.scan(body, init, jax.tree.map(jnp.asarray, parts))
    rows = lambda y: y if size == 1 else y.reshape(-1, *y.shape[2:])
    return carry, jax.tree.map(lambda y: rows(y)[: selection.num_elements], out)


def view(call: str, selection: Selection, in_axes: Any, params: Any, args: tuple) -> Selection:
    """What the elements see of `(params, *args)`."""
    selection.check(call, params)
    E = selection.num_elements
    indices = {**selection.indices, ELEMENT: np.arange(E, dtype=np.int32)}
    sizes = tuple(sorted({**selection.sizes, ELEMENT: E}.items()))
    seen = dataclasses.replace(selection, indices=indices, axis_sizes=sizes)
    specs = list(selection.specs)
    for i, (axes, arg) in enumerate(zip(each_in_axes(call, in_axes, args), args)):
        spec = P() if axes is None else P(ELEMENT) if axes == 0 else axes
        _check_argument(call, seen, i, spec, arg)
        specs += [spec] * len(jax.tree.leaves(arg))
    unused = sorted(set(selection.indices) - {name for spec in specs for name in spec or ()})
    if unused:
        msg = (
            f"{call}: the selection has indices of {unused}, which neither a parameter nor "
            f"in_axes={in_axes} names; every element would see the whole."
        )
        raise ValueError(msg)
    more = len(specs) - len(selection.specs)
    return seen.of(specs, (params, *args), (*(selection.keep or ()), *[None] * more))


def each_in_axes(call, in_axes, args):
    """`in_axes` as a tuple, one of None, 0 or a `PartitionSpec` for each argument."""
    if not isinstance(in_axes, tuple) or isinstance(in_axes, P):
        in_axes = (in_axes,) * len(args)
    if len(in_axes) != len(args):
        msg = f"{call}: in_axes has {len(in_axes)} entries for {len(args)} arguments."
        raise ValueError(msg)
    for i, axes in enumerate(in_axes):
        if not (axes is None or isinstance(axes, P) or (type(axes) is int and axes == 0)):
            msg = (
                f"{call}: in_axes[{i}] is {axes!r}; write None, 0 or a PartitionSpec of axis names "
                "of the selection."
            )
            raise ValueError(msg)
    return in_axes


def _check_argument(call, seen, i, spec, arg):
    for path, x in jax.tree_util.tree_leaves_with_path(arg):
        for d, name in enumerate(spec):
            if name is None:
                continue
            if name not in seen.indices:
                msg = f"{call}: in_axes names {name!r}, of which the selection has no index."
                raise ValueError(msg)
            if d >= jnp.ndim(x) or jnp.shape(x)[d] != seen.sizes[name]:
                msg = (
                    f"{call}: argument {i}{keystr(path)} has shape {jnp.shape(x)}; dimension {d} "
                    f"must be {name!r}, of size {seen.sizes[name]}."
                )
                raise ValueError(msg)


def check_chunk_size(call, chunk_size):
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        msg = f"{call}(chunk_size={chunk_size}): write a positive integer, or None."
        raise ValueError(msg)


def vary(tree, over):
    """Make every leaf vary over the mapped axes that any leaf of `over` varies over.

    Under `shard_map(check_vma=True)` the derivative with respect to a replicated value is summed
    over devices by JAX; the contract is this device's sum. Shared leaves must therefore vary before
    they are differentiated, and a loop's carry from its start. A `where` with a varying mask does
    it, and XLA removes it.
    """
    mask = jnp.asarray(True)
    for x in jax.tree.leaves(over):
        if jnp.size(x):
            x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            mask = mask | jnp.ravel(x)[0].astype(bool)
    return jax.tree.map(lambda x: jnp.where(mask, x, x), tree)
