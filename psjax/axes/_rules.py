"""What every primitive does to dimensions: one rule per primitive.

A rule has two parts. `dims(walk, step)` returns the values that the equation makes, from
`step.ins`: it passes dimensions on, unites them with `walk.unite`, makes new ones with
`walk.value`, or fixes them with `walk.fix` and a reason. `params(rows, step)` returns the
parameters of the equation in a narrower program, in which the dimension `d` has `rows(d)` rows;
without it they stay as they are. `points` says that the rule knows about integers that are numbers
of rows (`Value.points`); elsewhere such a use fixes the rows.

To teach psjax a primitive write one function here. What has no rule fixes what it touches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from psjax.axes._walk import Step, Value, Walk


class Rule(NamedTuple):
    """See the module."""

    dims: Callable[[Walk, Step], list[Value]]
    params: Callable[[Any, Step], dict[str, Any]] | None = None
    points: bool = False
    bind: Callable[..., Any] | None = None


RULES: dict[str, Rule] = {}


def rule(*names: str, params: Any = None, points: bool = False) -> Callable[..., Any]:
    """Register a function as the rule of some primitives."""

    def register(dims):
        RULES.update({name: Rule(dims, params, points) for name in names})
        return dims

    return register


# ----------------------------------------------------------------------------------- entry by entry

UNARY = """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz conj cos cosh
digamma erf erf_inv erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p logistic
neg not population_count real round rsqrt sign sin sinh sqrt square tan tanh""".split()
BINARY = """add add_any and atan2 complex div eq eq_to ge gt igamma igammac le le_to lt lt_to max
min mul ne nextafter or polygamma pow random_gamma_grad regularized_incomplete_beta rem shift_left
shift_right_arithmetic shift_right_logical sub threefry2x32 xor zeta""".split()
SAME = """copy copy_p stop_gradient pvary pcast sharding_constraint mesh_cast reshard name
optimization_barrier device_put reduce_precision""".split()


def entrywise(walk: Walk, step: Step) -> list[Value]:
    """The results have the dimensions of the operands; what has one row goes with all."""
    outs = [v.aval for v in step.eqn.outvars]
    full = outs[0].shape
    dims = []
    for d, n in enumerate(full):
        own = [x.dims[d] for x in step.ins if x.shape and x.shape[d] == n and n > 1]
        for other in own[1:]:
            walk.unite(own[0], other, step)
        dims.append(own[0] if own else walk.atoms.dim(n))
    return [Value(full, dims) for _ in outs]


rule(*UNARY, *BINARY)(entrywise)


@rule("platform_index")
def _scalar(walk, step):
    return [walk.value(v.aval) for v in step.eqn.outvars]


@rule(*SAME, "convert_element_type", points=True)
def _identity(walk, step):
    outs = step.eqn.outvars
    kept = lambda x, v: x.points is None or np.issubdtype(v.aval.dtype, np.integer)
    for x, v in zip(step.ins, outs):
        if not kept(x, v):
            walk.unpoint(x, step)
    return [
        Value(x.shape, x.dims, x.points if kept(x, v) else None, x.literal)
        for x, v in zip(step.ins, outs)
    ]


@rule("bitcast_convert_type")
def _bitcast(walk, step):
    x, v = step.ins[0], step.eqn.outvars[0]
    if x.shape != v.aval.shape:
        walk.refuse(step)
        return step.outs
    return [Value(x.shape, x.dims)]


@rule("eq", "ne", points=True)
def _equal(walk, step):
    """Two numbers of rows are compared: they are the same rows."""
    a, b = step.ins
    if a.points is not None and b.points is not None:
        walk.unite(a.points, b.points, step)
    else:
        walk.unpoint(a, step)
        walk.unpoint(b, step)
    return entrywise(walk, step)


def _no_row(x):
    """The number 0, with which JAX compares indices that may count from the end."""
    return x.literal is not None and x.literal == 0


@rule("lt", "ge", points=True)
def _sign(walk, step):
    a, b = step.ins
    if not (_no_row(b) and b.points is None):
        walk.unpoint(a, step)
    walk.unpoint(b, step)
    return entrywise(walk, step)


@rule("add", points=True)
def _add(walk, step):
    a, b = step.ins
    outs = entrywise(walk, step)
    if a.points is not None and b.literal is not None and b.literal == walk.atoms.rows(a.points):
        outs[0].points = a.points  # from the end: the same row
    else:
        walk.unpoint(a, step)
        walk.unpoint(b, step)
    return outs


@rule("select_n", points=True)
def _select(walk, step):
    which, *cases = step.ins
    walk.unpoint(which, step)
    outs = entrywise(walk, step)
    outs[0].points = _shared_points(walk, step, cases)
    return outs


@rule("clamp", points=True)
def _clamp(walk, step):
    low, x, high = step.ins
    outs = entrywise(walk, step)
    last = walk.atoms.rows(x.points) - 1 if x.points is not None else None
    if last is not None and _no_row(low) and high.literal is not None and high.literal == last:
        outs[0].points = x.points
    else:
        for y in step.ins:
            walk.unpoint(y, step)
    return outs


def _shared_points(walk, step, values):
    """The dimension that all values point to; where one does not, nobody does."""
    if all(x.points is not None for x in values) and values:
        for other in values[1:]:
            walk.unite(values[0].points, other.points, step)
        return values[0].points
    for x in values:
        walk.unpoint(x, step)
    return None


# --------------------------------------------------------------------------------- the same entries


def _shape(rows, step, i=0):
    return tuple(rows(d) for d in step.outs[i].dims)


def _set_shape(rows, step):
    return {**step.eqn.params, "shape": _shape(rows, step)}


@rule("broadcast_in_dim", points=True, params=_set_shape)
def _broadcast(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    out = walk.value(v.aval)
    for d, to in enumerate(step.eqn.params["broadcast_dimensions"]):
        if x.shape[d] == out.shape[to]:
            out.dims[to] = x.dims[d]
    out.points = x.points
    return [out]


def _reshape_params(rows, step):
    return {**step.eqn.params, "new_sizes": _shape(rows, step)}


@rule("reshape", points=True, params=_reshape_params)
def _reshape(walk, step):
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


@rule("transpose", points=True)
def _transpose(walk, step):
    x, order = step.ins[0], step.eqn.params["permutation"]
    shape = tuple(x.shape[d] for d in order)
    return [Value(shape, [x.dims[d] for d in order], x.points)]


@rule("squeeze", points=True)
def _squeeze(walk, step):
    x, away = step.ins[0], step.eqn.params["dimensions"]
    kept = [d for d in range(len(x.shape)) if d not in away]
    shape = tuple(x.shape[d] for d in kept)
    return [Value(shape, [x.dims[d] for d in kept], x.points, x.literal)]


@rule("rev")
def _rev(walk, step):
    x = step.ins[0]
    reason = walk.reason("its order is reversed", step)
    walk.fix([x.dims[d] for d in step.eqn.params["dimensions"]], reason)
    return [Value(x.shape, x.dims)]


@rule("tile")
def _tile(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    again = [walk.atoms.dim(n) for n in step.eqn.params["reps"]]
    return [Value(v.aval.shape, [walk.atoms.product([r, d]) for r, d in zip(again, x.dims)])]


# -------------------------------------------------------------------------------------- one by one


def _part(walk, step, dim, size, start, stop, stride=1):
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


def _slice_params(rows, step):
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


@rule("slice", points=True, params=_slice_params)
def _slice(walk, step):
    x, (v,), p = step.ins[0], step.eqn.outvars, step.eqn.params
    strides = p["strides"] or (1,) * len(x.shape)
    bounds = zip(x.dims, x.shape, p["start_indices"], p["limit_indices"], strides)
    return [Value(v.aval.shape, [_part(walk, step, *own) for own in bounds], x.points)]


def _split_params(rows, step):
    axis = step.eqn.params["axis"]
    return {**step.eqn.params, "sizes": tuple(rows(x.dims[axis]) for x in step.outs)}


@rule("split", points=True, params=_split_params)
def _split(walk, step):
    x, axis = step.ins[0], step.eqn.params["axis"]
    ends = np.cumsum(step.eqn.params["sizes"]).tolist()
    parts = walk.atoms.cut(x.dims[axis], ends, walk.reason("it is split", step))
    outs = []
    for part, v in zip(parts, step.eqn.outvars):
        outs.append(Value(v.aval.shape, [*x.dims[:axis], part, *x.dims[axis + 1 :]], x.points))
    return outs


@rule("unstack")
def _unstack(walk, step):
    x, axis = step.ins[0], step.eqn.params["axis"]
    walk.fix([x.dims[axis]], walk.reason("its rows are taken one by one", step))
    dims = [*x.dims[:axis], *x.dims[axis + 1 :]]
    return [Value(v.aval.shape, dims) for v in step.eqn.outvars]


@rule("concatenate", points=True)
def _concatenate(walk, step):
    axis, (v,) = step.eqn.params["dimension"], step.eqn.outvars
    first = step.ins[0]
    for x in step.ins[1:]:
        for d in range(len(x.shape)):
            if d != axis:
                walk.unite(first.dims[d], x.dims[d], step)
    dims = list(first.dims)
    dims[axis] = [term for x in step.ins for term in x.dims[axis]]
    return [Value(v.aval.shape, dims, _shared_points(walk, step, step.ins))]


@rule("pad")
def _pad(walk, step):
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


# ------------------------------------------------------------------------------------------ by data


def _picked(walk, step, dim, index):
    """Rows of a dimension are picked by an index, which may point to it."""
    if index.points is not None:
        walk.unite(dim, index.points, step)
    else:
        walk.fix([dim], walk.reason("its rows are picked by data", step))


def _gather_params(rows, step):
    x, sizes = step.ins[0], step.eqn.params["slice_sizes"]
    new = [rows(d) if n == full else n for d, n, full in zip(x.dims, sizes, x.shape)]
    return {**step.eqn.params, "slice_sizes": tuple(new)}


@rule("gather", points=True, params=_gather_params)
def _gather(walk, step):
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
    """The dimensions that an index array picks rows of."""
    picked = [d for d in indexed if sizes[d] != x.shape[d] or x.shape[d] == 1]
    if len(indexed) == 1 and picked and sizes[indexed[0]] == 1:
        _picked(walk, step, x.dims[indexed[0]], index)
        return
    walk.unpoint(index, step)
    walk.fix([x.dims[d] for d in picked], walk.reason("its rows are picked by data", step))


@rule("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", points=True)
def _scatter(walk, step):
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


def _window_params(rows, step):
    x, sizes = step.ins[0], step.eqn.params["slice_sizes"]
    new = [rows(d) for d in step.outs[0].dims]
    return {**step.eqn.params, "slice_sizes": tuple(new)} if sizes and x.shape else {}


@rule("dynamic_slice", points=True, params=_window_params)
def _dynamic_slice(walk, step):
    x, (v,) = step.ins[0], step.eqn.outvars
    dims = [
        _window(walk, step, dim, full, n, start)
        for dim, full, n, start in zip(x.dims, x.shape, v.aval.shape, step.ins[1:])
    ]
    return [Value(v.aval.shape, dims, x.points)]


def _window(walk, step, dim, full, n, start):
    """A window of a dimension, from a start that may be written in the program."""
    if n == full:
        return dim
    if start.literal is not None:
        first = min(max(int(start.literal), 0), full - n)
        return _part(walk, step, dim, full, first, first + n)
    if n == 1:
        _picked(walk, step, dim, start)
        return walk.atoms.dim(1)
    reason = walk.reason("its rows are picked by data", step)
    walk.unpoint(start, step)
    walk.fix([dim], reason)
    return walk.atoms.dim(n, reason)


@rule("dynamic_update_slice", points=True)
def _dynamic_update_slice(walk, step):
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


@rule("iota", points=True, params=_set_shape)
def _iota(walk, step):
    out = walk.value(step.eqn.outvars[0].aval)
    out.points = out.dims[step.eqn.params["dimension"]]
    return [out]


@rule("argmax", "argmin")
def _argmax(walk, step):
    x, (axis,) = step.ins[0], step.eqn.params["axes"]
    kept = [d for d in range(len(x.shape)) if d != axis]
    shape = tuple(x.shape[d] for d in kept)
    return [Value(shape, [x.dims[d] for d in kept], x.dims[axis])]


@rule("top_k")
def _top_k(walk, step):
    x, outs = step.ins[0], step.eqn.outvars
    axis = step.eqn.params.get("axis", -1) % len(x.shape)
    ranks = walk.atoms.dim(outs[0].aval.shape[axis], walk.reason("its rows are ranks", step))
    dims = [*x.dims[:axis], ranks, *x.dims[axis + 1 :]]
    return [Value(outs[0].aval.shape, dims), Value(outs[1].aval.shape, dims, x.dims[axis])]


@rule("sort", points=True)
def _sort(walk, step):
    axis, keys = step.eqn.params["dimension"], step.eqn.params["num_keys"]
    for x in step.ins[:keys]:
        walk.unpoint(x, step)
    for x in step.ins[1:]:
        walk.unite_all(step.ins[0], x, step)
    walk.fix([step.ins[0].dims[axis]], walk.reason("it is sorted", step))
    return [Value(x.shape, x.dims, x.points) for x in step.ins]


# ----------------------------------------------------------------------------- sums and products


@rule(
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor"
)
def _reduce(walk, step):
    x, axes = step.ins[0], step.eqn.params["axes"]
    kept = [d for d in range(len(x.shape)) if d not in axes]
    return [Value(tuple(x.shape[d] for d in kept), [x.dims[d] for d in kept])]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(walk, step):
    x = step.ins[0]
    walk.fix([x.dims[step.eqn.params["axis"]]], walk.reason("it is accumulated in order", step))
    return [Value(x.shape, x.dims)]


@rule("dot_general")
def _dot(walk, step):
    (left, right), (left_batch, right_batch) = step.eqn.params["dimension_numbers"]
    a, b = step.ins
    for i, j in [*zip(left, right), *zip(left_batch, right_batch)]:
        walk.unite(a.dims[i], b.dims[j], step)
    free = lambda x, *gone: [d for i, d in enumerate(x.dims) if i not in (*gone[0], *gone[1])]
    dims = [a.dims[i] for i in left_batch]
    dims += free(a, left, left_batch) + free(b, right, right_batch)
    return [Value(step.eqn.outvars[0].aval.shape, dims)]


def _conv_params(rows, step):
    return {**step.eqn.params, "feature_group_count": rows(step.extra)}


@rule("conv_general_dilated", params=_conv_params)
def _conv(walk, step):
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


@rule("reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _pool(walk, step):
    x, (v,), p = step.ins[0], step.eqn.outvars, step.eqn.params
    y = walk.value(v.aval)
    reason = walk.reason("it is pooled over", step)
    for d, window in enumerate(p["window_dimensions"]):
        if window == 1 and x.shape[d] == y.shape[d]:
            y.dims[d] = x.dims[d]
        else:
            walk.fix([x.dims[d], y.dims[d]], reason)
    return [y]


# ----------------------------------------------------------------------------------- random numbers


def _bits_params(rows, step):
    keys, shape = len(step.ins[0].shape), _shape(rows, step)
    return {**step.eqn.params, "shape": shape[keys:]}


@rule("random_bits", params=_bits_params)
def _bits(walk, step):
    x, out = step.ins[0], walk.value(step.eqn.outvars[0].aval)
    return [Value(out.shape, [*x.dims, *out.dims[len(x.dims) :]])]


@rule(
    "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split", "random_clone"
)
def _keys(walk, step):
    reason = walk.reason("random keys", step)
    for x in step.ins:
        walk.fix(x.dims, reason)
    return [walk.value(v.aval, reason) for v in step.eqn.outvars]
