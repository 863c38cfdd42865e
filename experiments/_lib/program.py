"""Compiled pieces that trainings share: seeds side by side, weights, optimizers, accuracy."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import psjax

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "momentum": functools.partial(optax.sgd, momentum=0.9),
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adam-entry": lambda rate, **betas: optax.chain(
        psjax.ist.scale_by_adam(**betas), optax.scale_by_learning_rate(rate)
    ),
}


def make_optimizer(name: str, learning_rate, clip: float | None = None, **options: Any):
    """One of `OPTIMIZERS`, after clipping the gradient's global norm.

    Args:
      name: which.
      learning_rate: a number or a schedule.
      clip: the largest norm; None: not clipped.
      **options: of Adam.
    """
    options = options if name.startswith("adam") else {}
    optimizer = OPTIMIZERS[name](learning_rate, **options)
    if clip is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


def over_seeds(fn):
    """Map over the arguments' leading axis: one after the other on the CPU, else by vmap."""
    if jax.default_backend() == "cpu":
        return lambda *args: jax.lax.map(lambda xs: fn(*xs), args)
    return jax.vmap(fn)


def shapes_of(net, *inputs) -> tuple[Any, Any]:
    """Axes of a network's variables, and their shapes and dtypes; nothing is computed."""
    init = lambda *inputs: net.init(jax.random.key(0), *inputs)
    variables = jax.eval_shape(init, *inputs)
    return nn.get_partition_spec(variables), nn.unbox(variables)


def initial_states(start, seeds) -> dict[str, Any]:
    """`start(seed)` of every seed, `[seeds, ...]`, as one program.

    It runs once: on the CPU, most of the compiler's optimizations would take longer than they save.
    The numbers are the same.
    """
    options: Any = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else {}
    seeds = np.asarray(seeds, np.int32)
    lowered = jax.jit(lambda seeds: jax.lax.map(start, seeds)).lower(seeds)
    return lowered.compile(compiler_options=options)(seeds)


def all_finite(state):
    """Whether there is no NaN or Inf in the weights and the optimizer's state of one seed."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


sound = jax.jit(jax.vmap(all_finite))
"""`state -> [seeds]`: `all_finite` of every seed, jitted."""


def share_right(predict, labels, batch_size: int = 1000):
    """The share of samples whose label has the largest score.

    Args:
      predict: `(index) -> scores`, of some samples.
      labels: of all samples.
      batch_size: samples that are evaluated at once.
    """
    n = labels.shape[0]
    size = min(batch_size, n)
    index = jnp.arange(-(-n // size) * size).reshape(-1, size)

    def right(i):
        best = jnp.argmax(predict(i), -1)
        return jnp.sum((best == psjax.data.take(labels, i)) & (i < n))

    return jnp.sum(jax.lax.map(right, index)) / n


def device_mesh(number: int) -> jax.sharding.Mesh:
    """So many devices, the first ones, as the axis `workers`."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((number,), ("workers",), auto, devices=jax.devices()[:number])
