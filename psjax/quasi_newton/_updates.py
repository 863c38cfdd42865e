"""Approximations of the elements' Hessians from differences of gradients, all elements at once.

SR1 and BFGS as in chapter 6 of J. Nocedal, S. J. Wright, *Numerical Optimization*, 2nd ed., 2006;
their limited-memory forms as in section 7.2 there: R. H. Byrd, J. Nocedal, R. B. Schnabel,
*Representations of quasi-Newton matrices and their use in limited memory methods*, 1994.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Vectors = Float[Array, "E m"]
Product = Callable[[Vectors], Vectors]

_LEAST = 1e-8  # of a denominator, relative to the two vectors in it


class Dense(NamedTuple):
    """A matrix for every element.

    Attributes:
      matrices: `[E, m, m]`, symmetric.
      fresh: `bool[E]`; whether the element has had no update yet.
    """

    matrices: Float[Array, "E m m"]
    fresh: Bool[Array, " E"]


class Limited(NamedTuple):
    """The last k pairs of every element, oldest first; zeros where there are fewer.

    Attributes:
      steps: `[E, k, m]`, the differences s of what the element sees.
      changes: `[E, k, m]`, the differences y of its gradient.
      number: `int32[E]`, how many pairs there are.
      scale: `[E]`; the approximation starts from this multiple of the identity.
    """

    steps: Float[Array, "E k m"]
    changes: Float[Array, "E k m"]
    number: Int[Array, " E"]
    scale: Float[Array, " E"]


def start(vectors: Vectors, memory: int | None) -> Dense | Limited:
    """The identity for every element; `vectors` says how many and how large."""
    zeros = jnp.zeros_like(vectors)  # it varies over the devices that the elements are spread over
    if memory is None:
        eye = jnp.eye(vectors.shape[1], dtype=vectors.dtype)
        return Dense(zeros[:, :, None] + eye, zeros[:, 0] == 0)
    pairs = jnp.repeat(zeros[:, None], memory, axis=1)
    count = jnp.asarray(zeros[:, 0], jnp.int32)
    return Limited(pairs, pairs, count, jnp.ones_like(zeros[:, 0]))


def of_matrices(matrices: Float[Array, "E m m"]) -> Dense:
    """Approximations that are known."""
    return Dense(matrices, jnp.zeros_like(matrices[:, 0, 0], bool))


def dot(a: Array, b: Array) -> Array:
    """Inner products of the last dimension."""
    return jnp.sum(a * b, axis=-1)


def product(rule: str, approximation: Dense | Limited) -> Product:
    r"""$x_e \mapsto B_e x_e$ of all elements."""
    if isinstance(approximation, Dense):
        return lambda x: jnp.sum(approximation.matrices * x[:, None], axis=-1)
    return _limited_sr1(approximation) if rule == "sr1" else _limited_bfgs(approximation)


def updated(rule: str, approximation: Any, s: Vectors, y: Vectors) -> tuple[Any, Bool[Array, " E"]]:
    """After a step s that changed the gradients by y, and which elements were updated.

    An element whose denominator is too small, or that has NaN, keeps what it had.
    """
    scaled, guard = _scaled(approximation, s, y), _sr1_guard if rule == "sr1" else _bfgs_guard
    image = product(rule, scaled)(s)
    good = guard(s, y, image) & jnp.all(jnp.isfinite(y), axis=-1)
    if isinstance(scaled, Limited):
        steps = _appended(approximation.steps, s, good)
        changes = _appended(approximation.changes, y, good)
        number = jnp.minimum(approximation.number + good, steps.shape[1])
        scale = jnp.where(good, scaled.scale, approximation.scale)
        return Limited(steps, changes, number, scale), good
    change = _sr1_change if rule == "sr1" else _bfgs_change
    matrices = scaled.matrices + change(s, y, image)
    keep = lambda new, old: jnp.where(good[:, None, None], new, old)
    matrices = keep(matrices, approximation.matrices)
    return Dense(matrices, approximation.fresh & ~good), good


def _scaled(approximation: Dense | Limited, s: Vectors, y: Vectors):
    """Before an element's first update: the identity times y'y / y's; (6.20) of the book."""
    curvature = dot(y, s)
    positive = curvature > _LEAST * _norms(s, y)
    ratio = dot(y, y) / jnp.where(positive, curvature, jnp.ones_like(curvature))
    if isinstance(approximation, Dense):
        first = approximation.fresh & positive
        scale = jnp.where(first, ratio, jnp.ones_like(ratio))
        return approximation._replace(matrices=scale[:, None, None] * approximation.matrices)
    # Pairs that are forgotten would leave the curvature of the first step for ever.
    full = approximation.number == approximation.steps.shape[1]
    renew = ((approximation.number == 0) | full) & positive
    return approximation._replace(scale=jnp.where(renew, ratio, approximation.scale))


