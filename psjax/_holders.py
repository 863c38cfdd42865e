"""The holders of an entry, that is the elements that have it: sums over them, and their number."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int32

from psjax._leaf import gather_leaf, held_entries, merge_leaf, scatter_leaf, selected
from psjax._notation import terms
from psjax._types import AnyArray, AxisName, Rows, Sizes, Struct


class Holders(NamedTuple):
    """Some elements, and which of them holds each row of the divided axes.

    Attributes:
      indices: as of a `Selection`.
      valid: `bool[E]`, or `bool[]` of one element.
      sizes: of the named axes.
      disjoint: the axes of which no two elements share a row.
      distinct: the axes of which no element has a row twice.
      owners: per axis of `disjoint`, the element that holds each row, or -1: `int32[size]`.
      places: the place of the row in that element.
    """

    indices: Rows
    valid: Bool[AnyArray, "..."]
    sizes: Sizes
    disjoint: tuple[str, ...]
    distinct: tuple[str, ...]
    owners: dict[str, Int32[Array, "..."]]
    places: dict[str, Int32[Array, "..."]]

    def add(self, total: Array, y: Array, spec: P):
        """Add the elements' entries of a leaf, `y [E, ...]`, to `total [...]`."""
        if self.valid.ndim and self.alone(spec):
            held = merge_leaf(y, spec, self.indices, self.owners, self.places, self.sizes)
            return total + held.astype(total.dtype)
        return scatter_leaf(total, y, spec, self.indices, self.valid, self.sizes, self.distinct)

    def number(self, x: Struct, spec: P):
        """The number of holders of each entry of a leaf, int32.

        An axis of the leaf that is not selected has size 1 in the result.
        """
        if self.alone(spec):
            return held_entries(x.shape, spec, self.owners, self.sizes).astype(jnp.int32)
        dims = [*(spec or ()), *[None] * (len(x.shape) - len(spec or ()))]
        shape = [n if selected(P(d), self.indices) else 1 for n, d in zip(x.shape, dims)]
        ones = gather_leaf(jnp.ones(shape, jnp.int32), spec, self.indices, 1, self.sizes)
        if not selected(spec, self.indices):
            ones = jnp.broadcast_to(ones, (len(self.valid), *ones.shape))
        zeros = jnp.zeros(shape, jnp.int32)
        return scatter_leaf(zeros, ones, spec, self.indices, self.valid, self.sizes, self.distinct)

    def alone(self, spec: P) -> bool:
        """Whether no entry of a leaf with these axes can have two holders."""
        if not self.disjoint:
            return False
        parts = [[]]
        for entry in spec or ():
            parts = [[*part, *term] for part in parts for term in terms(entry) or ((),)]
        own = lambda part: {f for f in part if f in self.indices}
        return all(own(part) and own(part) <= set(self.disjoint) for part in parts)


def holders_of(
    indices: Rows,
    valid: Bool[AnyArray, "..."],
    sizes: Sizes,
    disjoint: tuple[str, ...],
    distinct: tuple[str, ...],
    axis_name: AxisName | None = None,
) -> Holders:
    """`Holders` of some elements; with `axis_name`, elements are counted over all devices."""
    owners, places = {}, {}
    for name in disjoint if valid.ndim else ():
        index, size = jnp.asarray(indices[name]), sizes[name]
        element = jnp.arange(len(valid), dtype=jnp.int32)
        if axis_name is not None:
            element = element + len(valid) * jax.lax.axis_index(axis_name)
        index = jnp.where(valid[:, None], index, jnp.full_like(index, size))
        place = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
        nobody = jnp.full(size, -1, jnp.int32)
        owner = nobody.at[index].set(jnp.broadcast_to(element[:, None], index.shape), mode="drop")
        owners[name] = owner if axis_name is None else jax.lax.pmax(owner, axis_name)
        places[name] = jnp.zeros(size, jnp.int32).at[index].set(place, mode="drop")
    return Holders(indices, valid, sizes, disjoint, distinct, owners, places)
