"""Independent subnets' index sets: every row to one element, at random."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psjax._notation import names
from psjax._select import flat_specs
from psjax._selection import Selection


def random_partition(
    key: jax.Array,
    axes: Any,
    sizes: Mapping[str, int],
    *,
    num_elements: int,
    stratified: bool = False,
) -> Selection:
    r"""Divide the rows of every named axis at random among the elements, each row to one.

    The membership indicators of section 3.1 of B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed
    Learning of Neural Networks using Independent Subnet Training*, arXiv:1910.02120, as index sets:
    $\sum_s m^l_{s,i} = 1$, $P[m^l_{s,i} = 1] = 1/n$, independent between axes.

    Where `num_elements` does not divide a size the shares differ by one row; the short ones, padded
    past the end, fall on random elements, independently for each axis, which keeps $1/n$ exact.

    Args:
      key: a PRNG key; may be traced, so that one compiled step serves every round.
      axes: tree of `PartitionSpec`s as in `select`.
      sizes: `{axis name: size}` of the axes to divide; other axes stay whole.
      num_elements: n.
      stratified: first cut every axis into n equal blocks, the shards of n owners, and divide each
        block among the elements; $n^2$ must divide the sizes. The marginals are the same; between
        owner and element the same number of rows passes whatever the key, so an exchange is one
        `all_to_all`.

    Returns:
      A `Selection` with `indices[name]` int32 `[n, ceil(size / n)]`, sorted within an element.

    Raises:
      ValueError: an axis that no parameter has, more elements than rows, blocks of unequal size.
    """
    specs, paths = flat_specs("random_partition", axes)
    known = {name for spec in specs for name in names(spec)}
    if num_elements < 1 or not sizes:
        msg = (
            f"random_partition(sizes={dict(sizes)}, num_elements={num_elements}): write one axis "
            "name with its size or more, and 1 element or more."
        )
        raise ValueError(msg)
    indices = {}
    for name, axis_key in zip(sorted(sizes), jax.random.split(key, len(sizes))):
        size = sizes[name]
        if name not in known:
            msg = (
                f"random_partition(sizes=...): no parameter has an axis {name!r}; the named ones "
                f"are {sorted(known)}. Annotate the parameters (flax.linen.with_partitioning)."
            )
            raise ValueError(msg)
        if num_elements > size:
            msg = (
                f"random_partition(num_elements={num_elements}): num_elements={num_elements} "
                f"exceeds size {size} of axis {name!r}; every element needs a row."
            )
            raise ValueError(msg)
        if not stratified:
            indices[name] = _shares(axis_key, size, num_elements)
            continue
        block, rest = divmod(size, num_elements)
        if rest or block % num_elements:
            msg = (
                f"random_partition(num_elements={num_elements}, stratified=True): axis {name!r} "
                f"has size {size}, which {num_elements} * {num_elements} must divide: "
                f"{num_elements} blocks, each of {num_elements} equal groups. Write another size, "
                "or stratified=False."
            )
            raise ValueError(msg)
        keys = jax.random.split(axis_key, num_elements)
        share = functools.partial(_shares, size=block, n=num_elements)
        within = jax.vmap(share)(keys)  # [owner, element, m]
        offset = block * jnp.arange(num_elements, dtype=jnp.int32)[:, None, None]
        indices[name] = jnp.moveaxis(within + offset, 0, 1).reshape(num_elements, -1)
    found = tuple(sorted(sizes.items()))
    valid = np.ones(num_elements, bool)
    blocks = num_elements if stratified else 1
    divided = tuple(sorted(sizes))
    return Selection(indices, valid, specs, paths, found, divided, blocks, distinct=divided)


def _shares(key, size, n):
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
