"""`infer_axes`: the axes of the parameters of any function, found in its program."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from psjax.axes._atoms import Reason
from psjax.axes._axes import Axes, Axis, Fixed
from psjax.axes._couplings import Couplings
from psjax.axes._narrow import named_walk
from psjax.axes._rules import RULES
from psjax.axes._walk import Program, Value, Walk, shapes_of

UNUSED = Reason("no step reads it")
REPEATED = Reason("its rows lie within every row of another axis, beside others")

_MOST_COPIES = 64


def infer_axes(apply: Callable[..., Any], params: Any, *inputs: Any) -> Axes:
    r"""Find which dimensions of the parameters go together.

    An axis is a set of dimensions whose rows can be permuted together, in all leaves, inputs and
    results that have it, without changing the function. Examples are the neurons of a hidden layer,
    the heads of an attention, the channels that residual blocks share. Axes are found in the jaxpr,
    by one rule per primitive. A dimension that is not known to be permutable is fixed, with a
    reason. `psjax.check_axes` verifies the result numerically.

    Args:
      apply: `apply(params, *inputs)`, a pure function of arrays.
      params: its parameters, or `jax.ShapeDtypeStruct`s of them.
      *inputs: its inputs, or `jax.ShapeDtypeStruct`s of them; any batch size.

    Returns:
      `Axes`. Names follow the depth: `hidden_0`, `hidden_1`, `heads_0`, `experts_0`,
      `normalised_0`, `input_0`, `output_0`; change them with `Axes.rename`.

    Raises:
      TypeError: the parameters have no arrays.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> apply = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]
      >>> w = {"in": jnp.ones((3, 8)), "out": jnp.ones((8, 2))}
      >>> print(psjax.infer_axes(apply, w, jnp.ones((5, 3))))
      axis      size  kind    leaves and dimensions
      input_0      3  input   ['in'] 0
      hidden_0     8  hidden  ['in'] 1, ['out'] 0
      output_0     2  output  ['out'] 1
    """
    like = shapes_of(params)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    if not leaves:
        msg = "infer_axes(params=...): the parameters have no arrays."
        raise TypeError(msg)
    program = jax.make_jaxpr(apply)(like, *inputs)
    walk = Walk(RULES)
    values = [walk.value(aval) for aval in program.in_avals]
    walked = walk.closed(program, values)
    return _Namer(walk, walked, like, leaves).axes()


class Told(NamedTuple):
    """What the program says about an axis that a user has named.

    Attributes:
      fixed: why its rows cannot be permuted; None if they can.
      coupled: why it cannot be divided into independent parts; None if it can.
    """

    fixed: Reason | None
    coupled: Reason | None


def coupled_axes(
    fn: Callable[..., Any], leaves: Any, specs: Any, sizes: Mapping[str, int], divided: Any
) -> dict[str, Told]:
    """Whether named axes can be divided together, read from the program of a function.

    Args:
      fn: `fn(leaves)`.
      leaves: a list of arrays.
      specs: a `PartitionSpec` for each.
      sizes: number of rows of every axis.
      divided: names of the axes that are divided.
    """
    named = named_walk(fn, specs, sizes, leaves)
    own_of = {name: named.own(name) for name in divided}
    together = [atom for own in own_of.values() for atom in own]
    couplings = Couplings(named.walk, together, len(named.params))
    couplings.of(named.program)
    found = {}
    for name, own in own_of.items():
        fixed = next(filter(None, map(named.walk.atoms.fixed, own)), None)
        coupled = next((couplings.reasons[a] for a in own if a in couplings.reasons), None)
        found[name] = Told(fixed, coupled)
    return found


class _Namer:
    """Names for the atoms of a program after a walk through it."""

    def __init__(self, walk: Walk, program: Program, like: Any, leaves: Any):
        self.walk, self.program, self.like = walk, program, like
        self.paths = [jax.tree_util.keystr(path) for path, _ in leaves]
        self.params = program.ins[: len(leaves)]
        self.inputs = program.ins[len(leaves) :]
        state = [[walk.atoms.expand(d) for d in x.dims] for x in self.params]
        # A result with the dimensions of a parameter is its new value, such as a statistic.
        self.results = [
            x
            for x in program.outs
            if not x.dims or [walk.atoms.expand(d) for d in x.dims] not in state
        ]
        self.uses: dict[int, int] = {}
        self.batched: set[int] = set()
        self.ranked: set[int] = set()
        self._count = 0
        self._visit(program)
        for x in self.params:
            if id(x) not in self.uses and not self._returned(x):
                walk.fix(x.dims, UNUSED)
        self._write_out()
        self.of_inputs, self.of_results = self._of(self.inputs), self._of(self.results)
        self.coupled = self._couplings()

    def _couplings(self):
        """Why axes cannot be divided, if all axes that can be divided are divided together."""
        together = self._of(self.params) - self.of_inputs - self.of_results
        reasons: dict[int, Reason] = {}
        while True:
            found = Couplings(self.walk, together, len(self.params))
            found.of(self.program)
            again = found.reasons.keys() & together
            reasons = {**found.reasons, **reasons}
            if not again:
                return reasons
            together -= again

    def _write_out(self):
        """Fix atoms that the notation cannot express: those in `heads * (a + b)`, except heads."""
        atoms = self.walk.atoms
        for x in self.params:
            for dim in x.dims:
                for term in atoms.expand(dim):
                    for place, atom in enumerate(term):
                        parts = atoms.parts(atom)
                        if parts is not None and not self._few_copies(term[:place]):
                            atoms.fix(parts, REPEATED)

    def _few_copies(self, before):
        """Whether the factor before a sum is a number small enough to write the sum out."""
        atoms = self.walk.atoms
        free = any(atoms.fixed(atom) is None for atom in atoms.atoms([before]))
        return not free and atoms.rows([before]) <= _MOST_COPIES

    def _written(self, dim):
        """The terms of a dimension; a sum in a product is written out, or becomes a number."""
        atoms, found = self.walk.atoms, []
        for term in atoms.expand(dim):
            own: list[list[int]] = [[]]
            for place, atom in enumerate(term):
                parts = atoms.parts(atom)
                if parts is None or all(map(atoms.fixed, atoms.atoms(parts))):
                    own = [[*before, atom] for before in own]
                else:
                    copies = atoms.rows([term[:place]])
                    own = [list(part) for _ in range(copies) for part in parts]
            found += own
        return found

    def _returned(self, x):
        return any(x is out for out in self.program.outs)

    def _visit(self, program):
        """Record the order in which values are used, and how."""
        for step in program.steps:
            for inner in step.inner:
                self._visit(inner)
            for x in step.ins:
                self.uses.setdefault(id(x), self._count)
            self._count += 1
            if step.name == "dot_general":
                _, (batch, _) = step.eqn.params["dimension_numbers"]
                self.batched |= self._atoms(step.ins[0].dims[d] for d in batch)
            if step.name in ("top_k", "argmax", "argmin"):
                self.ranked |= {a for x in step.outs if x.points for a in self._atoms([x.points])}

    def _atoms(self, dims):
        return {atom for dim in dims for atom in self.walk.atoms.atoms(dim)}

    def _of(self, values):
        return self._atoms(dim for x in values for dim in x.dims)

    def axes(self) -> Axes:
        names = self._names()
        axes = {}
        for atom, name in names.items():
            leaves = tuple(
                (path, d)
                for path, x in zip(self.paths, self.params)
                for d, dim in enumerate(x.dims)
                if atom in self.walk.atoms.atoms(dim)
            )
            reason = self.coupled.get(atom)
            size = self.walk.atoms.size(atom)
            axes[name] = Axis(name, size, self._kind(atom), leaves, reason)
        spec = lambda x: self._spec(x, names)
        return Axes(
            jax.tree.structure(self.like).unflatten([spec(x) for x in self.params]),
            self.like,
            axes,
            tuple(self._fixed()),
            tuple(map(spec, self.inputs)),
            tuple(map(spec, self.program.outs)),
            dict(self.walk.unknown),
        )

    def _names(self):
        """Names of the free atoms of the parameters, in the order of their first use."""
        atoms = self.walk.atoms
        first: dict[int, tuple[int, ...]] = {}
        for i, x in enumerate(self.params):
            for d, dim in enumerate(x.dims):
                for place, atom in enumerate(atoms.atoms(dim)):
                    at = (self.uses.get(id(x), self._count), i, d, place)
                    if atoms.fixed(atom) is None and at < first.get(atom, (self._count + 1,)):
                        first[atom] = at
        numbers: dict[str, int] = {}
        names = {}
        for atom in sorted(first, key=first.__getitem__):
            label = self._label(atom)
            number = numbers[label] = numbers.get(label, -1) + 1
            names[atom] = f"{label}_{number}"
        return names

    def _kind(self, atom):
        if atom in self.of_inputs:
            return "input"
        if atom in self.of_results:
            return "output"
        return "hidden" if atom not in self.coupled else "normalised"

    def _label(self, atom):
        kind = self._kind(atom)
        if kind in ("hidden", "normalised") and atom in self.ranked:
            return "experts"
        if kind == "hidden" and atom in self.batched:
            return "heads"
        return kind

    def _spec(self, x: Value, names: dict[int, str]) -> P:
        return P(*(self._entry(dim, names) for dim in x.dims))

    def _entry(self, dim, names):
        """A dimension in the notation of axes; None if nothing in it has a name."""
        terms: list[list[str | int]] = []
        for term in self._written(dim):
            own: list[str | int] = []
            for atom in term:
                factor = names.get(atom, self.walk.atoms.size(atom))
                last = own[-1] if own else None
                if isinstance(factor, int) and isinstance(last, int):
                    own[-1] = factor * last
                else:
                    own.append(factor)
            own = own or [1]
            last = terms[-1] if terms else None
            if last is not None and _number(last) and _number(own):
                last[0] += own[0]  # pyright: ignore[reportOperatorIssue]
            else:
                terms.append(own)
        if all(_number(term) for term in terms):
            return None
        return "+".join("*".join(map(str, term)) for term in terms)

    def _fixed(self):
        atoms = self.walk.atoms
        for path, x in zip(self.paths, self.params):
            for d, dim in enumerate(x.dims):
                for atom in atoms.atoms(dim):
                    reason = atoms.fixed(atom)
                    if reason is not None:
                        yield Fixed(path, d, atoms.size(atom), reason)


def _number(term):
    return len(term) == 1 and isinstance(term[0], int)
