"""Names of the axes of a parameter."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


def annotated(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """An initializer whose array carries the names of its axes.

    The names are logical. Flax takes those of `nn.with_partitioning` for axes of the mesh, and
    raises under `jax.set_mesh` with any other mesh.
    """
    return nn.with_logical_partitioning(init, names)
