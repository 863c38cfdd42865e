"""`check_axes`: permute the rows of each axis, and compare the results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psjax._select import axis_sizes
from psjax.axes._narrow import Narrow, Rows, named_walk
from psjax.axes._walk import shapes_of

_TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 2e-4, "float64": 1e-9}


def check_axes(
    apply: Callable[..., Any], axes: Any, params: Any, *inputs: Any, seed: int = 0
) -> None:
    r"""Raise unless the rows of every axis can be permuted.

    First the traced program is read: dimensions that it ties together must be in the same axis, and
    no dimension may be in two. Then, at random weights, the rows of each axis are permuted in all
    leaves, inputs and results that have it, and the results are compared. It calls `apply` twice.

    Args:
      apply: `apply(params, *inputs)`, a pure function of arrays.
      axes: what `psjax.infer_axes` returns, or your own, as in `psjax.select`.
      params: the parameters; random numbers are added to them.
      *inputs: inputs of the function; integers are used as they are.
      seed: seed of the random numbers.

    Raises:
      ValueError: a leaf's dimension and its axis disagree (the message names both, and the step of
        the program that shows it), a permutation changes the results, or `apply` returns other
        results when it is called again.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> apply = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]
      >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
      >>> axes = {"in": P(None, "hidden"), "out": P("hidden")}
      >>> psjax.check_axes(apply, axes, w, jnp.ones((5, 3)))
      >>> wrong = {"in": P(None, "hidden"), "out": P()}
      >>> try:
      ...     psjax.check_axes(apply, wrong, w, jnp.ones((5, 3)))
      ... except ValueError as error:
      ...     print(error)
      check_axes: dimension 0 of ['out'] goes together with axis 'hidden', of 8 rows; it must have
      the same name.
    """
    like = shapes_of(params)
    specs, paths, sizes = axis_sizes("check_axes", axes, like)
    named = named_walk(apply, specs, sizes, like, inputs)
    _check_names(named, sizes)
    _check_leaves(named, paths)
    arrays, treedef = jax.tree.flatten((params, inputs))
    rng = np.random.default_rng(seed)
    drawn = [_perturbed(rng, x) for x in arrays]

    def once_more(arrays):  # a new function, so that JAX traces again
        params, inputs = treedef.unflatten(arrays)
        return jax.tree.leaves(apply(params, *inputs))

    _check_numbers(named, sizes, drawn, rng, once_more)


def _check_names(named, sizes):
    """Every name must be one axis, different from all others, with rows that can be permuted."""
    seen: dict[int, str] = {}
    for name in named.atoms:
        for own in named.own(name):
            reason = named.walk.atoms.fixed(own)
            if reason is not None:
                msg = f"check_axes: the rows of axis {name!r} are told apart: {reason}."
                raise ValueError(msg)
            if own in seen:
                msg = (
                    f"check_axes: {seen[own]!r} and {name!r} are one axis, of {sizes[name]} rows; "
                    "give both the same name."
                )
                raise ValueError(msg)
            seen[own] = name


def _check_leaves(named, paths):
    """Every dimension that goes together with an axis must have its name."""
    atoms, by_name = named.walk.atoms, set(named.atoms.values())
    names_of = {own: name for name in named.atoms for own in named.own(name)}
    for path, x in zip(paths, named.params):
        for d, dim in enumerate(x.dims):
            written = atoms.atoms([[a for a in term if a in by_name] for term in dim])
            found = [own for own in atoms.atoms(dim) if own in names_of]
            extra = [own for own in found if own not in written]
            if extra:
                msg = (
                    f"check_axes: dimension {d} of {path} goes together with axis "
                    f"{names_of[extra[0]]!r}, of {atoms.size(extra[0])} rows; it must have "
                    "the same name."
                )
                raise ValueError(msg)


def _perturbed(rng, x):
    """Random numbers near those of an array, of the same sign if the array has only one sign."""
    x = np.asarray(x) if not isinstance(x, jax.ShapeDtypeStruct) else np.zeros(x.shape, x.dtype)
    if not np.issubdtype(x.dtype, np.floating) and x.dtype.name != "bfloat16":
        return x
    own = x.astype(np.float64)
    scale = float(np.sqrt(np.mean(own**2))) if x.size else 0.0
    noise = rng.normal(size=x.shape)
    new = own * np.exp(0.3 * rng.normal(size=x.shape)) + 0.3 * (scale or 1.0) * noise
    if x.size and np.all(own > 0):
        new = np.abs(own) * np.exp(0.3 * noise)
    return new.astype(x.dtype)


def _check_numbers(named, sizes, arrays, rng, once_more):
    """Permute the rows of one axis after the other."""
    walk, program = named.walk, named.program
    evaluate = lambda perms, arrays: _Permuted(walk, perms)(program, arrays)
    # One program: XLA computes once what both have in common.
    run = jax.jit(lambda arrays: (evaluate({}, arrays), once_more(arrays)))
    random = _draws(program)
    base, called = ([np.asarray(y) for y in ys] for ys in run(arrays))
    if not all(np.all(np.isfinite(y)) for y in base if y.dtype.kind in "fc"):
        msg = (
            "check_axes: the results at random weights near the given ones are not finite; pass "
            "other parameters or another seed."
        )
        raise ValueError(msg)
    for y, found in zip(base, called, strict=True):
        error, allowed = _error(found, y)
        if not error <= allowed:
            msg = (
                "check_axes: apply returns other results when it is called again with the same "
                f"arrays, by {error:.1e} of their size: it reads or changes something else, such "
                "as a counter, a list or NumPy's random numbers. JAX traces a function once and "
                "keeps what it saw; pass what changes as an argument."
            )
            raise ValueError(msg)
    for name in named.atoms:
        perms = {own: rng.permutation(walk.atoms.size(own)) for own in named.own(name)}
        moved = [_permuted(walk, x, v, perms) for x, v in zip(arrays, program.ins)]
        again = jax.jit(lambda arrays, perms=perms: evaluate(perms, arrays))
        results = again(moved) if random else run(moved)[0]
        for y, found, value in zip(base, results, program.outs):
            error, allowed = _error(np.asarray(found), _permuted(walk, y, value, perms))
            if not error <= allowed:
                msg = (
                    f"check_axes: permuting the {sizes[name]} rows of axis {name!r} changes the "
                    f"results by {error:.1e} of their size (at most {allowed:.0e} is rounding)."
                )
                raise ValueError(msg)


def _error(found, want):
    if found.dtype.kind not in "fc" and found.dtype.name != "bfloat16":
        return float(np.any(found != want)), 0.0
    wide = lambda y: y.astype(np.complex128 if y.dtype.kind == "c" else np.float64)
    size = max(float(np.max(np.abs(wide(want)), initial=0.0)), 1e-30)
    error = float(np.max(np.abs(wide(found) - wide(want)), initial=0.0)) / size
    return error, _TOLERANCE.get(found.dtype.name, 2e-4)


def _rows(walk, dim, perms):
    """Where every row of a dimension comes from."""
    found, start = [], 0
    for term in walk.atoms.expand(dim):
        own = np.zeros(1, int)
        for atom in term:
            n, parts = walk.atoms.size(atom), walk.atoms.parts(atom)
            inner = perms.get(atom, np.arange(n)) if parts is None else _rows(walk, parts, perms)
            own = (own[:, None] * n + inner[None]).reshape(-1)
        found.append(start + own)
        start += len(own)
    return np.concatenate(found) if found else np.zeros(0, int)


def _permuted(walk, x, value, perms):
    """An array with its rows in another order; numbers of rows follow them."""
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return x
    for d, dim in enumerate(value.dims):
        if not perms.keys().isdisjoint(walk.atoms.atoms(dim)):
            x = x.take(_rows(walk, dim, perms), axis=d)
    if value.points is not None:
        x = np.argsort(_rows(walk, value.points, perms))[x].astype(x.dtype)
    return x


def _draws(program):
    """Whether random numbers are drawn in it."""
    steps = program.steps
    return any(step.name == "random_bits" or any(map(_draws, step.inner)) for step in steps)


class _Permuted(Narrow):
    """Evaluates a program whose random numbers are in another order too."""

    def __init__(self, walk, perms):
        super().__init__(Rows(walk.atoms, {}))
        self.walk, self.perms = walk, perms

    def step(self, step, ins):
        outs = super().step(step, ins)
        if step.name == "random_bits":
            outs = [_permuted(self.walk, outs[0], step.outs[0], self.perms)]
        return outs
