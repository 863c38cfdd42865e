"""A walk through a program: the dimensions of every value, and what every step does to them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from psjax.axes._atoms import Atoms, Dim, Reason


def shapes_of(tree: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of a tree of arrays, numbers, or such structs."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x)), tree)


def struct(aval: Any, shape: tuple[int, ...] | None = None) -> jax.ShapeDtypeStruct:
    """An array to trace with, on the same mesh; with another shape, it is not sharded."""
    where, varying = getattr(aval, "sharding", None), getattr(aval, "manual_axis_type", None)
    if where is None or where.mesh.empty:
        return jax.ShapeDtypeStruct(aval.shape if shape is None else shape, aval.dtype)
    if shape is not None:
        where = NamedSharding(where.mesh, P())
    shape = aval.shape if shape is None else shape
    return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=where, manual_axis_type=varying)


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program.

    Attributes:
      shape: its shape in the whole program.
      dims: one `Dim` per dimension.
      points: for integers that are row numbers, such as `argmax` returns: the dimension with these
        rows. The numbers change if the rows are permuted.
      literal: the value, if it is a number written in the program.
    """

    shape: tuple[int, ...]
    dims: list[Dim]
    points: Dim | None = None
    literal: Any = None


@dataclasses.dataclass(eq=False)
class Step:
    """An equation, the values around it, and the programs inside.

    Attributes:
      eqn: the equation.
      ins: values that it reads.
      outs: values that it makes.
      inner: programs of a loop, a condition, a call; what derivatives need comes last.
      extra: data that a rule stores for the narrower program.
    """

    eqn: Any
    ins: list[Value]
    outs: list[Value]
    inner: list["Program"] = dataclasses.field(default_factory=list)
    extra: Any = None

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name


@dataclasses.dataclass(eq=False)
class Program:
    """A jaxpr that was walked through.

    Attributes:
      jaxpr: the open jaxpr.
      consts: its constant arrays.
      const_values: their `Value`s.
      ins: values of its arguments.
      steps: one per equation.
      outs: values of its results.
    """

    jaxpr: Any
    consts: Sequence[Any]
    const_values: list[Value]
    ins: list[Value]
    steps: list[Step]
    outs: list[Value]


class Walk:
    """Walks through programs that share atoms, by one rule per primitive.

    Args:
      rules: `{primitive: Rule}`.
      derivatives: whether to walk through the derivatives of `custom_jvp` and `custom_vjp` too.
    """

    def __init__(self, rules: Any, derivatives: bool = False):
        self.atoms, self.rules, self.derivatives = Atoms(), rules, derivatives
        self.depth = 0  # nesting of derivatives
        self.calls: list[Any] = []  # the equations that the walk is inside of
        self.unknown: dict[str, int] = {}

    def value(self, aval: Any, reason: Reason | None = None) -> Value:
        """A value with new dimensions."""
        return Value(aval.shape, [self.atoms.dim(n, reason) for n in aval.shape])

    def constant(self, x: Any) -> Value:
        """A constant array: the rows of a dimension along which it varies are told apart."""
        if jnp.issubdtype(x.dtype, jax.dtypes.extended):
            return self.value(x, Reason("random keys"))
        x = np.asarray(x)
        dims = []
        for d, n in enumerate(x.shape):
            varies = n > 1 and not np.array_equal(x, np.broadcast_to(np.take(x, [0], d), x.shape))
            dims.append(self.atoms.dim(n, Reason("a constant varies along it") if varies else None))
        return Value(x.shape, dims, literal=x if x.ndim == 0 else None)

    def closed(self, closed: Any, ins: Sequence[Value]) -> Program:
        """Walk through a closed or an open jaxpr."""
        jaxpr = getattr(closed, "jaxpr", closed)
        return self.run(jaxpr, getattr(closed, "consts", ()), ins)

    def run(self, jaxpr: Any, consts: Sequence[Any], ins: Sequence[Value]) -> Program:
        """Walk through an open jaxpr with these constants."""
        values = [self.constant(x) for x in consts]
        env = dict(zip(jaxpr.constvars, values)) | dict(zip(jaxpr.invars, ins))
        read = lambda v: self.constant(np.asarray(v.val)) if isinstance(v, Literal) else env[v]
        steps = []
        for eqn in jaxpr.eqns:
            step = self.step(eqn, [read(v) for v in eqn.invars])
            env |= zip(eqn.outvars, step.outs)
            steps.append(step)
        outs = [read(v) for v in jaxpr.outvars]
        return Program(jaxpr, consts, values, list(ins), steps, outs)

    def step(self, eqn: Any, ins: list[Value]) -> Step:
        """One equation, by its rule."""
        step = Step(eqn, ins, [])
        rule = self.rules.get(eqn.primitive.name)
        if rule is None or not rule.points:
            for x in ins:
                self.unpoint(x, step)
        self.calls.append(eqn)
        if rule is None:
            self.refuse(step)
        else:
            step.outs = rule.dims(self, step)
        self.calls.pop()
        return step

    def refuse(self, step: Step) -> None:
        """Fix all dimensions that an unknown primitive touches."""
        name = step.name
        self.unknown[name] = self.unknown.get(name, 0) + 1
        reason = self.reason("a primitive without a rule", step)
        for x in step.ins:
            self.fix(x.dims, reason)
        step.outs = [self.value(v.aval, reason) for v in step.eqn.outvars]

    # --------------------------------------------------------------------------- for the rules

    def reason(self, text: str, step: Step) -> Reason:
        """A reason with the primitive and the user's line."""
        return Reason(text, step.eqn, tuple(self.calls[:-1]))

    def fix(self, dims: Sequence[Dim], reason: Reason) -> None:
        """Tell the rows of dimensions apart."""
        for dim in dims:
            self.atoms.fix(dim, reason)

    def unite(self, one: Dim, two: Dim, step: Step) -> None:
        """Give two dimensions the same rows, or fix both if that is impossible."""
        if one and two and self.atoms.rows(one) > 1:
            self.atoms.unite(one, two, self.reason("its rows are divided in two ways", step))

    def unite_all(self, one: Value, two: Value, step: Step) -> None:
        """Give two values of one shape the same dimensions."""
        for a, b in zip(one.dims, two.dims, strict=True):
            self.unite(a, b, step)

    def unpoint(self, x: Value, step: Step) -> None:
        """Row numbers are used as plain numbers, which tells the rows apart."""
        if x.points is not None:
            self.atoms.fix(x.points, self.reason("its rows are counted", step))


class Rule(NamedTuple):
    """What a primitive does; see `psjax.axes._rules`.

    Attributes:
      dims: `dims(walk, step)` returns the values that the equation makes.
      params: `params(rows, step)` returns its parameters in a narrower program.
      points: whether the rule handles integers that are row numbers.
      bind: `bind(narrow, step, ins)` evaluates it in a narrower program.
    """

    dims: Callable[[Walk, Step], list[Value]]
    params: Callable[[Any, Step], dict[str, Any]] | None = None
    points: bool = False
    bind: Callable[[Any, Step, list[Any]], Any] | None = None
