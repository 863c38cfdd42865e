"""`random_partition`: index sets of independent subnets, each row given to one element."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from psjax._notation import is_plain, names
from psjax._select import axis_sizes, check_count, check_size, flat_specs, is_function, nearest
from psjax._selection import Selection
from psjax._types import Sizes, Spec


def random_partition(
    key: jax.Array,
    axes: Any,
    sizes: Mapping[str, int],
    *,
    num_elements: int,
    stratified: bool = False,
    like: Any = None,
) -> Selection:
    r"""Divide the rows of every named axis at random among the elements, each row to one.

    These are the membership indicators of section 3.1 of B. Yuan, A. Kyrillidis, C. Jermaine,
    *Distributed Learning of Neural Networks using Independent Subnet Training*, arXiv:1910.02120,
    as index sets: $\sum_s m^l_{s,i} = 1$ and $P[m^l_{s,i} = 1] = 1/n$, independently for each axis.

    If `num_elements` does not divide a size, the shares differ by one row, and short ones are
    padded with an index past the end. Which elements get short shares is random for each axis, so
    that the probability $1/n$ is exact.

    Args:
      key: a PRNG key; may be traced, so that one compiled step serves every round.
      axes: as in `select`. Without `like`, a tree with one `PartitionSpec` per parameter, in
        which a dimension is one axis or None.
      sizes: `{axis name: size}` of the axes to divide; other axes stay whole.
      num_elements: number of elements, n.
      stratified: first cut every axis into n equal blocks, one per owner, and divide each block
        among the elements; $n^2$ must divide the sizes. Each row still falls on each element with
        probability $1/n$, but every owner sends every element equally many rows for any key, so
        that the exchange is one `all_to_all`.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them, as in `select`. It is needed in
        three cases: `axes` is a prefix tree or a function (except what `psjax.infer_axes` returns),
        a dimension is a product or a concatenation of axes of which `sizes` lacks one, or a
        parameter is None.

    Returns:
      A `Selection` with `indices[name]` int32 `[n, ceil(size / n)]`, sorted within an element.

    Raises:
      ValueError: no parameter has the axis, or it has another size; there are more elements than
        rows; with `stratified`, the blocks would be unequal.
    """
    count = ("num_elements", num_elements)
    return partition_of("random_partition", key, axes, sizes, count, stratified, like)


def partition_of(
    call: str,
    key: jax.Array,
    axes: Any,
    sizes: Mapping[str, int],
    count: tuple[str, int],
    stratified: bool,
    like: Any,
) -> Selection:
    """What `random_partition` returns; messages name `call` and the argument in `count`."""
    word, num_elements = count
    check_count(call, word, num_elements)
    if not sizes:
        msg = f"{call}(sizes={{}}): pass the name and size of every axis to divide."
        raise ValueError(msg)
    if like is None and is_function(axes):
        like = getattr(axes, "like", None)  # `psjax.infer_axes` stores it
    if like is None:
        (specs, paths), known = flat_specs(call, axes), {}
    else:
        specs, paths, known = axis_sizes(call, axes, like, sizes)
    _check_sizes(call, count, specs, sizes, known)
    found = _all_sizes(call, specs, paths, sizes, known)
    indices = {}
    for name, axis_key in zip(sorted(sizes), jax.random.split(key, len(sizes))):
        size = sizes[name]
        if not stratified:
            indices[name] = _shares(axis_key, size, num_elements)
            continue
        block, rest = divmod(size, num_elements)
        if rest or block % num_elements:
            msg = (
                f"{call}({word}={num_elements}, stratified=True): axis {name!r} has size {size}, "
                f"which {num_elements} * {num_elements} must divide: {num_elements} blocks, each "
                f"of {num_elements} equal groups. Pass another size, or stratified=False."
            )
            raise ValueError(msg)
        keys = jax.random.split(axis_key, num_elements)
        share = functools.partial(_shares, size=block, n=num_elements)
        within = jax.vmap(share)(keys)  # [owner, element, m]
        offset = block * jnp.arange(num_elements, dtype=jnp.int32)[:, None, None]
        indices[name] = jnp.moveaxis(within + offset, 0, 1).reshape(num_elements, -1)
    valid = np.ones(num_elements, bool)
    blocks = num_elements if stratified else 1
    divided = tuple(sorted(sizes))
    return Selection(
        indices,
        valid,
        specs,
        paths,
        tuple(found.items()),
        divided,
        blocks,
        distinct=divided,
    )


def _check_sizes(
    call: str, count: tuple[str, int], specs: Sequence[Spec], sizes: Sizes, known: Mapping[str, int]
):
    named = {name for spec in specs for name in names(spec)}
    word, num_elements = count
    for name, size in sizes.items():
        check_size(call, name, size, known)
        if name not in named:
            near = nearest(name, named)
            msg = (
                f"{call}(sizes=...): no parameter has an axis {name!r}; "
                + (f"the nearest is {near!r}; " if near else "")
                + f"the named ones are {sorted(named)}. Annotate the parameters "
                "(flax.linen.with_logical_partitioning)."
            )
            raise ValueError(msg)
        if num_elements > size:
            msg = (
                f"{call}({word}={num_elements}): {word}={num_elements} exceeds size {size} of axis "
                f"{name!r}; every element needs a row."
            )
            raise ValueError(msg)


def _all_sizes(
    call: str, specs: Sequence[Spec], paths: Sequence[str], sizes: Sizes, known: Mapping[str, int]
):
    """Sizes of the axes to divide, and of axes in a product or a concatenation with them."""
    found = {**known, **sizes}
    needed = set(sizes)
    for path, spec in zip(paths, specs):
        own = () if is_plain(spec) or not needed & set(names(spec)) else names(spec)
        for name in own:
            if name not in found:
                msg = (
                    f"{call}(axes=...): {path} has axes {spec}, and the size of {name!r} is not "
                    "known; pass the parameters as like=."
                )
                raise ValueError(msg)
        needed = needed.union(own)
    return {name: int(found[name]) for name in sorted(needed)}


def _shares(key: PRNGKeyArray, size: int, n: int):
    """A random partition of `size` rows among n: int32 `[n, ceil(size / n)]`, sorted, padded."""
    rows_key, short_key = jax.random.split(key)
    rows = jax.random.permutation(rows_key, jnp.arange(size, dtype=jnp.int32))
    if size % n == 0:
        return jnp.sort(rows.reshape(n, -1), axis=1)
    ranks = jax.random.permutation(short_key, jnp.arange(n, dtype=jnp.int32))
    lengths = size // n + (ranks < size % n).astype(jnp.int32)
    starts = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    places = jnp.arange(-(-size // n), dtype=jnp.int32)
    filled = places[None] < lengths[:, None]
    share = rows.at[starts[:, None] + places[None]].get(mode="fill", fill_value=size)
    return jnp.sort(jnp.where(filled, share, jnp.full_like(share, size)), axis=1)
