"""Several arrays packed into one per dtype, so that one collective sends them."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from psjax._types import Struct


def by_dtype(leaves: Sequence[Struct]):
    """Positions of the leaves, grouped by dtype."""
    groups = {}
    for i, x in enumerate(leaves):
        groups.setdefault(x.dtype, []).append(i)
    return list(groups.values())


def pack(leaves: Sequence[Array]):
    """Leaves `[rows, ...]` side by side, `[rows, p]`, in one array per dtype."""
    return [
        jnp.concatenate([leaves[i].reshape(leaves[i].shape[0], -1) for i in group], axis=1)
        for group in by_dtype(leaves)
    ]


def unpack(packed: Sequence[Array], like: Sequence[Struct]):
    out: list[Any] = [None] * len(like)
    for group, x in zip(by_dtype(like), packed):
        sizes = [int(np.prod(like[i].shape[1:])) for i in group]
        for i, part in zip(group, jnp.split(x, np.cumsum(sizes)[:-1], axis=1)):
            out[i] = part.reshape(like[i].shape)
    return out
