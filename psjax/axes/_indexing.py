"""Rules of primitives that pick entries by indices, count rows, and rank them."""

import jax
import numpy as np

from psjax.axes._moves import part_of, place_of
from psjax.axes._walk import Value


def _picked(walk, step, dim, index):
    """An index picks rows of a dimension; it may hold row numbers of that dimension."""
    if index.points is not None:
        walk.unite(dim, index.points, step)
    else:
        walk.fix([dim], walk.reason("its rows are picked by data", step))


def gather_params(rows, step):
    x, sizes = step.ins[0], step.eqn.params["slice_sizes"]
    new = [rows(d) if n == full else n for d, n, full in zip(x.dims, sizes, x.shape)]
    return {**step.eqn.params, "slice_sizes": tuple(new)}


def gather(walk, step):
    p, (x, index), (v,) = step.eqn.params, step.ins, step.eqn.outvars
    numbers, sizes = p["dimension_numbers"], p["slice_sizes"]
    out = walk.value(v.aval)
    out.points = x.points
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(x.shape)) if d not in gone]
    reason = walk.reason("its rows are picked by data", step)
    for d, to in zip(kept, numbers.offset_dims):
        if sizes[d] == x.shape[d]:
            out.dims[to] = x.dims[d]
        else:
            walk.fix([x.dims[d], out.dims[to]], reason)
    _index_rows(walk, step, x, index, numbers.start_index_map, sizes)
    rest = [to for to in range(len(out.shape)) if to not in numbers.offset_dims]
    for to, dim in zip(rest, index.dims[:-1]):
        out.dims[to] = dim
    for d, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims):
        walk.unite(x.dims[d], index.dims[i], step)
    return [out]


def _index_rows(walk, step, x, index, indexed, sizes):
    """The dimensions of which an index array picks rows."""
    picked = [d for d in indexed if sizes[d] != x.shape[d] or x.shape[d] == 1]
    if len(indexed) == 1 and picked and sizes[indexed[0]] == 1:
        _picked(walk, step, x.dims[indexed[0]], index)
        return
    walk.unpoint(index, step)
    walk.fix([x.dims[d] for d in picked], walk.reason("its rows are picked by data", step))


def scatter(walk, step):
    x, index, new = step.ins
    p = step.eqn.params["dimension_numbers"]
    walk.unpoint(new, step)
    walk.unpoint(x, step)
    gone = {*p.inserted_window_dims, *p.operand_batching_dims}
    kept = [d for d in range(len(x.shape)) if d not in gone]
    sizes = [1] * len(x.shape)
    reason = walk.reason("its rows are picked by data", step)
    for d, of in zip(kept, p.update_window_dims):
        sizes[d] = new.shape[of]
        if new.shape[of] == x.shape[d]:
            walk.unite(x.dims[d], new.dims[of], step)
        else:
            walk.fix([x.dims[d], new.dims[of]], reason)
    _index_rows(walk, step, x, index, p.scatter_dims_to_operand_dims, sizes)
    rest = [of for of in range(len(new.shape)) if of not in p.update_window_dims]
    for of, dim in zip(rest, index.dims[:-1]):
        walk.unite(new.dims[of], dim, step)
    for d, i in zip(p.operand_batching_dims, p.scatter_indices_batching_dims):
        walk.unite(x.dims[d], index.dims[i], step)
    return [Value(x.shape, x.dims)]


def _starts(narrow, step, places, ins):
    """Where windows begin in the narrower program; a start that is a literal may have moved."""
    rows, x = narrow.rows, step.ins[0]
    sizes = step.outs[0].shape if step.name == "dynamic_slice" else step.ins[1].shape
    found = []
    for d, (place, start) in enumerate(zip(places, ins)):
        if place.literal is not None:
            first = min(max(int(place.literal), 0), x.shape[d] - sizes[d])
            dtype = step.eqn.invars[len(step.ins) - len(places) + d].aval.dtype
            start = np.asarray(place_of(rows, rows.atoms, x.dims[d], first), dtype)
        found.append(start)
    return found


def bind_slice(narrow, step, ins):
    starts = _starts(narrow, step, step.ins[1:], ins[1:])
    return [jax.lax.dynamic_slice(ins[0], starts, narrow.rows.shape(step.outs[0]))]


def bind_update(narrow, step, ins):
    starts = _starts(narrow, step, step.ins[2:], ins[2:])
    return [jax.lax.dynamic_update_slice(ins[0], ins[1], starts)]


def dynamic_slice(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    dims = [
        _window(walk, step, dim, full, n, start)
        for dim, full, n, start in zip(x.dims, x.shape, v.aval.shape, step.ins[1:])
    ]
    return [Value(v.aval.shape, dims, x.points)]


def _window(walk, step, dim, full, n, start):
    """A window of a dimension; its start may be a literal of the program."""
    if n == full:
        return dim
    if start.literal is not None:
        first = min(max(int(start.literal), 0), full - n)
        return part_of(walk, step, dim, full, first, first + n)
    if n == 1:
        _picked(walk, step, dim, start)
        return walk.atoms.dim(1)
    reason = walk.reason("its rows are picked by data", step)
    walk.unpoint(start, step)
    walk.fix([dim], reason)
    return walk.atoms.dim(n, reason)


def dynamic_update_slice(walk, step):
    x, new, *starts = step.ins
    walk.unpoint(x, step)
    walk.unpoint(new, step)
    for d, start in enumerate(starts):
        if x.shape[d] == new.shape[d]:
            walk.unite(x.dims[d], new.dims[d], step)
        else:
            part = _window(walk, step, x.dims[d], x.shape[d], new.shape[d], start)
            walk.unite(part, new.dims[d], step)
    return [Value(x.shape, x.dims)]


def count_rows(walk, step):
    out = walk.value(step.eqn.outvars[0].aval)
    out.points = out.dims[step.eqn.params["dimension"]]
    return [out]


def argmax(walk, step):
    x, (axis,) = step.ins[0], step.eqn.params["axes"]
    kept = [d for d in range(len(x.shape)) if d != axis]
    shape = tuple(x.shape[d] for d in kept)
    return [Value(shape, [x.dims[d] for d in kept], x.dims[axis])]


def top_k(walk, step):
    x, outs = step.ins[0], step.eqn.outvars
    axis = step.eqn.params.get("axis", -1) % len(x.shape)
    ranks = walk.atoms.dim(outs[0].aval.shape[axis], walk.reason("its rows are ranks", step))
    dims = [*x.dims[:axis], ranks, *x.dims[axis + 1 :]]
    return [Value(outs[0].aval.shape, dims), Value(outs[1].aval.shape, dims, x.dims[axis])]


def sort_rows(walk, step):
    axis, keys = step.eqn.params["dimension"], step.eqn.params["num_keys"]
    for x in step.ins[:keys]:
        walk.unpoint(x, step)
    for x in step.ins[1:]:
        walk.unite_all(step.ins[0], x, step)
    walk.fix([step.ins[0].dims[axis]], walk.reason("it is sorted", step))
    return [Value(x.shape, x.dims, x.points) for x in step.ins]