def _norms(a: Vectors, b: Vectors):
    return jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)


def _sr1_guard(s: Vectors, y: Vectors, image: Vectors):
    """(6.26) of the book."""
    r = y - image
    denominator = jnp.abs(dot(r, s))
    # Where r is 0 the approximation is right already, and the change is 0.
    return (denominator >= _LEAST * _norms(r, s)) & (dot(s, s) > 0)


def _bfgs_guard(s: Vectors, y: Vectors, image: Vectors):
    return (dot(y, s) > _LEAST * _norms(y, s)) & (dot(s, image) > 0)


def _over(numerator: Array, denominator: Array):
    """Where the denominator is 0 the element is not updated."""
    return numerator / jnp.where(denominator == 0, jnp.ones_like(denominator), denominator)


def _sr1_change(s: Vectors, y: Vectors, image: Vectors):
    """(6.24) of the book."""
    r = y - image
    return _over(r[:, :, None] * r[:, None, :], dot(r, s)[:, None, None])


def _bfgs_change(s: Vectors, y: Vectors, image: Vectors):
    """(6.19) of the book."""
    new = _over(y[:, :, None] * y[:, None, :], dot(y, s)[:, None, None])
    old = _over(image[:, :, None] * image[:, None, :], dot(s, image)[:, None, None])
    return new - old


def _appended(pairs: Float[Array, "E k m"], x: Vectors, good: Bool[Array, " E"]):
    longer = jnp.concatenate([pairs[:, 1:], x[:, None]], axis=1)
    return jnp.where(good[:, None, None], longer, pairs)


def _grams(approximation: Limited):
    """S'S, S'Y with zeros for the pairs that are not there, and which those are."""
    S, Y = approximation.steps, approximation.changes
    k = S.shape[1]
    empty = jnp.arange(k) < k - approximation.number[:, None]
    gram = lambda a, b: jnp.einsum("eim,ejm->eij", a, b, precision="highest")
    return gram(S, S), gram(S, Y), empty


def _limited_sr1(approximation: Limited) -> Product:
    """(7.31) of the book; pairs that say nothing new are left out by a pseudo-inverse."""
    S, Y, _, scale = approximation
    ss, sy, empty = _grams(approximation)
    lower = jnp.tril(sy, -1)
    diagonal = sy * jnp.eye(S.shape[1], dtype=S.dtype)
    scale_of = scale[:, None, None]
    middle = diagonal + lower + lower.mT - scale_of * ss
    size = jnp.abs(diagonal) + scale_of * ss * jnp.eye(S.shape[1], dtype=S.dtype)
    least = _LEAST * jnp.max(size, axis=(1, 2))
    values, vectors = jnp.linalg.eigh(middle)
    real = jnp.abs(values) > least[:, None]
    inverse = jnp.where(real, 1 / jnp.where(real, values, jnp.ones_like(values)), 0)
    psi = Y - scale_of * S
    psi = jnp.where(empty[:, :, None], jnp.zeros_like(psi), psi)
    rotated = jnp.einsum("eij,eim->ejm", vectors, psi, precision="highest")

    def multiply(x: Vectors):
        inner = inverse * jnp.sum(rotated * x[:, None], axis=-1)
        return scale[:, None] * x + jnp.sum(rotated * inner[:, :, None], axis=1)

    return multiply


def _limited_bfgs(approximation: Limited) -> Product:
    """(7.24) of the book."""
    S, Y, _, scale = approximation
    ss, sy, empty = _grams(approximation)
    eye = jnp.eye(S.shape[1], dtype=S.dtype)
    lower = jnp.tril(sy, -1)
    diagonal = jnp.where(empty[:, :, None], eye, sy * eye)
    scale_of = scale[:, None, None]
    corner = jnp.where(empty[:, :, None] & (eye > 0), eye, scale_of * ss)
    middle = jnp.concatenate(
        [
            jnp.concatenate([corner, lower], axis=2),
            jnp.concatenate([lower.mT, -diagonal], axis=2),
        ],
        axis=1,
    )
    sides = jnp.concatenate([scale_of * S, Y], axis=1)
    inverse = jnp.linalg.inv(middle)

    def multiply(x: Vectors):
        inner = jnp.sum(sides * x[:, None], axis=-1)
        inner = jnp.sum(inverse * inner[:, None], axis=-1)
        return scale[:, None] * x - jnp.sum(sides * inner[:, :, None], axis=1)

    return multiply
