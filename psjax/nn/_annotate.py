"""Names of the axes of a parameter."""

from collections.abc import Callable
from typing import Any

from flax import linen as nn


def annotated(init: Callable[..., Any], *names: str | None) -> Callable[..., Any]:
    """An initializer whose array carries the names of its axes."""
    return nn.with_partitioning(init, names)
