"""Rules of primitives with programs inside: loops, conditions, calls, own derivatives.

`bind(narrow, step, ins)` evaluates the equation in the narrower program; `narrow(program, args)`
evaluates one of `step.inner`.
"""

from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, Var, jaxpr_as_fun

from psjax.axes._walk import Step, Value, Walk, struct


def _program(params):
    """The jaxpr of a call, open or closed."""
    return next(params[n] for n in ("jaxpr", "call_jaxpr", "fun_jaxpr") if n in params)


# -------------------------------------------------------------------------------------------- calls


def inline(narrow, step, ins):
    return narrow(step.inner[0], ins)


def call(walk: Walk, step: Step) -> list[Value]:
    step.inner = [walk.closed(_program(step.eqn.params), step.ins)]
    return step.inner[0].outs


def bind_remat(narrow, step, ins):
    p = step.eqn.params
    fn = lambda *xs: narrow(step.inner[0], xs)
    return jax.checkpoint(fn, prevent_cse=p["prevent_cse"], policy=p["policy"])(*ins)


# ------------------------------------------------------------------------- conditions and loops


def _without_points(walk, step):
    """Values of loops without row numbers: the rows that they name could change per turn."""
    for x in step.ins:
        walk.unpoint(x, step)


def bind_cond(narrow, step, ins):
    branches = [lambda *xs, b=b: narrow(b, xs) for b in step.inner]
    platforms = step.eqn.params.get("branches_platforms")
    if platforms is not None:
        named = {p: b for b, own in zip(branches, platforms) for p in own or ("default",)}
        return jax.lax.platform_dependent(*ins[1:], **named)
    return jax.lax.switch(ins[0], branches, *ins[1:])


def cond(walk, step):
    _without_points(walk, step)
    step.inner = [walk.closed(b, step.ins[1:]) for b in step.eqn.params["branches"]]
    first = step.inner[0]
    for branch in step.inner:
        for x, y in zip(first.outs, branch.outs):
            walk.unpoint(y, step)
            walk.unite_all(x, y, step)
    return [Value(x.shape, x.dims) for x in first.outs]


def _loop_values(values):
    """Loop values without literals: these change per turn."""
    return [Value(x.shape, x.dims) for x in values]


def bind_while(narrow, step, ins):
    c, b = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
    test, body = step.inner
    cond = lambda carry: narrow(test, [*ins[:c], *carry])[0]
    turn = lambda carry: tuple(narrow(body, [*ins[c : c + b], *carry]))
    return jax.lax.while_loop(cond, turn, tuple(ins[c + b :]))


def while_loop(walk, step):
    p = step.eqn.params
    _without_points(walk, step)
    c, b = p["cond_nconsts"], p["body_nconsts"]
    carry = _loop_values(step.ins[c + b :])
    body = walk.closed(p["body_jaxpr"], [*step.ins[c : c + b], *carry])
    for x, y in zip(carry, body.outs):
        walk.unpoint(y, step)
        walk.unite_all(x, y, step)
    step.inner = [walk.closed(p["cond_jaxpr"], [*step.ins[:c], *carry]), body]
    return carry


def _scan_counts(step):
    """Numbers of constants and of carried values; JAX has moved them among the parameters."""
    p = step.eqn.params
    if "num_consts" in p:
        return p["num_consts"], p["num_carry"]
    consts, carry, _ = p["ft_in"].update(step.ins).unpack()
    return len(list(consts)), len(list(carry))


def bind_scan(narrow, step, ins):
    p, (consts, carried) = step.eqn.params, step.extra

    def turn(carry, xs):
        outs = narrow(step.inner[0], [*ins[:consts], *carry, *xs])
        return outs[:carried], outs[carried:]

    carry, xs = list(ins[consts : consts + carried]), list(ins[consts + carried :])
    options = {"length": p["length"], "reverse": p["reverse"], "unroll": p["unroll"]}
    carry, ys = jax.lax.scan(turn, carry, xs, **options)
    return [*carry, *ys]


def scan(walk, step):
    _without_points(walk, step)
    consts, carried = step.extra = _scan_counts(step)
    reason = walk.reason("it is scanned over", step)
    carry, xs = _loop_values(step.ins[consts : consts + carried]), step.ins[consts + carried :]
    walk.fix([x.dims[0] for x in xs], reason)
    each = [Value(x.shape[1:], x.dims[1:]) for x in xs]
    body = walk.closed(step.eqn.params["jaxpr"], [*step.ins[:consts], *carry, *each])
    step.inner = [body]
    for x in body.outs:
        walk.unpoint(x, step)
    for x, y in zip(carry, body.outs):
        walk.unite_all(x, y, step)
    length = step.eqn.params["length"]
    lead = walk.atoms.dim(length, reason)
    ys = [Value((length, *y.shape), [lead, *y.dims]) for y in body.outs[carried:]]
    return [*carry, *ys]


# --------------------------------------------------------------------------------- own derivatives


