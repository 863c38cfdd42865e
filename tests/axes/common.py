"""What the models of the registry share: random parameters and inputs, Flax modules as functions.

Parameters are drawn with NumPy in the shapes that `jax.eval_shape` tells: the same numbers under
every version of JAX, and nothing is compiled.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Made = tuple[Callable[..., Any], Any, tuple[Any, ...]]  # apply, params, inputs

BATCH, TOKENS, VOCABULARY, CLASSES = 3, 6, 17, 5


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    """A leaf that `fill` replaces by an array."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def fill(shapes: Any, seed: int = 0, gain: float = 1.0) -> Any:
    """Random arrays in the place of shapes: kernels by their fan-in, scales near 1, no 0, no 1."""
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(functools.partial(_leaf, rng, gain), shapes)


def _leaf(rng, gain, path, leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.zeros(leaf.shape, leaf.dtype)
    names = {getattr(key, "key", getattr(key, "name", None)) for key in path}
    if "var" in names:
        value = rng.uniform(0.5, 1.5, leaf.shape)
    elif len(leaf.shape) > 1:
        value = rng.normal(size=leaf.shape) * gain * math.sqrt(2 / math.prod(leaf.shape[:-1]))
    else:
        near_one = names & {"scale", "weight", "gamma"}
        value = rng.normal(size=leaf.shape) * 0.2 + bool(near_one)
    return jnp.asarray(value, leaf.dtype)


def normal(*sizes: int, seed: int = 1) -> jax.Array:
    """A random input."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=sizes), jnp.float32)


def integers(limit: int, *sizes: int, seed: int = 1) -> jax.Array:
    """Random integers in [0, limit)."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, limit, sizes), jnp.int32)


def images(side: int = 8, channels: int = 2) -> jax.Array:
    """`[batch, side, side, channels]`."""
    return normal(BATCH, side, side, channels)


def tokens() -> jax.Array:
    """`[batch, tokens]`, below `VOCABULARY`."""
    return integers(VOCABULARY, BATCH, TOKENS)


def linen(
    model: nn.Module,
    *inputs: Any,
    mutable: Any = False,
    rngs: Any = None,
    gain: float = 1.0,
    **flags: Any,
) -> Made:
    """A Flax module; its parameters are all variables if it has more collections than `params`.

    Args:
      model: the module.
      *inputs: of `model(*inputs, **flags)`.
      mutable: collections that `apply` returns next to the output.
      rngs: fixed keys of `apply`, for dropout.
      gain: factor of the kernels; without one, little passes through many sigmoids.
      **flags: what is no array, such as `train`.
    """
    keys = {"params": jax.random.key(0), **(rngs or {})}
    variables = jax.eval_shape(functools.partial(model.init, **flags), keys, *inputs)
    params = fill(nn.unbox(variables), gain=gain)
    call = functools.partial(model.apply, mutable=mutable, rngs=rngs, **flags)
    if set(params) == {"params"}:
        return lambda p, *x: call({"params": p}, *x), params["params"], inputs
    return call, params, inputs
