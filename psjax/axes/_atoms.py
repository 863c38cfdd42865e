"""Dimensions as sums of products of atoms, which a program unites, divides or fixes.

A *dimension* is a list of terms that follow one another, and a term is a list of atoms in row-major
order: `[[heads, dim], [extra]]` has `heads * dim + extra` rows. When a program treats a part of an
atom separately, the atom is divided: it stands for a dimension, which `expand` looks up.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from psjax.axes._source import source_of

_MOST_DIVISIONS = 1000  # of two dimensions until they are alike

Term = list[int]
Dim = list[Term]


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why the rows of a dimension are told apart.

    Attributes:
      text: the reason in words.
      eqn: the equation that tells the rows apart.
      calls: the equations that call the program with this equation, outermost first.
    """

    text: str
    eqn: Any = None
    calls: tuple[Any, ...] = ()

    @property
    def primitive(self) -> str:
        """Name of the JAX primitive."""
        return self.eqn.primitive.name if self.eqn is not None else ""

    @property
    def source(self) -> str:
        """`file:line` of the user's code, where known."""
        known = map(source_of, (self.eqn, *reversed(self.calls)))
        return next(filter(None, known), "") if self.eqn is not None else ""

    def __str__(self):
        where = " ".join(x for x in (self.primitive, self.source) if x)
        return f"{self.text} ({where})" if where else self.text


