"""`narrow`: the same function with fewer rows of some axes."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from psjax._notation import entries, size_of, terms
from psjax._select import axis_sizes, check_count, nearest
from psjax.axes._atoms import Atoms, Dim
from psjax.axes._calls import whole_equation
from psjax.axes._rules import RULES
from psjax.axes._walk import Program, Step, Value, Walk, shapes_of, struct


class Rows:
    """`rows(dim)`: number of rows of a dimension in the narrower program."""

    def __init__(self, atoms: Atoms, sizes: Mapping[int, int]):
        self.atoms, self.sizes = atoms, sizes

    def __call__(self, dim: Dim) -> int:
        return sum(math.prod(map(self._atom, term)) for term in self.atoms.expand(dim))

    def _atom(self, atom):
        parts = self.atoms.parts(atom)
        if parts is not None:
            return self(parts)
        return self.sizes.get(atom, self.atoms.size(atom))

    def shape(self, x: Value) -> tuple[int, ...]:
        """The shape of a value in the narrower program."""
        return tuple(self(dim) for dim in x.dims)


class Narrow:
    """Evaluates walked programs with fewer rows: `narrow(program, args) -> results`."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __call__(self, program: Program, args: Sequence[Any]) -> list[Any]:
        consts = [self._constant(*x) for x in zip(program.consts, program.const_values)]
        jaxpr = program.jaxpr
        env = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
        read = lambda v: v.val if isinstance(v, Literal) else env[v]
        for step in program.steps:
            ins = [read(v) for v in step.eqn.invars]
            env |= zip(step.eqn.outvars, self.step(step, ins))
        return [read(v) for v in jaxpr.outvars]

    def _constant(self, x, value):
        shape = self.rows.shape(value)
        if shape == tuple(jnp.shape(x)):
            return x
        return jax.lax.slice(x, (0,) * len(shape), shape)  # the same in every row

    def step(self, step: Step, ins: list[Any]) -> Sequence[Any]:
        """Evaluate one equation."""
        rule, eqn = RULES.get(step.name), step.eqn
        if rule is None:
            return whole_equation(eqn)(*ins)
        if rule.bind is not None:
            return rule.bind(self, step, ins)
        params = eqn.params if rule.params is None else rule.params(self.rows, step)
        outs = eqn.primitive.bind(*ins, **params)
        return outs if eqn.primitive.multiple_results else [outs]


class Named(NamedTuple):
    """A program that was walked through from named axes of its parameters.

    Attributes:
      walk: the walk.
      program: the program after the walk.
      atoms: the atom of every name.
      params: values of the parameters.
      inputs: values of the inputs.
      out: structure of the results.
    """

    walk: Walk
    program: Program
    atoms: dict[str, int]
    params: list[Value]
    inputs: list[Value]
    out: Any

    def own(self, name: str) -> list[int]:
        """The atoms that the program divides an axis into; one atom if it does not."""
        return self.walk.atoms.atoms([[self.atoms[name]]])


def named_walk(
    fn: Callable[..., Any],
    specs: Sequence[Any],
    sizes: Mapping[str, int],
    params: Any,
    inputs: Sequence[Any] = (),
    derivatives: bool = False,
) -> Named:
    """Walk through `fn(params, *inputs)`.

    Args:
      fn: a pure function of arrays.
      specs: a `PartitionSpec` for each leaf of the parameters.
      sizes: number of rows of every axis.
      params: the parameters, or `jax.ShapeDtypeStruct`s of them.
      inputs: inputs of the function.
      derivatives: as for `Walk`.
    """
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, *inputs)
    walk = Walk(RULES, derivatives)
    atoms = {name: walk.atoms.new(size) for name, size in sizes.items()}
    factor = lambda x: atoms[x] if isinstance(x, str) else walk.atoms.new(x)

    def dim(entry, n):
        if entry is None:
            return walk.atoms.dim(n)
        return [[factor(x) for x in term if x != 1] for term in terms(entry)]

    def value(spec, x):
        return Value(x.shape, [dim(e, n) for e, n in zip(entries(spec, len(x.shape)), x.shape)])

    values = [value(spec, x) for spec, x in zip(specs, closed.in_avals)]
    rest = [walk.value(aval) for aval in closed.in_avals[len(values) :]]
    program = walk.closed(closed, [*values, *rest])
    return Named(walk, program, atoms, values, rest, jax.tree.structure(out))


