"""Gather and scatter of one leaf, by one advanced index.

`indices` maps axis names to int arrays: `[*lead, m]` keeps the axis, `[*lead]` takes one row and
drops the axis. `lead` is the number of leading dimensions for elements, 0 or 1. `sizes` maps axis
names to their sizes. A leaf with dimensions that are products or concatenations of axes
(`_notation`) is cut into pieces without either, and joined again.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool

from psjax._notation import Layout, is_plain, names
from psjax._types import AnyArray, Indices, Rows, Sizes


def selected(spec: P, indices: Rows) -> bool:
    """Whether a leaf has an axis that is indexed."""
    return any(name in indices for name in names(spec))


def gather_leaf(x: Array, spec: P, indices: Indices, lead: int, sizes: Sizes):
    """`[...] -> [*lead, ...]`; a leaf without indexed axes is returned as it is, without `lead`."""
    if is_plain(spec) or not selected(spec, indices):
        return _gather(x, spec, indices, lead)
    layout = Layout(spec, x.ndim, sizes)
    shape = next(index.shape[:lead] for name, index in indices.items() if name in names(spec))

    def seen(piece: P, y: Array):
        y = _gather(y, piece, indices, lead)
        return y if selected(piece, indices) else jnp.broadcast_to(y, (*shape, *y.shape))

    parts = [seen(piece, y) for piece, y in zip(layout.pieces, layout.cut(x))]
    return layout.join_seen(parts, indices, lead)


def scatter_leaf(
    total: Array,
    y: Array,
    spec: P,
    indices: Indices,
    valid: Bool[AnyArray, "..."],
    sizes: Sizes,
    distinct: Sequence[str] = (),
):
    """Add `y [*lead, ...]` where `valid [*lead]`: the transpose of `gather_leaf`.

    `distinct` names axes of which no element has a row twice. It changes the speed, not the result.
    """
    if is_plain(spec) or not selected(spec, indices):
        return _scatter(total, y, spec, indices, valid, distinct)
    layout = Layout(spec, total.ndim, sizes)
    parts = zip(layout.cut(total), layout.cut_seen(y, indices, valid.ndim), layout.pieces)
    return layout.join([_scatter(t, x, piece, indices, valid, distinct) for t, x, piece in parts])


def merge_leaf(y: Array, spec: P, indices: Rows, owners: Rows, places: Rows, sizes: Sizes):
    """`[E, ...] -> [...]` where no entry has two holders; 0 where it has none.

    On a partition, this equals `scatter_leaf` into zeros, but gathers by the inverse permutation,
    because scattering columns takes 10 times as long. `owners` maps each axis to the element that
    holds a row, or -1; `places` maps it to the place of the row in that element.
    """
    if is_plain(spec):
        return _merge(y, spec, owners, places)
    layout = Layout(spec, y.ndim - 1, sizes)
    parts = zip(layout.cut_seen(y, indices, 1), layout.pieces)
    return layout.join([_merge(x, piece, owners, places) for x, piece in parts])


def held_entries(shape: tuple[int, ...], spec: P, owners: Rows, sizes: Sizes):
    """Whether one element holds an entry: its rows on all axes have the same owner."""
    if is_plain(spec):
        return _held(len(shape), spec, owners)
    layout = Layout(spec, len(shape), sizes)
    ones = layout.cut(jnp.ones(shape, bool))
    held = (_held(len(piece), piece, owners) for piece in layout.pieces)
    return layout.join([jnp.broadcast_to(h, x.shape) for h, x in zip(held, ones)])


# ------------------------------------------------------------- leaves whose dimensions are one axis


def _layout(spec: P, indices: Rows, lead: int):
    """Indexed dimensions, their indices as an open mesh, and where dimensions that stay belong."""
    dims = [d for d, name in enumerate(spec or ()) if name in indices]
    kept = [d for d in dims if indices[spec[d]].ndim > lead]
    mesh = []
    for d in dims:
        index = indices[spec[d]]
        shape = [index.shape[lead] if k == d else 1 for k in kept]
        mesh.append(index.reshape((*index.shape[:lead], *shape)))
    # After the advanced index: [*lead, *kept, *rest]. Find where the kept axes were originally.
    dropped = [d for d in dims if d not in kept]
    home = [lead + d - sum(x < d for x in dropped) for d in kept]
    return dims, tuple(mesh), home


def _gather(x: Array, spec: P, indices: Rows, lead: int):
    dims, mesh, home = _layout(spec, indices, lead)
    if not dims:
        return x
    y = jnp.moveaxis(x, dims, range(len(dims)))
    if len(dims) == 1:
        fill = None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 0
        y = y.at[mesh].get(mode="fill" if fill == 0 else "clip", fill_value=fill)
    else:  # one mask per axis: one mask for all axes together takes 5 times as long
        y = y.at[mesh].get(mode="clip")
        for index, size in zip(mesh, (x.shape[d] for d in dims)):
            real = (index < size).reshape((*index.shape, *[1] * (y.ndim - index.ndim)))
            y = jnp.where(real, y, jnp.zeros((), y.dtype))
    return jnp.moveaxis(y, range(lead, lead + len(home)), home)


def _scatter(
    total: Array,
    y: Array,
    spec: P,
    indices: Rows,
    valid: Bool[AnyArray, "..."],
    distinct: Sequence[str],
):
    lead = valid.ndim
    y = jnp.where(valid.reshape((*valid.shape, *[1] * (y.ndim - lead))), y, 0).astype(total.dtype)
    dims, mesh, home = _layout(spec, indices, lead)
    if not dims:
        return total + jnp.sum(y, axis=tuple(range(lead)), dtype=total.dtype)
    if lead and _is_dense(total.shape, dims, home, spec, indices, distinct):
        for e in range(len(valid)):
            total = total + _spread(y[e], spec, {n: i[e] for n, i in indices.items()}, total.shape)
        return total
    y = jnp.moveaxis(y, home, range(lead, lead + len(home)))
    moved = jnp.moveaxis(total, dims, range(len(dims))).at[mesh].add(y, mode="drop")
    return jnp.moveaxis(moved, range(len(dims)), dims)


def _is_dense(
    shape: tuple[int, ...],
    dims: Sequence[int],
    home: Sequence[int],
    spec: P,
    indices: Rows,
    distinct: Sequence[str],
):
    """Whether few elements hold large parts of a leaf: then gathers are faster than a scatter."""
    # On one core, for a leaf [2048, 2048] in float32 and 4 elements: 2 ms by gathers and 19 ms by
    # a scatter if each has half the rows; 9 and 34 ms if half the rows and half the columns; 1.2
    # and 2.3 ms if a quarter of the rows.
    E = len(indices[spec[dims[0]]])
    share = 1.0
    for d in dims:
        share *= indices[spec[d]].shape[-1] / shape[d]
    kept = len(home) == len(dims) and all(spec[d] in distinct for d in dims)
    return kept and E <= 16 and share >= 0.2


def _spread(y: Array, spec: P, indices: Rows, shape: tuple[int, ...]):
    """The whole leaf with the entries of one element and 0 elsewhere, by gathers."""
    held = jnp.ones((), bool)
    for d in (d for d, name in enumerate(spec) if name in indices):
        index, size = indices[spec[d]], shape[d]
        m = index.shape[0]
        places = (
            jnp.full(size, m, jnp.int32).at[index].set(jnp.arange(m, dtype=jnp.int32), mode="drop")
        )
        y = jnp.take(y, places, axis=d, mode="clip")
        along = (places < m).reshape([-1 if k == d else 1 for k in range(len(shape))])
        held = held & along
    return jnp.where(held, y, jnp.zeros((), y.dtype))


def _merge(y: Array, spec: P, owners: Rows, places: Rows):
    dims = [d for d, name in enumerate(spec) if name in owners]
    axes = [spec[d] for d in dims]
    first, *rest = dims
    y = jnp.moveaxis(y, first + 1, 1)
    rows = owners[axes[0]] * y.shape[1] + places[axes[0]]  # -m for a row that nobody holds
    y = y.reshape(-1, *y.shape[2:]).at[rows].get(mode="clip")
    y = jnp.moveaxis(y, 0, first)
    for d, name in zip(rest, axes[1:]):
        y = jnp.take(y, places[name], axis=d, mode="clip")
    return jnp.where(_held(y.ndim, spec, owners), y, jnp.zeros((), y.dtype))


def _held(ndim: int, spec: P, owners: Rows):
    dims = [d for d, name in enumerate(spec) if name in owners]
    along = lambda d: owners[spec[d]].reshape(*[-1 if k == d else 1 for k in range(ndim)])
    held = along(dims[0]) >= 0
    for d in dims[1:]:
        held = held & (along(d) == along(dims[0]))
    return held
