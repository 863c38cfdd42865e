"""The step of a trust region by conjugate gradients.

T. Steihaug, *The conjugate gradient method and trust regions in large scale optimization*, 1983;
Ph. L. Toint, 1981. Algorithm 7.2 of Nocedal and Wright, *Numerical Optimization*.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree


class _Carry(NamedTuple):
    step: Any
    image: Any  # B times the step
    residual: Any
    direction: Any
    squared: Array  # of the residual's norm
    products: Array
    done: Array


def inner(a: PyTree, b: PyTree) -> Array:
    """Inner product of two trees."""
    products = jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b))
    return functools.reduce(jnp.add, products)


def plus(a: PyTree, factor: ArrayLike, b: PyTree) -> PyTree:
    """`a + factor * b` of two trees."""
    return jax.tree.map(lambda x, y: x + (factor * y).astype(x.dtype), a, b)


def steihaug(
    multiply: Callable[[Any], Any],
    gradient: PyTree,
    radius: ArrayLike,
    tolerance: ArrayLike,
    max_steps: int,
) -> tuple[Any, Any, Array]:
    """Minimise `g's + s'Bs / 2` over `|s| <= radius`, until the residual is small.

    Ends at the boundary where a direction has no positive curvature or leads out of the region.

    Args:
      multiply: `v -> B v`, of trees.
      gradient: the tree g.
      radius: of the region, in the Euclidean norm.
      tolerance: norm of the residual at which to stop.
      max_steps: most products with B.

    Returns:
      The step s, `B s`, and the number of products with B.
    """
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    squared = inner(gradient, gradient)
    minus = jax.tree.map(jnp.negative, gradient)
    first = _Carry(
        zeros, zeros, gradient, minus, squared, jnp.int32(0), jnp.sqrt(squared) <= tolerance
    )

    def body(c: _Carry):
        image = multiply(c.direction)
        curvature = inner(c.direction, image)
        convex = curvature > 0
        alpha = c.squared / jnp.where(convex, curvature, jnp.ones_like(curvature))
        ahead = plus(c.step, alpha, c.direction)
        inside = convex & (jnp.sqrt(inner(ahead, ahead)) < radius)
        alpha = jnp.where(inside, alpha, _to_boundary(c.step, c.direction, radius))
        residual = plus(c.residual, alpha, image)
        squared = inner(residual, residual)
        direction = plus(jax.tree.map(jnp.negative, residual), squared / c.squared, c.direction)
        done = ~inside | (jnp.sqrt(squared) <= tolerance)
        return _Carry(
            plus(c.step, alpha, c.direction),
            plus(c.image, alpha, image),
            residual,
            direction,
            squared,
            c.products + 1,
            done,
        )

    last = jax.lax.while_loop(lambda c: ~c.done & (c.products < max_steps), body, first)
    return last.step, last.image, last.products


def _to_boundary(step: PyTree, direction: PyTree, radius: ArrayLike):
    """The positive t with `|step + t * direction| = radius`."""
    a, b, c = inner(direction, direction), inner(step, direction), inner(step, step)
    rest = jnp.maximum(radius**2 - c, 0)
    root = jnp.sqrt(b * b + a * rest)
    # Of the two forms of the root, the one without cancellation.
    return jnp.where(b > 0, rest / (b + root), (root - b) / a)
