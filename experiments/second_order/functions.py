"""Partially-separable test functions of any size, as element functions and index sets.

The definitions are the literature's: Moré, Garbow, Hillstrom 1981 (MGH); Toint 1983; Conn, Gould,
Lescrenier, Toint 1988; Buckley 1989; Li 1990. Variables are counted from 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import psjax


class Kind(NamedTuple):
    """Elements of one kind.

    Attributes:
      fn: `fn(u, data) -> scalar`, of what an element sees.
      rows: `[E, m]`, the variables it sees.
      data: `[E, d]`, its constants.
    """

    fn: Callable
    rows: np.ndarray
    data: np.ndarray


class Problem(NamedTuple):
    """A sum of elements: `constant + sum`.

    Attributes:
      start: the standard start, `[n]`.
      kinds: of its elements.
      constant: added to the sum.
    """

    start: np.ndarray
    kinds: list[Kind]
    constant: float = 0.0

    def selections(self, params):
        """The index sets of all kinds."""
        return [psjax.select(P("i"), {"i": k.rows}, like=params) for k in self.kinds]

    def arguments(self):
        """The constants of all kinds, as the further argument of their functions."""
        return [jnp.asarray(k.data, float) for k in self.kinds]

    def value(self, x):
        """The whole function, of any array library's `x[index]`."""
        total = self.constant
        for k in self.kinds:
            u, d = x[k.rows], jnp.asarray(k.data, x.dtype)
            total = total + jnp.sum(k.fn(jnp.moveaxis(u, -1, 0), jnp.moveaxis(d, -1, 0)))
        return total


def _kind(fn, *columns, data=()):
    rows = np.stack(np.broadcast_arrays(*columns), axis=1)
    empty = np.zeros((len(rows), 0))
    return Kind(fn, rows, np.stack(data, axis=1) if len(data) else empty)


def _chain(n):
    return np.arange(n - 1), np.arange(1, n)


def genrose(n):
    """Generalised Rosenbrock; Nash 1984."""
    fn = lambda u, d: 100 * (u[1] - u[0] ** 2) ** 2 + (u[1] - 1) ** 2
    return Problem(np.arange(1, n + 1) / (n + 1), [_kind(fn, *_chain(n))], 1.0)


# Toint's constants, of the first 50 variables; repeated beyond.
_CHAINED = (
    "1.25 1.40 2.40 1.40 1.75 1.20 2.25 1.20 1.00 1.10 1.50 1.60 1.25 1.25 1.20 1.20 1.40 "
    "0.50 0.50 1.25 1.80 0.75 1.25 1.40 1.60 2.00 1.00 1.60 1.25 2.75 1.25 1.25 1.25 3.00 "
    "1.50 2.00 1.25 1.40 1.80 1.50 2.20 1.40 1.50 1.25 2.00 1.50 1.25 1.40 0.60 1.50 "
)


def chnrosnb(n):
    """Chained Rosenbrock; Toint 1978."""
    a = np.resize(np.array(_CHAINED.split(), float), n)[1:]
    fn = lambda u, d: 16 * d[0] ** 2 * (u[0] - u[1] ** 2) ** 2 + (u[1] - 1) ** 2
    return Problem(np.full(n, -1.0), [_kind(fn, *_chain(n), data=[a])])


