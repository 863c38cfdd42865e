"""Gather and scatter of one leaf, by one advanced index.

`indices` maps axis names to int arrays `[*lead, m]`, which keep the axis, or `[*lead]`, which take
one row and drop it; `lead` is 0 or 1 axes of elements.
"""

import jax
import jax.numpy as jnp


def _layout(spec, indices, lead):
    """Dimensions that are indexed, their indices as an open mesh, where the kept ones return."""
    dims = [d for d, name in enumerate(spec or ()) if name in indices]
    kept = [d for d in dims if indices[spec[d]].ndim > lead]
    mesh = []
    for d in dims:
        index = indices[spec[d]]
        shape = [index.shape[lead] if k == d else 1 for k in kept]
        mesh.append(index.reshape((*index.shape[:lead], *shape)))
    # After the advanced index: [*lead, *kept, *rest]. Where do the kept axes stand originally?
    dropped = [d for d in dims if d not in kept]
    home = [lead + d - sum(x < d for x in dropped) for d in kept]
    return dims, tuple(mesh), home


def gather_leaf(x, spec, indices, lead):
    """`[...] -> [*lead, ...]`; a leaf without indexed axes comes back as it is, without `lead`."""
    dims, mesh, home = _layout(spec, indices, lead)
    if not dims:
        return x
    y = jnp.moveaxis(x, dims, range(len(dims)))
    if len(dims) == 1:
        fill = None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 0
        y = y.at[mesh].get(mode="fill" if fill == 0 else "clip", fill_value=fill)
    else:  # one mask an axis: filling by a mask of all axes at once takes 5 times as long
        y = y.at[mesh].get(mode="clip")
        for index, size in zip(mesh, (x.shape[d] for d in dims)):
            real = (index < size).reshape(*index.shape, *[1] * (y.ndim - index.ndim))
            y = jnp.where(real, y, jnp.zeros((), y.dtype))
    return jnp.moveaxis(y, range(lead, lead + len(home)), home)


def scatter_leaf(total, y, spec, indices, valid):
    """Add `y [*lead, ...]` where `valid [*lead]`; the transpose of `gather_leaf`."""
    lead = valid.ndim
    y = jnp.where(valid.reshape(*valid.shape, *[1] * (y.ndim - lead)), y, 0).astype(total.dtype)
    dims, mesh, home = _layout(spec, indices, lead)
    if not dims:
        return total + jnp.sum(y, axis=tuple(range(lead)), dtype=total.dtype)
    y = jnp.moveaxis(y, home, range(lead, lead + len(home)))
    moved = jnp.moveaxis(total, dims, range(len(dims))).at[mesh].add(y, mode="drop")
    return jnp.moveaxis(moved, range(len(dims)), dims)


def merge_leaf(y, spec, owners, places):
    """`[E, ...] -> [...]` where no entry has two holders, and which entries have one.

    The same as `scatter_leaf` into zeros on a partition, by gathers from the inverse permutation:
    scattering columns takes 10 times as long. `owners` and `places` are those of `_owners`.
    """
    dims = [d for d, name in enumerate(spec) if name in owners]
    names = [spec[d] for d in dims]
    first, *rest = dims
    y = jnp.moveaxis(y, first + 1, 1)
    rows = owners[names[0]] * y.shape[1] + places[names[0]]  # -m for a row that nobody holds
    y = y.reshape(-1, *y.shape[2:]).at[rows].get(mode="clip")
    y = jnp.moveaxis(y, 0, first)
    for d, name in zip(rest, names[1:]):
        y = jnp.take(y, places[name], axis=d, mode="clip")
    held = held_entries(y.ndim, spec, owners)
    return jnp.where(held, y, 0), held


def held_entries(ndim, spec, owners):
    """Which entries of a leaf one element holds: its rows on every axis have the same owner."""
    dims = [d for d, name in enumerate(spec) if name in owners]
    along = lambda d: owners[spec[d]].reshape(*[-1 if k == d else 1 for k in range(ndim)])
    held = along(dims[0]) >= 0
    for d in dims[1:]:
        held = held & (along(d) == along(dims[0]))
    return held