def whole_equation(eqn: Any) -> Any:
    """The equation as a function of its arrays, with its own derivatives."""
    arrays = [v for v in eqn.invars if not isinstance(v, Literal)]
    unique = list(dict.fromkeys(arrays))
    shapes = [struct(v.aval) for v in unique]
    empty = jax.make_jaxpr(lambda *_: [0.0] * len(eqn.outvars))(*shapes)
    jaxpr = empty.jaxpr.replace(invars=unique, outvars=eqn.outvars, eqns=[eqn])
    fn = jaxpr_as_fun(ClosedJaxpr(jaxpr, ()))

    def call(*args):  # one argument per operand
        given = {v: x for v, x in zip(eqn.invars, args) if isinstance(v, Var)}
        return fn(*[given[v] for v in unique])

    return call


def _real(v):
    return jax.numpy.issubdtype(v.aval.dtype, np.inexact)


def _real_places(eqn):
    """Which operands have derivatives."""
    return [i for i, v in enumerate(eqn.invars) if _real(v)]


def _of_real(eqn, args):
    """The equation as a function of the operands that have derivatives, and these.

    It returns the results that have derivatives, and all results.
    """
    whole, real = whole_equation(eqn), _real_places(eqn)

    def fn(*xs):
        given = dict(zip(real, xs))
        ys = whole(*[given.get(i, x) for i, x in enumerate(args)])
        return [y for y, v in zip(ys, eqn.outvars) if _real(v)], ys

    return fn, tuple(args[i] for i in real)


def bind_jvp(narrow, step, ins):
    if len(step.inner) == 1:
        return narrow(step.inner[0], ins)
    real = _real_places(step.eqn)
    fn = jax.custom_jvp(lambda *xs: tuple(narrow(step.inner[0], xs)))

    def jvp(primals, tangents):
        outs = narrow(step.inner[1], [*primals, *(tangents[i] for i in real)])
        n = len(step.outs)
        moved = iter(outs[n:])
        zero = lambda y: np.zeros(y.shape, jax.dtypes.float0)
        dots = [next(moved) if _real(v) else zero(y) for v, y in zip(step.eqn.outvars, outs)]
        return tuple(outs[:n]), tuple(dots)

    fn.defjvp(jvp)
    return fn(*ins)


def custom_jvp(walk, step):
    step.inner = [walk.closed(_program(step.eqn.params), step.ins)]
    outs = step.inner[0].outs
    if walk.derivatives and walk.depth < 2:
        avals, real = [struct(v.aval) for v in step.eqn.invars], _real_places(step.eqn)

        def rule(*args):
            fn, primals = _of_real(step.eqn, args[: len(avals)])
            _, moved, ys = jax.jvp(fn, primals, tuple(args[len(avals) :]), has_aux=True)
            return [*ys, *moved]

        program = jax.make_jaxpr(rule)(*avals, *[avals[i] for i in real])
        ins = [Value(x.shape, x.dims) for x in step.ins]
        found = _derivative(walk, program, [*ins, *(ins[i] for i in real)])
        for x, y in zip(outs, found.outs):
            walk.unite_all(x, y, step)
        step.inner.append(found)
    return outs


def _derivative(walk, program, ins):
    walk.depth += 1
    found = walk.closed(program, ins)
    walk.depth -= 1
    return found


def bind_vjp(narrow, step, ins):
    if len(step.inner) == 1:
        return narrow(step.inner[0], ins)
    _, forward, backward = step.inner
    n, real = len(step.outs), _real_places(step.eqn)
    fn = jax.custom_vjp(lambda *xs: tuple(narrow(step.inner[0], xs)))

    def ahead(*xs):
        outs = narrow(forward, xs)
        return tuple(outs[:n]), tuple(outs[n:])

    def back(kept, cotangents):
        dots = [d for d, v in zip(cotangents, step.eqn.outvars) if _real(v)]
        moved = dict(zip(real, narrow(backward, [*kept, *dots])))
        zero = lambda v: np.zeros(v.aval.shape, jax.dtypes.float0)
        return tuple(moved[i] if i in moved else zero(v) for i, v in enumerate(step.eqn.invars))

    fn.defvjp(ahead, back)
    return fn(*ins)


def custom_vjp(walk, step):
    step.inner = [walk.closed(_program(step.eqn.params), step.ins)]
    outs = step.inner[0].outs
    if walk.derivatives and walk.depth < 2:
        avals, real = [struct(v.aval) for v in step.eqn.invars], _real_places(step.eqn)
        kept: dict[str, Any] = {}

        def ahead(*args):
            fn, primals = _of_real(step.eqn, args)
            _, back, ys = jax.vjp(fn, *primals, has_aux=True)
            saved, kept["treedef"] = jax.tree.flatten(back)
            return [*ys, *saved]

        forward = jax.make_jaxpr(ahead)(*avals)
        n = len(outs)
        saved = [struct(x) for x in forward.out_avals[n:]]
        dots = [struct(v.aval) for v in step.eqn.outvars if _real(v)]

        def behind(*args):
            back = kept["treedef"].unflatten(args[: len(saved)])
            return list(back(list(args[len(saved) :])))

        backward = jax.make_jaxpr(behind)(*saved, *dots)
        first = _derivative(walk, forward, [Value(x.shape, x.dims) for x in step.ins])
        cotangents = [x for x, v in zip(outs, step.eqn.outvars) if _real(v)]
        second = _derivative(walk, backward, [*first.outs[n:], *cotangents])
        for x, y in zip([*outs, *(step.ins[i] for i in real)], [*first.outs[:n], *second.outs]):
            walk.unite_all(x, y, step)
        step.inner += [first, second]
    return outs
