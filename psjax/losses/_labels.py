"""Integer labels of any width, inside a jitted function, where nothing can raise."""

import jax
import jax.numpy as jnp


def int32_labels(labels: jax.Array, last: int) -> jax.Array:
    """The labels as int32; those outside `[0, last]` become -1.

    A narrow type cannot hold every number up to `last`, and `jax.nn.one_hot` in it wraps: class 256
    is 0 in uint8. A wide type holds numbers that a cast to int32 would wrap into the range.
    """
    wide = labels if labels.dtype.itemsize >= 4 else labels.astype(jnp.int32)
    return jnp.where((wide >= 0) & (wide <= last), wide, -1).astype(jnp.int32)