class Atoms:
    """Atoms and what is known about them: a union-find structure with divisible classes."""

    def __init__(self):
        self._parent: list[int] = []
        self._size: list[int] = []
        self._parts: list[Dim | None] = []
        self._fixed: list[Reason | None] = []

    def new(self, size: int, reason: Reason | None = None) -> int:
        """A new atom with `size` rows; fixed, if a reason is given."""
        self._parent.append(len(self._parent))
        self._size.append(size)
        self._parts.append(None)
        self._fixed.append(reason)
        return len(self._parent) - 1

    def dim(self, size: int | np.integer, reason: Reason | None = None) -> Dim:
        """A dimension of one new atom, or of no atom if it has one row."""
        return [[]] if size == 1 else [[self.new(int(size), reason)]]

    def product(self, dims: Sequence[Dim]) -> Dim:
        """The dimension of several in row-major order."""
        term: Term = []
        for dim in dims:
            if len(dim) == 1:
                term += dim[0]
            else:
                term.append(self.new(self.rows(dim)))
                self._parts[term[-1]] = dim
        return [term]

    def find(self, atom: int) -> int:
        """The representative of an atom's class."""
        while self._parent[atom] != atom:
            self._parent[atom] = self._parent[self._parent[atom]]
            atom = self._parent[atom]
        return atom

    def fixed(self, atom: int) -> Reason | None:
        """Why the rows of an atom are told apart; None if they are not."""
        return self._fixed[self.find(atom)]

    def size(self, atom: int) -> int:
        """Number of rows of an atom."""
        return self._size[self.find(atom)]

    def rows(self, dim: Dim) -> int:
        """Number of rows of a dimension."""
        return sum(self._rows(term) for term in dim)

    def _rows(self, term):
        return math.prod(self.size(atom) for atom in term)

    def atoms(self, dim: Dim) -> list[int]:
        """The undivided representatives in a dimension, in order and without repeats."""
        found: dict[int, None] = {}
        for term in self.expand(dim):
            for atom in term:
                parts = self.parts(atom)
                found |= dict.fromkeys([atom] if parts is None else self.atoms(parts))
        return list(found)

    def parts(self, atom: int) -> Dim | None:
        """The terms that an atom is divided into; None if it is not divided."""
        parts = self._parts[self.find(atom)]
        return None if parts is None else self.expand(parts)

    def expand(self, dim: Dim) -> Dim:
        """The dimension in terms of undivided atoms.

        One exception: a sum that repeats for every row of the factor before it, such as `a + b` in
        `p * (a + b)`, stays one atom, which has `parts`.
        """
        found: Dim = []
        for term in dim:
            own: Dim = [[]]
            for atom in term:
                parts = self.parts(atom)
                if parts is None:
                    parts = [[self.find(atom)]]
                elif len(parts) > 1 and any(own):
                    parts = [[self.find(atom)]]
                own = [[*before, *part] for before in own for part in parts]
            found += own
        return found

    # ------------------------------------------------------------------------------- what is found

    def fix(self, dim: Dim, reason: Reason) -> None:
        """Tell the rows of a dimension apart. The first reason stays."""
        for atom in self.atoms(dim):
            self._fixed[atom] = self._fixed[atom] or reason

    def unite(self, one: Dim, two: Dim, reason: Reason) -> None:
        """Give two dimensions the same rows; if no division makes them alike, fix both."""
        for _ in range(_MOST_DIVISIONS):
            a, b = self.expand(one), self.expand(two)
            place = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
            if place is None:
                self._rest(a[len(b) :] + b[len(a) :], reason)
                return
            x, y = a[place], b[place]
            m, n = self._rows(x), self._rows(y)
            if m == n:
                done = self._unite_terms(x, y, reason)
            else:
                done = self._cut(x, n) if m > n else self._cut(y, m)
            if not done:
                break
        # No number of divisions makes `a * a` and `a + a` alike, for example.
        self.fix(one, reason)
        self.fix(two, reason)

    def _rest(self, dim, reason):
        if self.rows(dim) > 0:  # unequal sizes occur in no program
            self.fix(dim, reason)

    def _unite_terms(self, one, two, reason):
        """Make two products of one size alike, one step at a time; False if that is impossible."""
        place = next(i for i, (x, y) in enumerate(zip(one, two)) if x != y)
        a, b = one[place], two[place]
        m, n = self._size[a], self._size[b]
        if m == n:
            self._merge(a, b, reason)
        elif self._parts[a if m > n else b] is not None:
            return False
        elif m > n and n and m % n == 0:
            self._divide(a, [[self.new(n), self.new(m // n)]])
        elif n > m and m and n % m == 0:
            self._divide(b, [[self.new(m), self.new(n // m)]])
        else:
            return False
        return True

    def _merge(self, a, b, reason):
        """Merge two atoms of one size, and their parts."""
        if self._parts[a] is None:
            a, b = b, a
        parts, other = self._parts[a], self._parts[b]
        self._parent[b] = a
        why = self._fixed[a] or self._fixed[b]
        self._fixed[a] = why
        if parts is not None and other is not None:
            self.unite(parts, other, reason)
        if parts is not None and why is not None:
            self.fix(parts, why)

    def _divide(self, atom, parts):
        reason = self._fixed[atom]
        self._parts[atom] = parts
        if reason is not None:
            self.fix(parts, reason)

    def _cut(self, term, rows):
        """Divide a product after `rows` rows; False if the cut falls inside a row of a factor."""
        rest = self._rows(term[1:])
        if not term or not rest or rows % rest or not 0 < rows < self._rows(term):
            return False
        if self.parts(term[0]) is not None:
            return False
        first, n = term[0], rows // rest
        one = lambda size: [] if size == 1 else [self.new(size)]
        self._divide(first, [one(n), one(self._size[first] - n)])
        return True

    def cut(self, dim: Dim, ends: Sequence[int], reason: Reason) -> list[Dim]:
        """Cut a dimension after each of `ends` (ascending, the last is its end) into parts.

        A part that does not end with a row of a product becomes a new dimension, which is fixed.
        """
        for end in ends:
            while not self._ends_at(dim, end):
                place, before = self._term_at(dim, end)
                term = self.expand(dim)[place]
                if not self._cut(term, end - before):
                    self.fix(dim, reason)
                    starts = [0, *ends[:-1]]
                    return [self.dim(b - a, reason) for a, b in zip(starts, ends)]
        parts, at, terms = [], 0, self.expand(dim)
        for end in ends:
            part: Dim = []
            while at < end:
                part.append(terms[0])
                at += self._rows(terms[0])
                terms = terms[1:]
            parts.append(part)
        return parts

    def _ends_at(self, dim, end):
        return end == 0 or end in self._ends(dim)

    def _ends(self, dim):
        ends, total = [], 0
        for term in self.expand(dim):
            total += self._rows(term)
            ends.append(total)
        return ends

    def _term_at(self, dim, end):
        """The term that contains a row, and the number of rows before the term."""
        before = 0
        for place, total in enumerate(self._ends(dim)):
            if total > end:
                return place, before
            before = total
        raise AssertionError(end)
