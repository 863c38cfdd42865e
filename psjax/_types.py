"""Types that signatures share. Shapes of arrays are in jaxtyping's notation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Integer, PyTree

Params: TypeAlias = PyTree  # of arrays; or of `jax.ShapeDtypeStruct`s, where only shapes count
OptState: TypeAlias = PyTree  # what `optimizer.init` returns
Batch: TypeAlias = PyTree  # of arrays
Axes: TypeAlias = PyTree  # of `PartitionSpec`s, for a leaf or a subtree; or a function of `Params`

Spec: TypeAlias = P | None  # the axes of one leaf
Sizes: TypeAlias = Mapping[str, int]  # of named axes
Indices: TypeAlias = Mapping[str, Any]  # rows of named axes, in any form that `select` takes
InAxes: TypeAlias = P | int | tuple[P | int | None, ...] | None  # how further arguments are mapped
AxisName: TypeAlias = str | tuple[str, ...]  # of `jax.pmap`, `jax.vmap` or `jax.shard_map`

AnyArray: TypeAlias = Array | np.ndarray  # on a device, traced, or on the host
Struct: TypeAlias = AnyArray | jax.ShapeDtypeStruct  # what has a shape and a dtype
# Which weights of a leaf are kept; None: all.
Mask: TypeAlias = Bool[AnyArray, "..."] | np.bool_ | None
Labels: TypeAlias = Sequence[int] | Integer[AnyArray, "..."]  # of samples: numbers of classes
Rows: TypeAlias = Mapping[str, Integer[AnyArray, "..."]]  # of named axes, as a `Selection` has them
ElementFn: TypeAlias = Callable[..., Any]  # a function of what one element sees
