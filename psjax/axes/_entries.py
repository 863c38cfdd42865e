"""Rules of primitives that work entry by entry."""

import numpy as np

from psjax.axes._walk import Step, Value, Walk

UNARY = """abs acos acosh asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil clz conj cos cosh
digamma erf erf_inv erfc exp exp2 expm1 floor imag integer_pow is_finite lgamma log log1p logistic
neg not population_count real round rsqrt sign sin sinh sqrt square tan tanh""".split()
BINARY = """add add_any and atan2 complex div eq eq_to ge gt igamma igammac le le_to lt lt_to max
min mul ne nextafter or polygamma pow random_gamma_grad regularized_incomplete_beta rem shift_left
shift_right_arithmetic shift_right_logical sub threefry2x32 xor zeta""".split()
SAME = """copy copy_p stop_gradient pvary pcast sharding_constraint mesh_cast reshard name
optimization_barrier device_put reduce_precision""".split()


def entrywise(walk: Walk, step: Step) -> list[Value]:
    """The results have the dimensions of the operands; one row broadcasts to all."""
    outs = [v.aval for v in step.eqn.outvars]
    full = outs[0].shape
    dims = []
    for d, n in enumerate(full):
        own = [x.dims[d] for x in step.ins if x.shape and x.shape[d] == n and n > 1]
        for other in own[1:]:
            walk.unite(own[0], other, step)
        dims.append(own[0] if own else walk.atoms.dim(n))
    return [Value(full, dims) for _ in outs]


def scalar(walk, step):
    return [walk.value(v.aval) for v in step.eqn.outvars]


def identity(walk, step):
    outs = step.eqn.outvars
    kept = lambda x, v: x.points is None or np.issubdtype(v.aval.dtype, np.integer)
    for x, v in zip(step.ins, outs):
        if not kept(x, v):
            walk.unpoint(x, step)
    return [
        Value(x.shape, x.dims, x.points if kept(x, v) else None, x.literal)
        for x, v in zip(step.ins, outs)
    ]


def bitcast(walk, step):
    x, v = step.ins[0], step.eqn.outvars[0]
    if x.shape != v.aval.shape:
        walk.refuse(step)
        return step.outs
    return [Value(x.shape, x.dims)]


def equal(walk, step):
    """Two row numbers are compared, so their dimensions have the same rows."""
    a, b = step.ins
    if a.points is not None and b.points is not None:
        walk.unite(a.points, b.points, step)
    else:
        walk.unpoint(a, step)
        walk.unpoint(b, step)
    return entrywise(walk, step)


def is_zero(x):
    """The number 0, with which JAX compares indices that may count from the end."""
    return x.literal is not None and x.literal == 0


def compare_with_zero(walk, step):
    a, b = step.ins
    if not (is_zero(b) and b.points is None):
        walk.unpoint(a, step)
    walk.unpoint(b, step)
    return entrywise(walk, step)


def add(walk, step):
    a, b = step.ins
    outs = entrywise(walk, step)
    if a.points is not None and b.literal is not None and b.literal == walk.atoms.rows(a.points):
        outs[0].points = a.points  # from the end: the same row
    else:
        walk.unpoint(a, step)
        walk.unpoint(b, step)
    return outs


def select_case(walk, step):
    which, *cases = step.ins
    walk.unpoint(which, step)
    outs = entrywise(walk, step)
    outs[0].points = shared_points(walk, step, cases)
    return outs


def clamp(walk, step):
    low, x, high = step.ins
    outs = entrywise(walk, step)
    last = walk.atoms.rows(x.points) - 1 if x.points is not None else None
    if last is not None and is_zero(low) and high.literal is not None and high.literal == last:
        outs[0].points = x.points
    else:
        for y in step.ins:
            walk.unpoint(y, step)
    return outs


def shared_points(walk, step, values):
    """The dimension that all values point to; None if one of them does not."""
    if all(x.points is not None for x in values) and values:
        for other in values[1:]:
            walk.unite(values[0].points, other.points, step)
        return values[0].points
    for x in values:
        walk.unpoint(x, step)
    return None
