"""The notation of axes: what an entry of a `PartitionSpec` says about a dimension.

A dimension is `None` (no axis), the name of an axis, a product of axes in row-major order, or a
concatenation of such products, written as a string:

- `"hidden"`: one axis;
- `"9*hidden"`: 9 positions with all neurons in each, such as flattened channels of a convolution;
- `"3*heads*dim"`: a fused query-key-value kernel;
- `"hidden_1+hidden_2"`, `"heads*dim+2*groups*dim"`: parts that follow one another.

A number is the size of an axis without a name.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from psjax._types import AnyArray, Rows, Spec

Factor: TypeAlias = str | int | None
Term: TypeAlias = tuple[Factor, ...]


@functools.lru_cache(maxsize=4096)
def terms(entry: str | None) -> tuple[tuple[str | int, ...], ...]:
    """The terms of a dimension, each a tuple of factors: names, and numbers; `()` for None.

    Raises:
      ValueError: a factor is empty, or a number is not positive.
    """
    if entry is None:
        return ()
    found = []
    for term in str(entry).split("+"):
        factors = [x.strip() for x in term.split("*")]
        number = lambda x: x[0] in "-.0123456789"
        if not all(factors) or any(number(x) and (not x.isdigit() or int(x) < 1) for x in factors):
            msg = f"{entry!r} does not describe a dimension; pass 'a', '9*a', 'a+b' or 'a*b+2*c'."
            raise ValueError(msg)
        found.append(tuple(int(x) if x.isdigit() else x for x in factors))
    return tuple(found)


def entries(spec: Spec, ndim: int) -> list[str | None]:
    """One entry per dimension of a leaf: those of its spec, None for the rest."""
    return [*(spec or ()), *[None] * (ndim - len(spec or ()))]


def names(spec: Spec) -> tuple[str, ...]:
    """The names of the axes of a leaf, in order and without repeats."""
    found = [x for entry in spec or () for term in terms(entry) for x in term]
    return tuple(dict.fromkeys(x for x in found if isinstance(x, str)))


def is_plain(spec: Spec) -> bool:
    """Whether every dimension is one axis or none."""
    return all(entry is None or terms(entry) == ((entry,),) for entry in spec or ())


def size_of(entry: str, sizes: Mapping[str, int]) -> int | None:
    """The size of a dimension; None where the size of one of its axes is not known."""
    total = 0
    for term in terms(entry):
        factors = [x if isinstance(x, int) else sizes.get(x) for x in term]
        if None in factors:
            return None
        total += math.prod(x for x in factors if x is not None)
    return total


def solved(entry: str, size: int, sizes: Mapping[str, int]) -> dict[str, int] | None:
    """`{name: size}` of the one axis of a dimension that has no size yet.

    `{}` if all sizes are known, and None if the size is not determined. The size is 0 if none fits.
    """
    unknown = {x for term in terms(entry) for x in term if isinstance(x, str) and x not in sizes}
    if len(unknown) != 1:
        return None if unknown else {}
    (name,) = unknown
    if any(term.count(name) > 1 for term in terms(entry)):
        return None
    at = lambda n: size_of(entry, {**sizes, name: n}) or 0
    slope = at(2) - at(1)
    rest = size - at(1)
    return {name: 1 + rest // slope if slope and rest % slope == 0 and rest >= 0 else 0}


def mask_along(entry: str | None, masks: Mapping[str, jax.Array], lengths: Mapping[str, int]):
    """A mask of a dimension from masks of its axes; None if none of them has a mask.

    Args:
      entry: of the dimension.
      masks: `{axis name: bool[rows]}`.
      lengths: number of rows of the other axes.
    """
    if not any(factor in masks for term in terms(entry) for factor in term):
        return None
    parts = []
    for term in terms(entry):
        part = jnp.ones(1, bool)
        for factor in term:
            if isinstance(factor, str) and factor in masks:
                own = masks[factor]
            else:
                own = jnp.ones(factor if isinstance(factor, int) else lengths[factor], bool)
            part = (part[:, None] & own[None]).reshape(-1)
        parts.append(part)
    return jnp.concatenate(parts)


class Layout:
    """A leaf with products or concatenations of axes, as pieces that have neither.

    Args:
      spec: of the leaf.
      ndim: of the leaf.
      sizes: of the named axes.

    Attributes:
      pieces: the `PartitionSpec` of every piece.
    """

    def __init__(self, spec: Spec, ndim: int, sizes: Mapping[str, int]):
        self.terms = [terms(entry) or ((None,),) for entry in entries(spec, ndim)]
        self.sizes = sizes
        self.chosen = _every(self.terms)
        name = lambda factor: factor if isinstance(factor, str) else None
        self.pieces = [P(*(name(f) for term in own for f in term)) for own in self.chosen]

    def cut(self, x: AnyArray):
        """Cut the whole leaf, or a mask of it, into pieces with one dimension per factor.

        A dimension of `x` of size 1 stands for all its rows.
        """
        full = [self._full(d, n) for d, n in enumerate(x.shape)]
        x = jnp.broadcast_to(x, full)
        shape = lambda d, term, n: [n] if len(term) == 1 else [self._size(f) for f in term]
        lengths = [self._lengths(d, n) for d, n in enumerate(x.shape)]
        return self._cut(x, lengths, 0, shape)

    def join(self, pieces: Sequence[Array]):
        """The whole leaf from its pieces."""
        flat = [self._flat(x, own) for x, own in zip(pieces, self.chosen)]
        return self._concatenate(flat, [len(t) for t in self.terms], 0)

    def cut_seen(self, y: Array, indices: Rows, lead: int):
        """The pieces of what an element sees, `[*lead, ...]`."""
        of = self._seen_dims(indices, lead)
        lengths, at = [], lead
        for seen in of:
            if seen is None:
                lengths.append(None)
                continue
            lengths.append(seen if len(seen) > 1 else [y.shape[at]])
            at += 1

        def shape(d: int, term: Term, n: int) -> list[int]:
            alone = len(self.terms[d]) == len(term) == 1  # may have size 1, for all rows
            return [n] if alone else self._seen_shape(term, indices, lead, n)

        return self._cut(y, lengths, lead, shape)

    def join_seen(self, pieces: Sequence[Array], indices: Rows, lead: int):
        """What an element sees of the whole leaf, from what it sees of the pieces."""
        flat = []
        for y, chosen in zip(pieces, self.chosen):
            shape, at = [], lead
            for d, term in enumerate(chosen):
                kept = sum(not _dropped(f, indices, lead) for f in term)
                n = math.prod(y.shape[at : at + kept])
                at += kept
                if kept or len(self.terms[d]) > 1:
                    shape.append(n)
            flat.append(y.reshape(*y.shape[:lead], *shape))
        of = self._seen_dims(indices, lead)
        counts = [len(t) for t, seen in zip(self.terms, of) if seen is not None]
        return self._concatenate(flat, counts, lead)

    def rows(self, x: AnyArray, axis: str):
        """The leaf as rows of one axis, which every piece has once: `[size, numbers]`."""
        flat = []
        for y, piece in zip(self.cut(x), self.pieces):
            y = jnp.moveaxis(y, tuple(piece).index(axis), 0)
            flat.append(y.reshape(y.shape[0], -1))
        return jnp.concatenate(flat, axis=1)

    def of_rows(self, rows: Shaped[AnyArray, "size numbers"], axis: str, shape: tuple[int, ...]):
        """The leaf of the given shape from its rows: the inverse of `rows`."""
        ends, pieces = 0, []
        for own, piece in zip(self.chosen, self.pieces):
            dims = [(f, n) for term, n in zip(own, shape) for f in term]
            full = [n if f is None else self._size(f) for f, n in dims]
            d = tuple(piece).index(axis)
            rest = (*full[:d], *full[d + 1 :])
            start, ends = ends, ends + math.prod(rest)
            pieces.append(jnp.moveaxis(rows[:, start:ends].reshape(-1, *rest), 0, d))
        return self.join(pieces)

    # ----------------------------------------------------------------------------------------

    def _size(self, factor: Factor) -> int:
        return factor if isinstance(factor, int) else self.sizes[str(factor)]

    def _full(self, d: int, n: int):
        own = self.terms[d]
        if own == ((None,),) or (len(own) == 1 and len(own[0]) == 1):
            return n
        return sum(math.prod(self._size(f) for f in term) for term in own)

    def _lengths(self, d: int, n: int):
        if len(self.terms[d]) == 1:
            return [n]
        return [math.prod(self._size(f) for f in term) for term in self.terms[d]]

    def _seen_dims(self, indices: Rows, lead: int) -> list[list[int] | None]:
        """Lengths of the terms of every dimension that an element sees; None if it is dropped."""
        out = []
        for own in self.terms:
            if len(own) == 1 and all(_dropped(f, indices, lead) for f in own[0]):
                out.append(None)
            elif own == ((None,),):
                out.append([0])  # as long as it is
            else:
                out.append([math.prod(self._seen_shape(t, indices, lead, 0)) for t in own])
        return out

    def _seen_shape(self, term: Term, indices: Rows, lead: int, n: int) -> list[int]:
        if term == (None,):
            return [n]
        kept = [f for f in term if not _dropped(f, indices, lead)]
        return [
            indices[f].shape[lead] if isinstance(f, str) and f in indices else self._size(f)
            for f in kept
        ]

    def _cut(
        self,
        x: Array,
        lengths: Sequence[Sequence[int] | None],
        lead: int,
        shape: Callable[[int, Term, int], Sequence[int]],
    ):
        parts = [(x, [])]
        axis = lead
        for d, own in enumerate(lengths):
            if own is None:
                parts = [(x, [*s, []]) for x, s in parts]
                continue
            divided = []
            for x, shapes in parts:
                start = 0
                for term, n in zip(self.terms[d], own):
                    rows = (slice(None),) * axis + (slice(start, start + n),)
                    one = x if len(own) == 1 else x[rows]
                    divided.append((one, [*shapes, shape(d, term, n)]))
                    start += n
            parts, axis = divided, axis + 1
        return [x.reshape(*x.shape[:lead], *sum(s, [])) for x, s in parts]

    def _flat(self, x: Array, chosen: tuple[Term, ...]):
        shape, at = [], 0
        for term in chosen:
            shape.append(math.prod(x.shape[at : at + len(term)]))
            at += len(term)
        return x.reshape(shape)

    def _concatenate(self, parts: Sequence[Array], counts: Sequence[int], lead: int):
        for d in reversed(range(len(counts))):
            n = counts[d]
            if n > 1:
                groups = [parts[i : i + n] for i in range(0, len(parts), n)]
                parts = [jnp.concatenate(group, axis=lead + d) for group in groups]
        return parts[0]


def _dropped(factor: Factor, indices: Rows, lead: int):
    """Whether an index of one row removes the axis."""
    return isinstance(factor, str) and factor in indices and indices[factor].ndim == lead


def _every(terms_of_dims: Sequence[tuple[Term, ...]]):
    """All choices of one term for each dimension, the last dimension fastest."""
    found = [()]
    for own in terms_of_dims:
        found = [(*chosen, term) for chosen in found for term in own]
    return found