def narrow(
    apply: Callable[..., Any], axes: Any, sizes: Mapping[str, int], like: Any = None
) -> Callable[..., Any]:
    r"""Derive from a function the same function with fewer rows of some axes.

    A model that takes its widths as arguments has a narrower copy already; `narrow` makes one from
    any function. At the parameters that an element sees, `sizes[name]` rows of every axis, the
    copy equals `apply` at the whole parameters with all other rows zero, if the axis can be divided
    (`psjax.infer_axes` says so). Constants in the program, such as `1 / sqrt(width)`, keep the
    values of the whole network.

    Args:
      apply: `apply(params, *inputs)`, a pure function of arrays.
      axes: what `psjax.infer_axes` returns, or your own, as in `psjax.select`.
      sizes: `{axis: rows}`, 1 or more; axes that are not named stay whole.
      like: the whole parameters, or `jax.ShapeDtypeStruct`s of them. Not needed if `axes` is from
        `infer_axes`.

    Returns:
      A function `small(params, *inputs)` with results of the same structure as those of `apply`.
      It traces the program at every call, so call it inside `jax.jit`. Random numbers are drawn in
      the narrower shapes.

    Raises:
      ValueError: at once, if an axis is unknown or a size is wrong. At the call, if the program
        tells the rows of an axis apart (the message says where), the inputs have the axis, or the
        parameters have other shapes.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> apply = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]
      >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
      >>> axes = {"in": P(None, "hidden"), "out": P("hidden")}
      >>> small = psjax.narrow(apply, axes, {"hidden": 4}, like=w)
      >>> small({"in": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}, jnp.ones((5, 3))).shape
      (5, 2)
    """
    like = like if like is not None else getattr(axes, "like", None)
    if like is None:
        msg = "narrow(axes=...): pass the whole parameters, or their shapes, as like=."
        raise ValueError(msg)
    shapes = shapes_of(like)
    specs, paths, known = axis_sizes("narrow", axes, shapes)
    for name, rows in sizes.items():
        if name not in known:
            near = nearest(name, known)
            hint = f"; the nearest is {near!r}" if near else ""
            msg = (
                f"narrow(sizes=...): no parameter has an axis {name!r}{hint}; pass one of {known}."
            )
            raise ValueError(msg)
        check_count("narrow(sizes=...)", name, rows)
        if rows > known[name]:
            msg = f"narrow(sizes=...): axis {name!r} has {known[name]} rows, not {rows}."
            raise ValueError(msg)
    flat, treedef = jax.tree.flatten(shapes)
    smaller = {**known, **sizes}
    expected = [_narrower(x.shape, spec, smaller) for x, spec in zip(flat, specs)]

    def small(params, *inputs):
        got, own = jax.tree.flatten(params)
        if own != treedef:
            msg = f"narrow: the parameters have the structure {own}, not {treedef} as in like."
            raise ValueError(msg)
        for path, x, shape in zip(paths, got, expected):
            if jnp.shape(x) != shape:
                msg = f"narrow: {path} has shape {jnp.shape(x)}; with {dict(sizes)} it has {shape}."
                raise ValueError(msg)
        of_whole = [struct(jax.typeof(x), like.shape) for x, like in zip(got, flat)]
        whole = treedef.unflatten(of_whole)
        named = named_walk(apply, specs, known, whole, inputs, derivatives=True)
        rows = Rows(named.walk.atoms, _new_sizes(named, known, sizes))
        outs = Narrow(rows)(named.program, [*got, *jax.tree.leaves(inputs)])
        return named.out.unflatten(outs)

    return small


def _narrower(shape, spec, sizes):
    dims = zip(entries(spec, len(shape)), shape)
    return tuple(n if e is None else size_of(e, sizes) for e, n in dims)


def _new_sizes(named, known, sizes):
    """Rows of the atoms of the narrowed axes; raise if an axis cannot have fewer."""
    atoms = named.walk.atoms
    of_inputs = {atom for x in named.inputs for dim in x.dims for atom in atoms.atoms(dim)}
    new: dict[int, int] = {}
    names_of: dict[int, str] = {}
    for name in known:
        own = named.own(name)
        rows = sizes.get(name, known[name])
        if rows == known[name] and not any(atom in new for atom in own):
            names_of |= {atom: name for atom in own}
            continue
        problem = None
        if len(own) != 1 or atoms.size(own[0]) != known[name]:
            problem = "the program divides it into parts; name those"
        elif atoms.fixed(own[0]) is not None:
            problem = str(atoms.fixed(own[0]))
        elif own[0] in of_inputs:
            problem = "the inputs have it too"
        elif names_of.get(own[0], name) != name and sizes.get(names_of[own[0]]) != rows:
            problem = f"it has the same rows as {names_of[own[0]]!r}; pass one size for both"
        if problem is not None:
            msg = f"narrow(sizes={{{name!r}: {rows}}}): the axis cannot be narrower: {problem}."
            raise ValueError(msg)
        new[own[0]], names_of[own[0]] = rows, name
    return new
