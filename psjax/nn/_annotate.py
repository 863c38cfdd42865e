"""Names of the axes of a parameter."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


def annotated(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """An initializer whose array carries the names of its axes.

    The names are logical. With `nn.with_partitioning`, Flax would take them for axes of the mesh,
    and raise under `jax.set_mesh` if the mesh does not have them.
    """
    return nn.with_logical_partitioning(init, names)
