"""Sums and means that are exact enough: in 32 bits at least, rounded once."""

from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype) -> Any:
    """The dtype in which sums are accumulated: 32 bits at least; of bools, int32."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.int32)
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 32:
        return jnp.dtype(jnp.int32)
    return dtype


def wide_zeros(like):
    """Where sums of such leaves are accumulated."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), like)


def narrowed(total, like):
    """Sums in the dtypes of `like`, arrays or dtypes; of bools, whether any was True."""
    return jax.tree.map(lambda t, x: t.astype(x.dtype), total, like)


def mean_of(sums, stacked, params, counts):
    """The mean over the holders of each entry; an entry without any keeps its bits.

    A mean of integers is rounded down, and of bools it is whether all are True. Sums of 32-bit
    integers are taken in two halves, so that they do not overflow: up to 32767 holders.

    Args:
      sums: `(stacked, like) -> total`, sums over the holders, of dtypes `wide` or, of 32-bit
        integers, their own.
      stacked: what the elements hold.
      params: the parameters before.
      counts: holders of each entry, broadcasting to it.
    """
    params = jax.tree.map(jnp.asarray, params)
    halves = [_in_halves(x.dtype) for x in jax.tree.leaves(params)]
    low_of = lambda x: x & 0xFFFF if _in_halves(x.dtype) else x
    high_of = lambda x: x >> 16 if _in_halves(x.dtype) else x
    low = sums(jax.tree.map(low_of, stacked), params)
    high = sums(jax.tree.map(high_of, stacked), params) if any(halves) else low

    def mean(w, low, high, count):
        holders = jnp.maximum(count, 1).astype(low.dtype)
        if _in_halves(w.dtype):
            new = ((high // holders) << 16) + (((high % holders) << 16) + low) // holders
        else:
            exact = jnp.issubdtype(low.dtype, jnp.integer)
            new = low // holders if exact else low / holders
        return jnp.where(count == 0, w, new.astype(w.dtype))

    return jax.tree.map(mean, params, low, high, counts)


def _in_halves(dtype):
    return jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits == 32
