"""Where in a network the neurons of two subnets meet other than in a sum.

The network is evaluated operation by operation, several times: as it is, and with the rows that one
half of the subnets hold rescaled, then those of the other half. An intermediate number that depends
on one half only belongs to *one* side; one that depends on both is *mixed*. In a network made
of independent subnets numbers become mixed by addition alone, and what is mixed never meets again
what belongs to one side of the same axis.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

# Operations that move numbers, and how they do it does not depend on them.
_MOVES = {
    *("reshape", "transpose", "broadcast_in_dim", "squeeze", "slice", "concatenate", "split"),
    *("rev", "copy"),
}
# With these, operations in which the neurons of two subnets may meet: they add, or only move.
_SUMS = _MOVES | {
    *("add", "sub", "add_any", "reduce_sum", "cumsum", "reduce_window_sum", "pad", "gather"),
    *("dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add"),
}
_PRODUCTS = {"dot_general", "conv_general_dilated"}
_EXTREMES = {"reduce_max", "reduce_min", "reduce_prod", "argmax", "argmin"}
# Operations along an axis whose result has the operand's shape.
_ALONG = {"sort", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "fft", "cholesky"}
# Operations that call the one function among their parameters on their own operands.
_CALLS = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint"}
_CALLS |= {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}


class Meeting(NamedTuple):
    """Attributes: operation, the name of the primitive; axis, the name of the divided axis."""

    operation: str
    axis: str


def first_meeting(
    fn: Callable[[list[jax.Array]], Any],
    leaves: Sequence[jax.Array],
    halves: dict[str, tuple[list[Any], list[Any]]],
) -> Meeting | None:
    """The first operation where two subnets meet other than in a sum, or None.

    Args:
      fn: the scores as a function of the parameters' leaves; JAX must be able to trace it.
      leaves: the parameters' leaves, zero between the subnets.
      halves: for each divided axis, and for each half of the subnets, which entries of each leaf
        lie in the rows that these subnets hold: masks, or None for a leaf without the axis.
    """
    leaves = [jnp.asarray(x) for x in leaves]
    closed = jax.make_jaxpr(fn)(leaves)
    rng = np.random.default_rng(0)
    changes = [half for both in halves.values() for half in both]
    values = []
    for i, x in enumerate(leaves):
        masks, variants = [half[i] for half in changes], [x]
        if jnp.issubdtype(x.dtype, jnp.inexact) and any(mask is not None for mask in masks):
            other = x * jnp.asarray(rng.uniform(1.25, 1.75, x.shape), x.dtype)
            variants += [x if mask is None else jnp.where(mask, other, x) for mask in masks]
        values.append(_Value(variants, _changed(variants)))
    search = _Search(list(halves))
    search.run(closed, values)
    return search.found


class _Value(NamedTuple):
    """An intermediate array.

    Attributes:
      variants: the array itself, and what it is with each half of each axis changed; the array
        alone if it depends on none.
      depends: bool `[2 * axes, ...]`: which numbers depend on each half; None for none.
    """

    variants: list[Any]
    depends: np.ndarray | None

    def on(self, axis):
        """Which numbers depend on the one half of an axis, and which on the other."""
        none = np.zeros(np.shape(self.variants[0]), bool)
        return (none, none) if self.depends is None else self.depends[2 * axis : 2 * axis + 2]


class _Search:
    """Evaluates a program operation by operation until two subnets meet."""

    def __init__(self, axes):
        self.axes, self.found = axes, None

    def run(self, closed, values):
        """The results of a program, or None as soon as two subnets meet."""
        jaxpr = getattr(closed, "jaxpr", closed)
        known = dict(zip(jaxpr.constvars, map(_constant, getattr(closed, "consts", ()))))
        known.update(zip(jaxpr.invars, values))
        read = lambda v: _constant(v.val) if isinstance(v, Literal) else known[v]
        for eqn in jaxpr.eqns:
            outs = self.one(eqn, [read(v) for v in eqn.invars])
            if outs is None:
                return None
            known.update(zip(eqn.outvars, outs))
        return [read(v) for v in jaxpr.outvars]

    def one(self, eqn, values):
        name, params = eqn.primitive.name, eqn.params
        if name in _CALLS:
            inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
            return self.run(inner, values)
        if name == "cond" and values[0].depends is None:
            return self.run(params["branches"][int(values[0].variants[0])], values[1:])
        if name == "scan":
            return self.scan(eqn, values)
        several = lambda x: x if eqn.primitive.multiple_results else [x]
        bind = lambda xs: several(eqn.primitive.bind(*xs, **params))
        num = max((len(x.variants) for x in values), default=1)
        runs = [bind([x.variants[k % len(x.variants)] for x in values]) for k in range(num)]
        found = _depends(eqn, bind, values, np.shape(runs[0][0])) if num > 1 else None
        outs = [
            _value(list(x), None if found is None else found[i]) for i, x in enumerate(zip(*runs))
        ]
        if num > 1:
            for a, axis in enumerate(self.axes):
                if _meet(eqn, values, outs, a):
                    self.found = Meeting(name, axis)
                    return None
        return outs

    def scan(self, eqn, values):
        """Step by step. Which operand is what is read off the ranks: JAX's versions differ."""
        body = eqn.params["jaxpr"]
        inner = getattr(body, "jaxpr", body)
        split = lambda ours, theirs: sum(
            len(v.aval.shape) == len(u.aval.shape) for v, u in zip(ours, theirs)
        )
        whole, carried = split(eqn.invars, inner.invars), split(eqn.outvars, inner.outvars)
        consts, carry, rows = values[: whole - carried], values[whole - carried : whole], []
        steps = range(eqn.params["length"])
        for i in reversed(steps) if eqn.params["reverse"] else steps:
            row = lambda x, i=i: _Value(
                [y[i] for y in x.variants], None if x.depends is None else x.depends[:, i]
            )
            results = self.run(body, [*consts, *carry, *map(row, values[whole:])])
            if results is None:
                return None
            carry = results[:carried]
            rows.append(results[carried:])
        return [*carry, *map(_stack, *(reversed(rows) if eqn.params["reverse"] else rows))]


