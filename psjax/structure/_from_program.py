"""Which rows of the parameters each score depends on, read off a walked program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Var

from psjax.axes._atoms import Dim, Term
from psjax.axes._couplings import Couplings
from psjax.axes._rules import RULES
from psjax.axes._walk import Program, Step, Walk


class Reading:
    """A program with one result, one dimension of which is the scores.

    Args:
      scores: `scores(params, *inputs)`, one array.
      like: tree of `jax.ShapeDtypeStruct`s of the parameters.
      inputs: arrays, or `jax.ShapeDtypeStruct`s of them.
      dim: the dimension of the scores.

    Attributes:
      reason: why the program does not tell for some leaf; empty if it tells for all.
      own: the atoms of the scores; empty if the program tells nothing.
    """

    def __init__(self, scores: Callable[..., Any], like: Any, inputs: Any, dim: int):
        closed = jax.make_jaxpr(scores)(like, *inputs)
        self.walk = Walk(RULES)
        self.program = self.walk.closed(closed, [self.walk.value(x) for x in closed.in_avals])
        couplings = Couplings(self.walk, (), len(jax.tree.leaves(like)))
        facts = couplings.of(self.program)[0]
        self.alive = facts.real | facts.summed
        self.bits = couplings.bits
        self.params = self.program.ins[: len(jax.tree.leaves(like))]
        self.dim, self.out = dim, self.program.outs[0]
        self.num_classes = self.out.shape[dim]
        coupled = facts.summed | couplings.bits([[list(couplings.reasons)]])
        self.own: list[int] = []
        self.reason = self._find(coupled)

    def _find(self, coupled: int):
        """Put the atoms of the scores into `own`; or return why they tell nothing."""
        atoms = self.walk.atoms
        terms = atoms.expand(self.out.dims[self.dim])
        if len(terms) != 1 or any(atoms.parts(atom) is not None for atom in terms[0]):
            return "the scores are put together from parts"
        others = self.bits(d for i, d in enumerate(self.out.dims) if i != self.dim)
        for atom in terms[0]:
            why = atoms.fixed(atom)
            if why is not None:
                return f"the scores are told apart: {why}"
            if coupled >> atom & 1:
                return "the scores depend on each other's rows"
            if others >> atom & 1 or terms[0].count(atom) > 1:
                return "two dimensions of the result have the scores' rows"
        self.own = terms[0]
        return ""

    def masks(self) -> list[np.ndarray | None]:
        """Per leaf, `bool[C, ...]` that broadcasts to `[C, *shape]`; None if it is not known."""
        read = _read(self.program, [True])
        return [self._mask(x) if own else self._none(x) for x, own in zip(self.params, read)]

    def _none(self, x: Any):
        return np.zeros((self.num_classes,) + (1,) * len(x.shape), bool)

    def _mask(self, x: Any):
        if not self._once(x):
            self.reason = self.reason or "a parameter has the scores' rows twice"
            return None
        if not self.own:
            return None
        mask = ~self._none(x)
        for d, dim in enumerate(x.dims):
            rows = self._rows(dim)
            if not rows.all():
                shape = [self.num_classes] + [1] * len(x.shape)
                shape[d + 1] = x.shape[d]
                mask = mask & rows.reshape(shape)
        return mask

    def _once(self, x: Any):
        """Whether no atom of the scores is in two dimensions of a leaf or twice in a product."""
        atoms = self.walk.atoms
        count = lambda dim, own: max(
            sum(a == own or count(atoms.parts(a) or [], own) for a in term)
            for term in [[], *atoms.expand(dim)]
        )
        return all(sum(count(dim, own) for dim in x.dims) <= 1 for own in self.own)

    def _rows(self, dim: Dim):
        """Which rows of a dimension each score depends on: `bool[C, rows]`."""
        terms = self.walk.atoms.expand(dim)
        return np.concatenate([self._term(term, len(terms) > 1) for term in terms], axis=1)

    def _term(self, term: Term, beside: bool):
        atoms = self.walk.atoms
        mask = np.ones((self.num_classes, 1), bool)
        places = np.indices([atoms.size(a) for a in self.own]).reshape(len(self.own), -1)
        for atom in term:
            parts = atoms.parts(atom)
            if atom in self.own:
                rows = places[self.own.index(atom)][:, None] == np.arange(atoms.size(atom))
            elif parts is not None:
                rows = self._rows(parts)
            else:
                rows = np.ones((1, atoms.size(atom)), bool)
            mask = (mask[:, :, None] & rows[:, None, :]).reshape(len(mask), -1)
        inside = atoms.atoms([term])
        if beside and inside and all(atoms.fixed(a) is None for a in inside):
            # These rows stand beside others, and perhaps only the others are used. If free rows are
            # used, the result has them or a sum over them.
            if not self.bits([[inside]]) & self.alive:
                return np.zeros_like(mask)
        return mask

    def order(self) -> list[int]:
        """Per leaf, the number of steps of the program before the first that reads it."""
        uses: dict[int, int] = {}
        count = 0

        def visit(program: Program):
            nonlocal count
            for step in program.steps:
                for inner in step.inner[:1]:
                    visit(inner)
                for x in step.ins:
                    uses.setdefault(id(x), count)
                count += 1

        visit(self.program)
        return [uses.get(id(x), count) for x in self.params]


def _read(program: Program, wanted: Sequence[bool]) -> list[bool]:
    """Which arguments of a program the wanted results are computed from."""
    jaxpr = program.jaxpr
    needed = {v for v, own in zip(jaxpr.outvars, wanted) if own and isinstance(v, Var)}
    for step in reversed(program.steps):
        outs = [v in needed for v in step.eqn.outvars]
        if any(outs):
            ins = zip(step.eqn.invars, _read_by(step, outs), strict=True)
            needed |= {v for v, own in ins if own and isinstance(v, Var)}
    return [v in needed for v in jaxpr.invars]


def _read_by(step: Step, outs: list[bool]) -> list[bool]:
    """Which operands of an equation the wanted results are computed from."""
    if not step.inner:
        return [True] * len(step.ins)
    if step.name == "cond":
        branches = [_read(branch, outs) for branch in step.inner]
        return [True, *map(any, zip(*branches))]
    if step.name == "while":
        c, b = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
        tested = _read(step.inner[0], [True])
        body, carry = _turns(step.inner[1], b, [*map(any, zip(outs, tested[c:]))], [])
        return [*tested[:c], *body[:b], *carry]
    if step.name == "scan":
        consts, carried = step.extra
        body, carry = _turns(step.inner[0], consts, outs[:carried], outs[carried:])
        return [*body[:consts], *carry, *body[consts + carried :]]
    return _read(step.inner[0], outs)


def _turns(body: Program, consts: int, carry: list[bool], rest: list[bool]):
    """What the body of a loop reads and carries, once further turns do not change it."""
    while True:
        found = _read(body, [*carry, *rest])
        more = [a or b for a, b in zip(carry, found[consts:])]
        if more == carry:
            return found, carry
        carry = more
