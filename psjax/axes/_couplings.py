"""Which axes cannot be divided into independent parts, though their rows can be permuted.

The rows of a hidden layer are independent: a subnet of some of them computes what the whole network
does with the other rows' weights zero. That ends where a sum over the rows meets them again, as in
a normalisation or a gate, where a maximum is taken over them, or where a sum counts rows whose
weights are zero. For every value, three sets of atoms are followed through the program.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np
from jax.extend.core import Literal

from psjax.axes._atoms import Reason
from psjax.axes._entries import BINARY, SAME, UNARY
from psjax.axes._walk import Program, Step, Walk

EVERY = -1  # all atoms, as a set of bits

# Functions that are 0 at 0.
ZERO_AT_ZERO = {
    *"abs asin asinh atan atanh cbrt ceil conj convert_element_type erf erf_inv expm1".split(),
    *"floor imag integer_pow log1p neg real round sign sin sinh sqrt square tan tanh".split(),
    *SAME,
}
ENTRYWISE = {*UNARY, *BINARY, *SAME, "convert_element_type", "select_n", "clamp"}
EXTREMES = {"reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"}
ORDERED = {"argmax", "argmin", "top_k", "sort", "cumsum", "cumprod", "cummax", "cummin"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """Sets of atoms, as bits.

    Attributes:
      real: the value varies along them.
      summed: it depends on a sum over them.
      zero: it is 0 in the rows whose weights are 0.
      data: whether it depends on more than parameters.
    """

    real: int = 0
    summed: int = 0
    zero: int = 0
    data: bool = False

    def joined(self, other: "Facts") -> "Facts":
        """Facts of a value that is one or the other."""
        return Facts(
            self.real | other.real,
            self.summed | other.summed,
            self.zero & other.zero,
            self.data or other.data,
        )


class Couplings:
    """Follows a program.

    Args:
      walk: a walk that has been through it.
      divided: the atoms that are divided together, if known. Weights between two subnets are then
        zero, so that a sum over a subnet's rows of one axis, in its rows of another, depends on
        this subnet alone. A sum over the rows of all subnets must not meet these rows again, even
        through other weights.
      num_params: number of the program's arguments that are parameters; they come first.

    Attributes:
      reasons: `{atom: Reason}` for the atoms that cannot be divided.
    """

    def __init__(self, walk: Walk, divided: Iterable[int], num_params: int):
        self.walk, self.num_params = walk, num_params
        self.divided = sum(1 << atom for atom in set(divided))
        self._calls: list[Any] = []
        self.reasons: dict[int, Reason] = {}

    def of(self, program: Program) -> list[Facts]:
        """Follow the whole program, from its arguments to its results."""
        ins = [self.bits(x.dims) for x in program.ins]
        facts = [Facts(bits, 0, bits, i >= self.num_params) for i, bits in enumerate(ins)]
        return self.run(program, facts)

    def atoms(self, bits: int) -> list[int]:
        """The atoms in a set of bits."""
        found, atom = [], 0
        while bits >> atom:
            if bits >> atom & 1:
                found.append(atom)
            atom += 1
        return found

    def bits(self, dims: Any) -> int:
        """The atoms of some dimensions, as a set of bits."""
        found = 0
        for dim in dims:
            for atom in self.walk.atoms.atoms(dim):
                found |= 1 << atom
        return found

    def run(self, program: Program, ins: list[Facts]) -> list[Facts]:
        """Facts of the results of a program, from those of its arguments."""
        constants = [self._constant(x) for x in program.consts]
        env = dict(zip(program.jaxpr.constvars, constants)) | dict(zip(program.jaxpr.invars, ins))

        def read(v):
            return self._constant(v.val) if isinstance(v, Literal) else env[v]

        for step in program.steps:
            outs = self.step(step, [read(v) for v in step.eqn.invars])
            env |= zip(step.eqn.outvars, outs)
        return [read(v) for v in program.jaxpr.outvars]

    def _constant(self, x):
        return Facts(zero=0 if self._some(x) else EVERY, data=np.ndim(x) > 0)

    def _some(self, x):
        """Whether a constant may differ from 0: it does, or it cannot be read."""
        try:
            return bool(np.any(np.asarray(x)))
        except (TypeError, RuntimeError):
            return True

    # ------------------------------------------------------------------------------------- steps

    def step(self, step: Step, ins: list[Facts]) -> list[Facts]:
        """Facts of the results of an equation."""
        self._calls.append(step.eqn)
        outs = self._outs(step, ins)
        self._calls.pop()
        data = any(x.data for x in ins)
        return [dataclasses.replace(x, data=x.data or data) for x in outs]

    def _outs(self, step, ins):
        name = step.name
        if step.inner:
            return self._call(step, ins)
        if name in ENTRYWISE:
            return self._entrywise(step, ins)
        if name == "dot_general":
            return [self._dot(step, *ins)]
        if name == "conv_general_dilated":
            return [self._conv(step, *ins)]
        if name == "reduce_sum" or name in EXTREMES:
            return [self._reduce(step, *ins)]
        if name in ORDERED:
            p = step.eqn.params
            axes = p.get("axes", (p.get("axis", p.get("dimension", -1)),))
            over = self.bits(step.ins[0].dims[d] for d in axes)
            self._couple(over & ins[0].real, step, "its rows are ranked, or taken in order")
            return [self._same(step, ins, i, over) for i in range(len(step.outs))]
        return [self._same(step, ins, i) for i in range(len(step.outs))]

    def _same(self, step, ins, i, over=0):
        """The results have entries of the operands, in other places."""
        bits = self.bits(step.outs[i].dims)
        real = summed = 0
        zero = EVERY
        for x, own in zip(step.ins, ins):
            real, summed = real | own.real, summed | own.summed
            zero &= own.zero | ~self.bits(x.dims)
        if step.name == "random_bits" or not ins:
            real, zero = bits, 0
        return Facts(real & bits, summed | over & real, zero)

    def _entrywise(self, step, ins):
        for i, one in enumerate(ins):
            for j, other in enumerate(ins):
                if i != j:
                    again = one.real & other.summed & ~other.real
                    if one.data:  # rows of one subnet meet a sum over the rows of all subnets
                        again |= one.real & ~one.summed & other.summed & self.divided
                    self._couple(again, step, "a sum over its rows meets them again")
        name, real, summed = step.name, 0, 0
        for own in ins:
            real, summed = real | own.real, summed | own.summed
        if name in SAME:
            return [Facts(x.real, x.summed, x.zero) for x in ins]
        return [Facts(real, summed, self._zero(name, ins))] * len(step.outs)

    def _zero(self, name, ins):
        if name in ("mul", "and"):
            return ins[0].zero | ins[1].zero
        if name in ("add", "add_any", "sub", "max", "min", "or", "atan2"):
            return ins[0].zero & ins[1].zero
        if name in ("div", "rem"):
            return ins[0].zero
        if name == "select_n":
            zero = EVERY
            for own in ins[1:]:
                zero &= own.zero
            return zero
        return ins[0].zero if name in ZERO_AT_ZERO else 0

    def _reduce(self, step, x):
        over = self.bits(step.ins[0].dims[d] for d in step.eqn.params["axes"]) & x.real
        if step.name in EXTREMES:
            what = "a product is taken over it" if step.name == "reduce_prod" else ""
            self._couple(over, step, what or "an extreme value is taken over it")
        else:
            self._count(over & ~x.zero, step)
        real = x.real & self.bits(step.outs[0].dims)
        return Facts(real, x.summed | over, x.zero)

    def _count(self, over, step):
        self._couple(over, step, "a sum counts its rows where their weights are 0")

    def _dot(self, step, a, b):
        (left, right), _ = step.eqn.params["dimension_numbers"]
        one, two = step.ins
        over = self.bits(one.dims[i] for i in left) & (a.real | b.real)
        self._count(over & ~(a.zero | b.zero), step)
        free = lambda x, gone: self.bits(d for i, d in enumerate(x.dims) if i not in gone)
        kept = (a.real & free(one, left), b.real & free(two, right))
        own = self._own(a, over, kept[0]) | self._own(b, over, kept[1])
        return Facts(
            kept[0] | kept[1],
            a.summed | b.summed | over & ~own,
            (a.zero & free(one, left)) | (b.zero & free(two, right)),
        )

    def _own(self, weights, over, kept):
        """The rows that each subnet sums over for itself."""
        return weights.real & over if kept & self.divided else 0

    def _conv(self, step, x, kernel):
        _, (out, into, *_), _ = step.eqn.params["dimension_numbers"]
        over = self.bits([step.ins[1].dims[into]]) & (x.real | kernel.real)
        self._count(over & ~(x.zero | kernel.zero), step)
        own = self.bits([step.ins[1].dims[out]])
        bits = self.bits(step.outs[0].dims)
        real = (kernel.real & own) | (x.real & bits & ~over)
        zero = kernel.zero & own | x.zero & own & ~over
        summed = over & ~self._own(kernel, over, kernel.real & own)
        return Facts(real, x.summed | kernel.summed | summed, zero)

    def _couple(self, bits, step, text):
        for atom in self.atoms(bits):
            self.reasons.setdefault(atom, Reason(text, step.eqn, tuple(self._calls[:-1])))

    # ------------------------------------------------------------------------------ what is inside

    def _call(self, step, ins):
        name = step.name
        if name == "cond":
            return self._cond(step, ins)
        if name == "while":
            c, b = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]

            def turn(carry):
                (again,) = self.run(step.inner[0], [*ins[:c], *carry])
                outs = self.run(step.inner[1], [*ins[c : c + b], *carry])
                return self._chosen(step, again, outs)

            return self._loop(ins[c + b :], turn)
        if name == "scan":
            consts, carried = step.extra
            each = ins[consts + carried :]
            run = lambda carry: self.run(step.inner[0], [*ins[:consts], *carry, *each])
            ys: list[Facts] = []

            def body(carry):
                outs = run(carry)
                ys[:] = outs[carried:]
                return outs[:carried]

            return [*self._loop(ins[consts : consts + carried], body), *ys]
        return self.run(step.inner[0], ins)

    def _cond(self, step, ins):
        which, *operands = ins
        found = [self.run(branch, operands) for branch in step.inner]
        outs = found[0]
        for other in found[1:]:
            outs = [x.joined(y) for x, y in zip(outs, other)]
        return self._chosen(step, which, outs)

    def _chosen(self, step, by, outs):
        """Values that depend on a decision, and so on the sums in it."""
        for x in outs:
            self._couple(x.real & by.summed & ~by.real, step, "a sum over its rows decides on them")
        return [Facts(x.real, x.summed | by.summed, x.zero) for x in outs]

    def _loop(self, carry, body):
        """Facts that no further turn of a loop changes."""
        while True:
            outs = [x.joined(y) for x, y in zip(carry, body(carry))]
            if outs == carry:
                return outs
            carry = outs
