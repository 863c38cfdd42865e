"""Rules of sums, products and random numbers."""

from psjax.axes._moves import shape_of
from psjax.axes._walk import Value


def reduce_rows(walk, step):
    x, axes = step.ins[0], step.eqn.params["axes"]
    kept = [d for d in range(len(x.shape)) if d not in axes]
    return [Value(tuple(x.shape[d] for d in kept), [x.dims[d] for d in kept])]


def cumulative(walk, step):
    x = step.ins[0]
    walk.fix([x.dims[step.eqn.params["axis"]]], walk.reason("it is accumulated in order", step))
    return [Value(x.shape, x.dims)]


def dot(walk, step):
    (left, right), (left_batch, right_batch) = step.eqn.params["dimension_numbers"]
    a, b = step.ins
    for i, j in [*zip(left, right), *zip(left_batch, right_batch)]:
        walk.unite(a.dims[i], b.dims[j], step)
    free = lambda x, *gone: [d for i, d in enumerate(x.dims) if i not in (*gone[0], *gone[1])]
    dims = [a.dims[i] for i in left_batch]
    dims += free(a, left, left_batch) + free(b, right, right_batch)
    return [Value(step.eqn.outvars[0].aval.shape, dims)]


def conv_params(rows, step):
    return {**step.eqn.params, "feature_group_count": rows(step.extra)}


def conv(walk, step):
    p, (x, kernel), (v,) = step.eqn.params, step.ins, step.eqn.outvars
    (batch, features, *spatial), (out, into, *window), to = p["dimension_numbers"]
    y = walk.value(v.aval)
    reason = walk.reason("it is convolved over", step)
    walk.fix([kernel.dims[d] for d in window], reason)
    walk.fix([x.dims[d] for d in spatial] + [y.dims[d] for d in to[2:]], reason)
    groups = p["feature_group_count"]
    step.extra = walk.atoms.dim(groups)
    if p["batch_group_count"] > 1:
        walk.refuse(step)
        return step.outs
    y.dims[to[0]], y.dims[to[1]] = x.dims[batch], kernel.dims[out]
    if groups == 1:
        walk.unite(x.dims[features], kernel.dims[into], step)
    else:
        each = walk.atoms.dim(kernel.shape[out] // groups)
        product = walk.atoms.product
        walk.unite(x.dims[features], product([step.extra, kernel.dims[into]]), step)
        walk.unite(kernel.dims[out], product([step.extra, each]), step)
    return [y]


def pool(walk, step):
    x, (v,), p = step.ins[0], step.eqn.outvars, step.eqn.params
    y = walk.value(v.aval)
    reason = walk.reason("it is pooled over", step)
    for d, window in enumerate(p["window_dimensions"]):
        if window == 1 and x.shape[d] == y.shape[d]:
            y.dims[d] = x.dims[d]
        else:
            walk.fix([x.dims[d], y.dims[d]], reason)
    return [y]


def bits_params(rows, step):
    keys, shape = len(step.ins[0].shape), shape_of(rows, step)
    return {**step.eqn.params, "shape": shape[keys:]}


def random_bits(walk, step):
    x, out = step.ins[0], walk.value(step.eqn.outvars[0].aval)
    return [Value(out.shape, [*x.dims, *out.dims[len(x.dims) :]])]


def random_keys(walk, step):
    reason = walk.reason("random keys", step)
    for x in step.ins:
        walk.fix(x.dims, reason)
    return [walk.value(v.aval, reason) for v in step.eqn.outvars]
