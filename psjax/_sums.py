"""Sums and means in 32 bits or more, rounded once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Integer, PyTree

from psjax._types import Params


def wide(dtype: DTypeLike) -> Any:
    """The dtype in which sums are accumulated: 32 bits or more, and int32 for bools."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return jnp.dtype(jnp.int32)
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    if jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 32:
        return jnp.dtype(jnp.int32)
    return dtype


def wide_zeros(like: Params):
    """Zeros in which sums of such leaves are accumulated."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, wide(x.dtype)), like)


def narrowed(total: Params, like: PyTree):
    """Sums cast to the dtypes of `like`; for bools, whether any was True."""
    return jax.tree.map(lambda t, x: t.astype(x.dtype), total, like)


def mean_of(
    sums: Callable[[Params, Params], Params],
    stacked: Params,
    params: Params,
    counts: PyTree[Integer[Array, "..."]],
):
    """The mean over the holders of each entry; an entry without a holder keeps its bits.

    The mean of integers is rounded down; the mean of bools is whether all are True. Integers of 32
    and 64 bits are summed in two halves, so that up to 32767 holders cause no overflow.

    Args:
      sums: `(stacked, like) -> total`, sums over the holders, of dtypes `wide`.
      stacked: the entries of the elements.
      params: the parameters before.
      counts: number of holders of each entry; broadcasts to the leaf.
    """
    params = jax.tree.map(jnp.asarray, params)
    half = lambda x: _half(x.dtype)
    halves = [half(x) for x in jax.tree.leaves(params)]
    low_of = lambda x: x & ((1 << half(x)) - 1) if half(x) else x
    high_of = lambda x: x >> half(x) if half(x) else x
    low = sums(jax.tree.map(low_of, stacked), params)
    high = sums(jax.tree.map(high_of, stacked), params) if any(halves) else low

    def mean(w: Array, low: Array, high: Array, count: Integer[Array, "..."]):
        holders = jnp.maximum(count, 1).astype(low.dtype)
        if bits := half(w):
            new = ((high // holders) << bits) + (((high % holders) << bits) + low) // holders
        else:
            exact = jnp.issubdtype(low.dtype, jnp.integer)
            new = low // holders if exact else low / holders
        return jnp.where(count == 0, w, new.astype(w.dtype))

    return jax.tree.map(mean, params, low, high, counts)


def _half(dtype: np.dtype):
    """Bits per half of integers that are summed in two halves; 0 for other dtypes."""
    return {4: 16, 8: 32}.get(dtype.itemsize, 0) if jnp.issubdtype(dtype, jnp.integer) else 0
