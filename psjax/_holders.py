"""Who holds an entry of the parameters: sums over the holders, and how many there are."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int32

from psjax._leaf import gather_leaf, held_entries, merge_leaf, scatter_leaf, selected
from psjax._notation import terms
from psjax._types import AnyArray, AxisName, Rows, Sizes, Struct


class Holders(NamedTuple):
    """The elements that count, and who of them holds each row of the axes that are divided.

    Attributes:
      indices: as of a `Selection`.
      valid: `bool[E]`, or `bool[]` of one element.
      sizes: of the named axes.
      disjoint: names of axes no row of which two elements hold.
      distinct: names of axes no row of which an element holds twice.
      owners: of each of `disjoint` the element that holds a row, -1 for none: `int32[size]`.
      places: the row's place in that element.
    """

    indices: Rows
    valid: Bool[AnyArray, "..."]
    sizes: Sizes
    disjoint: tuple[str, ...]
    distinct: tuple[str, ...]
    owners: dict[str, Int32[Array, "..."]]
    places: dict[str, Int32[Array, "..."]]

    def add(self, total: Array, y: Array, spec: P):
        """Add what the elements hold of a leaf, `y [E, ...]`, to `total [...]`."""
        if self.valid.ndim and self.alone(spec):
            held = merge_leaf(y, spec, self.indices, self.owners, self.places, self.sizes)
            return total + held.astype(total.dtype)
        return scatter_leaf(total, y, spec, self.indices, self.valid, self.sizes, self.distinct)

    def number(self, x: Struct, spec: P):
        """How many hold each entry of a leaf, int32, of size 1 where it is the same along an axis.

        The axes of a leaf that are not selected have size 1.
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
        """Whether no entry of such a leaf can have two holders."""
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
