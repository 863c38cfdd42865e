"""Rules of primitives that move entries: shapes, parts, concatenations."""

import numpy as np

from psjax.axes._entries import shared_points
from psjax.axes._walk import Value


def shape_of(rows, step, i=0):
    return tuple(rows(d) for d in step.outs[i].dims)


def shape_params(rows, step):
    return {**step.eqn.params, "shape": shape_of(rows, step)}


def broadcast(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    out = walk.value(v.aval)
    for d, to in enumerate(step.eqn.params["broadcast_dimensions"]):
        if x.shape[d] == out.shape[to]:
            out.dims[to] = x.dims[d]
    out.points = x.points
    return [out]


def reshape_params(rows, step):
    return {**step.eqn.params, "new_sizes": shape_of(rows, step)}


def reshape(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    out = Value(v.aval.shape, [], x.points)
    for ins, new in _groups(x.shape, out.shape):
        old = [x.dims[d] for d in ins]
        if len(ins) == len(new) == 1:
            out.dims += old
            continue
        made = [walk.atoms.dim(out.shape[d]) for d in new]
        one, two = walk.atoms.product(old), walk.atoms.product(made)
        walk.unite(one, two, step)
        out.dims += made
    return [out]


def _groups(old, new):
    """Runs of dimensions of equal products, as `(dimensions of old, dimensions of new)`."""
    if 0 in old:
        return [(range(len(old)), range(len(new)))]
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        a, b = i, j
        m = old[i] if i < len(old) else 1
        n = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while m != n:
            if m < n:
                m, i = m * old[i], i + 1
            else:
                n, j = n * new[j], j + 1
        groups.append((range(a, i), range(b, j)))
    return groups


def transpose(walk, step):
    x, order = step.ins[0], step.eqn.params["permutation"]
    shape = tuple(x.shape[d] for d in order)
    return [Value(shape, [x.dims[d] for d in order], x.points)]


def squeeze(walk, step):
    x, away = step.ins[0], step.eqn.params["dimensions"]
    kept = [d for d in range(len(x.shape)) if d not in away]
    shape = tuple(x.shape[d] for d in kept)
    return [Value(shape, [x.dims[d] for d in kept], x.points, x.literal)]


def rev(walk, step):
    x = step.ins[0]
    reason = walk.reason("its order is reversed", step)
    walk.fix([x.dims[d] for d in step.eqn.params["dimensions"]], reason)
    return [Value(x.shape, x.dims)]


def tile(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    again = [walk.atoms.dim(n) for n in step.eqn.params["reps"]]
    return [Value(v.aval.shape, [walk.atoms.product([r, d]) for r, d in zip(again, x.dims)])]


def part_of(walk, step, dim, size, start, stop, stride=1):
    """The rows from start to stop of a dimension."""
    reason = walk.reason("rows are picked by their place", step)
    if (start, stop, stride) == (0, size, 1):
        return dim
    rows = -(-(stop - start) // stride)
    if stride == 1:
        ends = sorted({start, stop, size} - {0})
        parts = walk.atoms.cut(dim, ends, reason)
        return parts[ends.index(stop)] if stop > start else walk.atoms.dim(0)
    if size % stride == 0 and start < stride and stop > size - stride:
        kept, place = walk.atoms.dim(size // stride), walk.atoms.dim(stride, reason)
        walk.unite(walk.atoms.product([kept, place]), dim, step)
        return kept
    walk.fix([dim], reason)
    return walk.atoms.dim(rows, reason)


def place_of(rows, atoms, dim, start):
    """Where a row of the whole dimension lies in the narrower one."""
    before = new = 0
    for term in atoms.expand(dim):
        if before + atoms.rows([term]) > start:
            break
        before, new = before + atoms.rows([term]), new + rows([term])
    return new + start - before


def slice_params(rows, step):
    params, x = dict(step.eqn.params), step.ins[0]
    strides = params["strides"] or (1,) * len(x.shape)
    starts, limits = [], []
    for d, (start, stride) in enumerate(zip(params["start_indices"], strides)):
        if stride == 1:
            starts.append(place_of(rows, rows.atoms, x.dims[d], start))
            limits.append(starts[-1] + rows(step.outs[0].dims[d]))
        else:
            starts.append(start)
            limits.append(start + stride * (rows(step.outs[0].dims[d]) - 1) + 1)
    return {**params, "start_indices": tuple(starts), "limit_indices": tuple(limits)}


def slice_rows(walk, step):
    x, (v,), p = step.ins[0], step.eqn.outvars, step.eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    bounds = zip(x.dims, x.shape, p["start_indices"], p["limit_indices"], strides)
    return [Value(v.aval.shape, [part_of(walk, step, *own) for own in bounds], x.points)]


def split_params(rows, step):
    axis = step.eqn.params["axis"]
    return {**step.eqn.params, "sizes": tuple(rows(x.dims[axis]) for x in step.outs)}


def split(walk, step):
    x, axis = step.ins[0], step.eqn.params["axis"]
    ends = np.cumsum(step.eqn.params["sizes"]).tolist()
    parts = walk.atoms.cut(x.dims[axis], ends, walk.reason("it is split", step))
    outs = []
    for part, v in zip(parts, step.eqn.outvars):
        outs.append(Value(v.aval.shape, [*x.dims[:axis], part, *x.dims[axis + 1 :]], x.points))
    return outs


def unstack(walk, step):
    x, axis = step.ins[0], step.eqn.params["axis"]
    walk.fix([x.dims[axis]], walk.reason("its rows are taken one by one", step))
    dims = [*x.dims[:axis], *x.dims[axis + 1 :]]
    return [Value(v.aval.shape, dims) for v in step.eqn.outvars]


def concatenate(walk, step):
    axis, (v,) = step.eqn.params["dimension"], step.eqn.outvars
    first = step.ins[0]
    for x in step.ins[1:]:
        for d in range(len(x.shape)):
            if d != axis:
                walk.unite(first.dims[d], x.dims[d], step)
    dims = list(first.dims)
    dims[axis] = [term for x in step.ins for term in x.dims[axis]]
    return [Value(v.aval.shape, dims, shared_points(walk, step, step.ins))]


def pad(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    reason = walk.reason("it is padded", step)
    dims = []
    for d, (low, high, inside) in enumerate(step.eqn.params["padding_config"]):
        if inside or low < 0 or high < 0:
            walk.fix([x.dims[d]], reason)
            dims.append(walk.atoms.dim(v.aval.shape[d], reason))
            continue
        ends = [walk.atoms.dim(n, reason) if n else [] for n in (low, high)]
        dims.append([*ends[0], *x.dims[d], *ends[1]])
    return [Value(v.aval.shape, dims)]