def _constant(x):
    return _Value([x], None)


def _stack(*rows):
    num = max(len(x.variants) for x in rows)
    variants = [jnp.stack([x.variants[k % len(x.variants)] for x in rows]) for k in range(num)]
    none = lambda x: np.zeros((num - 1, *np.shape(x.variants[0])), bool)
    depends = [none(x) if x.depends is None else x.depends for x in rows]
    return _Value(variants, None if num == 1 else np.stack(depends, axis=1))


def _value(variants, depends):
    """With `depends` as read off the operation, or else as seen in the variants."""
    if depends is None:
        return _Value(variants, _changed(variants))
    same = zip(depends, variants[1:])
    return _Value([variants[0], *(jnp.where(d, x, variants[0]) for d, x in same)], depends)


def _depends(eqn, bind, values, shape):
    """What each result depends on, for the commonest operations; None for others.

    Not read off the values: they may be equal by accident, as of the maximum less itself, or differ
    by rounding. Only a zero that depends on nothing, as between two subnets, cuts a product.
    """
    name = eqn.primitive.name
    num = next(len(x.depends) for x in values if x.depends is not None)
    none = lambda x: np.zeros((num, *np.shape(x.variants[0])), bool)
    depends = [none(x) if x.depends is None else x.depends for x in values]
    if name in _MOVES:
        moved = [bind(list(map(jnp.asarray, own))) for own in zip(*depends)]
        return [np.stack(own) for own in zip(*moved)]
    if name == "reduce_sum" or name in _EXTREMES:
        return [depends[0].any(tuple(d + 1 for d in eqn.params["axes"]))]
    if name in _PRODUCTS:
        there = [(np.asarray(x.variants[0]) != 0) | d.any(0) for x, d in zip(values, depends)]
        touch = lambda x, y: _touch(eqn, values, x, y)
        sides = zip(*depends)
        return [np.stack([touch(x, there[1]) | touch(there[0], y) for x, y in sides])]
    if _pointwise(name, values, shape):
        every = [np.broadcast_to(_wide(x, shape), (num, *shape)) for x in depends]
        return [np.any(every, axis=0)] * (len(eqn.outvars))
    return None


def _touch(eqn, values, x, y):
    """Where a product multiplies a number of x by one of y; bool arrays, as the operands are."""
    if not (x.any() and y.any()):
        return np.zeros(eqn.outvars[0].aval.shape, bool)
    left, right = (value.variants[0].dtype for value in values)
    product = eqn.primitive.bind(jnp.asarray(x, left), jnp.asarray(y, right), **eqn.params)
    return np.asarray(product) != 0


def _wide(depends, shape):
    """Of a scalar: with as many axes as the others."""
    return depends.reshape(-1, *[1] * len(shape)) if depends.ndim == 1 else depends


def _pointwise(name, values, shape):
    """Whether each number of the result depends on the operands' numbers at its place alone."""
    along = name in _ALONG or name in _PRODUCTS or name in _SUMS - {"add", "sub", "add_any"}
    fits = lambda x: len(x) in (0, len(shape)) and all(n in (1, m) for n, m in zip(x, shape))
    return not along and all(fits(np.shape(x.variants[0])) for x in values)


def _meet(eqn, values, outs, a):
    """Whether numbers of two subnets meet in this operation other than in a sum."""
    name = eqn.primitive.name
    if name in _SUMS:
        return False
    sides = [x.on(a) for x in values]
    alone = [one != other for one, other in sides]
    if not any(x.any() for x in alone):
        return False
    if name in _PRODUCTS:
        (one, other), (one_right, other_right) = sides
        pairs = [
            (one & ~other, other_right),
            (other & ~one, one_right),
            (one & other, alone[1]),
        ]
        return any(_touch(eqn, values, x, y).any() for x, y in pairs)
    if name in _EXTREMES:
        dims = tuple(eqn.params["axes"])
        one, other = sides[0]
        return bool((one.any(dims) & other.any(dims) & alone[0].any(dims)).any())
    mixed = [np.logical_and(*x.on(a)) for x in outs]
    if _pointwise(name, values, mixed[0].shape):
        return any((both & x).any() for both in mixed for x in alone)
    return any(both.any() for both in mixed)


def _changed(variants):
    """Which numbers differ from the first variant in each other one; None if nothing depends."""
    x = variants[0]
    if len(variants) == 1 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return None
    return np.stack([_differ(np.asarray(x), np.asarray(y)) for y in variants[1:]])


def _differ(x, y):
    return (x != y) & ~((x != x) & (y != y))  # NaN is the same as NaN