def woods(n):
    """Extended Wood; MGH 14."""

    def fn(u, d):
        first = 100 * (u[1] - u[0] ** 2) ** 2 + (1 - u[0]) ** 2
        second = 90 * (u[3] - u[2] ** 2) ** 2 + (1 - u[2]) ** 2
        return first + second + 10 * (u[1] + u[3] - 2) ** 2 + (u[1] - u[3]) ** 2 / 10

    k = 4 * np.arange(n // 4)
    return Problem(np.tile([-3.0, -1.0], n // 2), [_kind(fn, k, k + 1, k + 2, k + 3)])


def arwhead(n):
    """Arrow-head: all elements share the last variable; Conn, Gould, Lescrenier, Toint 1988."""
    fn = lambda u, d: (u[0] ** 2 + u[1] ** 2) ** 2 - 4 * u[0] + 3
    return Problem(np.ones(n), [_kind(fn, np.arange(n - 1), n - 1)])


def bdqrtic(n):
    """Banded quartic; Conn, Gould, Lescrenier, Toint 1988."""

    def fn(u, d):
        squares = u[0] ** 2 + 2 * u[1] ** 2 + 3 * u[2] ** 2 + 4 * u[3] ** 2 + 5 * u[4] ** 2
        return (3 - 4 * u[0]) ** 2 + squares**2

    i = np.arange(n - 4)
    return Problem(np.ones(n), [_kind(fn, i, i + 1, i + 2, i + 3, n - 1)])


def broydn3dls(n):
    """Broyden's tridiagonal equations, least squares; MGH 30."""
    first = lambda u, d: ((3 - 2 * u[0]) * u[0] - 2 * u[1] + 1) ** 2
    inner = lambda u, d: ((3 - 2 * u[1]) * u[1] - u[0] - 2 * u[2] + 1) ** 2
    last = lambda u, d: ((3 - 2 * u[1]) * u[1] - u[0] + 1) ** 2
    i, of = np.arange(n - 2), lambda *rows: map(np.array, zip(rows))
    kinds = [_kind(first, *of(0, 1)), _kind(inner, i, i + 1, i + 2), _kind(last, *of(n - 2, n - 1))]
    return Problem(np.full(n, -1.0), kinds)


def engval1(n):
    """Problem 31 of Toint 1983."""
    fn = lambda u, d: (u[0] ** 2 + u[1] ** 2) ** 2 - 4 * u[0] + 3
    return Problem(np.full(n, 2.0), [_kind(fn, *_chain(n))])


def liarwhd(n):
    """A simplified NONDIA; Li 1990."""
    first = lambda u, d: 4 * (u[0] ** 2 - u[0]) ** 2 + (u[0] - 1) ** 2
    fn = lambda u, d: 4 * (u[0] ** 2 - u[1]) ** 2 + (u[0] - 1) ** 2
    kinds = [_kind(first, np.array([0])), _kind(fn, np.arange(1, n), 0)]
    return Problem(np.full(n, 4.0), kinds)


def freuroth(n):
    """Extended Freudenstein and Roth; MGH 2, Toint's extension."""

    def fn(u, d):
        a = u[0] - 13 + ((5 - u[1]) * u[1] - 2) * u[1]
        b = u[0] - 29 + ((u[1] + 1) * u[1] - 14) * u[1]
        return a**2 + b**2

    start = np.zeros(n)
    start[:2] = 0.5, -2
    return Problem(start, [_kind(fn, *_chain(n))])


def nondia(n):
    """Shanno's nondiagonal Rosenbrock; the last variable is in no element."""
    first = lambda u, d: (u[0] - 1) ** 2 + 100 * (u[0] - u[0] ** 2) ** 2
    fn = lambda u, d: 100 * (u[0] - u[1] ** 2) ** 2
    kinds = [_kind(first, np.array([0])), _kind(fn, 0, np.arange(1, n - 1))]
    return Problem(np.full(n, -1.0), kinds)


def tridia(n):
    """Shanno's tridiagonal quadratic; problem 8 of Toint 1983."""
    first = lambda u, d: (u[0] - 1) ** 2
    fn = lambda u, d: d[0] * (2 * u[1] - u[0]) ** 2
    kinds = [_kind(first, np.array([0])), _kind(fn, *_chain(n), data=[np.arange(2.0, n + 1)])]
    return Problem(np.ones(n), kinds)


def dixon3dq(n):
    """Dixon's tridiagonal quadratic."""
    end, fn = lambda u, d: (u[0] - 1) ** 2, lambda u, d: (u[0] - u[1]) ** 2
    i = np.arange(1, n - 1)
    return Problem(np.full(n, -1.0), [_kind(end, np.array([0, n - 1])), _kind(fn, i, i + 1)])


def cosine(n):
    """Gould; not convex."""
    fn = lambda u, d: jnp.cos(u[0] ** 2 - u[1] / 2)
    return Problem(np.ones(n), [_kind(fn, *_chain(n))])


def edensch(n):
    """Extended Dennis and Schnabel; Li 1990."""
    fn = lambda u, d: (u[0] - 2) ** 4 + (u[0] * u[1] - 2 * u[1]) ** 2 + (u[1] + 1) ** 2
    return Problem(np.full(n, 8.0), [_kind(fn, *_chain(n))], 16.0)


def cragglvy(n):
    """Extended Cragg and Levy; problem 32 of Toint 1983."""

    def fn(u, d):
        a = (jnp.exp(u[0]) - u[1]) ** 4 + 100 * (u[1] - u[2]) ** 6
        b = (jnp.tan(u[2] - u[3]) + u[2] - u[3]) ** 4
        return a + b + u[0] ** 8 + (u[3] - 1) ** 2

    start = np.full(n, 2.0)
    start[0] = 1
    i = 2 * np.arange((n - 2) // 2)
    return Problem(start, [_kind(fn, i, i + 1, i + 2, i + 3)])


def morebv(n):
    """A discretised boundary value problem, least squares; MGH 28."""
    h = 1 / (n + 1)
    t = h * np.arange(1, n + 1)
    cube = lambda x, t: h**2 * (x + t + 1) ** 3 / 2
    end = lambda u, d: (2 * u[0] - u[1] + cube(u[0], d[0])) ** 2
    inner = lambda u, d: (2 * u[1] - u[0] - u[2] + cube(u[1], d[0])) ** 2
    i = np.arange(n - 2)
    ends = _kind(end, np.array([0, n - 1]), np.array([1, n - 2]), data=[t[[0, -1]]])
    return Problem(t * (t - 1), [ends, _kind(inner, i, i + 1, i + 2, data=[t[1:-1]])])


PROBLEMS = {
    fn.__name__.upper(): fn
    for fn in (genrose, chnrosnb, woods, arwhead, bdqrtic, broydn3dls, engval1, liarwhd, freuroth)
    + (nondia, tridia, dixon3dq, cosine, edensch, cragglvy, morebv)
}
