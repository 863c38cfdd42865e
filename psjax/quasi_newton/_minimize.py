"""A trust-region method for sums of element functions, with a small matrix per element."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from psjax._selection import Selection
from psjax._types import Params
from psjax.quasi_newton import _updates
from psjax.quasi_newton._flat import Flat
from psjax.quasi_newton._hessian import SumOfSquares
from psjax.quasi_newton._model import approximation_bytes
from psjax.quasi_newton._steihaug import inner, plus, steihaug
from psjax.quasi_newton._total import Point, Total

UPDATES = ("sr1", "bfgs", "exact", "gauss_newton")
STARTS = ("identity", "hessian")
STATUS = (
    "converged: the gradient is small enough",
    "max_steps steps were taken",
    "no step decreases the value by more than rounding, or the gradient",
    "value or gradient are not finite at the start",
)
_RUNNING = -1

_ACCEPT, _SHRINK, _GROW = 1e-4, 0.25, 0.75  # ratios of the decrease to the model's


class State(NamedTuple):
    """What `minimize` goes on from.

    Attributes:
      radius: of the trust region.
      approximation: of the elements' Hessians; a list with one entry per kind of element; empty for
        `update="exact"` and `"gauss_newton"`.
    """

    radius: Float[Array, ""]
    approximation: list[Any]


class Info(NamedTuple):
    """How `minimize` went; arrays `[max_steps]` have an entry per step, NaN or 0 after the last.

    Attributes:
      status: number of the reason for the end, of `STATUS`.
      steps: how many steps were tried; each evaluates value and gradient of every element once.
      value: of the sum, at the end.
      gradient_norm: Euclidean, at the end.
      values: value after every step.
      gradient_norms: norm after every step.
      radii: of the trust region, before every step.
      ratios: decrease of the value divided by the model's.
      accepted: whether the step was taken.
      cg_steps: products with the model's Hessian.
      updated: share of the elements whose approximation was updated.
      state: to go on from; pass it as `state` in the next call.
    """

    status: Int[Array, ""]
    steps: Int[Array, ""]
    value: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    values: Float[Array, " max_steps"]
    gradient_norms: Float[Array, " max_steps"]
    radii: Float[Array, " max_steps"]
    ratios: Float[Array, " max_steps"]
    accepted: Bool[Array, " max_steps"]
    cg_steps: Int[Array, " max_steps"]
    updated: Float[Array, " max_steps"]
    state: State


class _Carry(NamedTuple):
    at: Point
    state: State
    info: Info
    rejected: Array  # steps in a row


def minimize(
    element_fn: Callable[..., Any] | Sequence[Callable[..., Any]],
    update: str = "sr1",
    in_axes: Any = None,
    *,
    memory: int | None = None,
    start: str = "identity",
    radius: float = 1.0,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    max_steps: int = 1000,
    max_cg_steps: int | None = None,
    restart: int | None = 10,
    max_bytes: int = 2**30,
    axis_name: str | None = None,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, Info]]:
    r"""Minimise a sum of elements with an approximation of every element's Hessian.

    The function is $f(w) = \sum_e \hat f_e(U_e w)$. A step minimises a quadratic model with the
    Hessian $\sum_e U_e^\top B_e U_e$ in a trust region, by conjugate gradients. The small matrices
    $B_e$ are exact Hessians, or are updated by the change of the element's own gradient. That needs
    fewer steps than one update of the whole matrix, because all elements learn their curvature at
    once. A. Griewank, Ph. L. Toint, *Partitioned variable metric updates for large structured
    optimization problems*, 1982.

    It pays where elements are small. An element of a neural network sees thousands of weights;
    there use `memory`, and expect no gain over first-order methods.

    Args:
      element_fn: as in `psjax.value_and_grad`, deterministic; or a sequence of them, one per kind
        of element. The call then takes sequences, too: one selection per kind, and of each further
        argument one per kind.
      update: `"sr1"`, a symmetric rank-one update, which may be indefinite as Hessians are;
        `"bfgs"`, positive definite, elements without positive curvature are not updated;
        `"exact"`, products with the Hessian itself; `"gauss_newton"`, $J^\top J$ of elements that
        are `SumOfSquares`.
      in_axes: as in `psjax.value_and_grad`; the same for all kinds.
      memory: pairs of vectors that an approximation is made of; None: a matrix, $m^2$ numbers per
        element of m entries, with all updates in it.
      start: what an approximation starts from. `"identity"`, multiplied at the element's first
        update by a curvature that was found; `"hessian"`, the element's Hessian at the first point,
        which needs second derivatives once and fits where many elements do not move at first.
      radius: of the first trust region, in the Euclidean norm of the step.
      rtol: stops at a norm of the gradient below `atol + rtol * (that at the start)`.
      atol: see `rtol`.
      max_steps: most steps, rejected ones included.
      max_cg_steps: most products with the model's Hessian per step; None: the number of weights.
      restart: after so many rejected steps in a row the approximations start from the identity
        again; None: never.
      max_bytes: most that the approximations may take (`approximation_bytes`).
      axis_name: name of a mapped axis (`pmap`, `shard_map`) over which the elements are spread.
      chunk_size: as in `psjax.value_and_grad`.

    Returns:
      A function `(params, selection, *args, state=None) -> (params, Info)`; for `jax.jit`, which
      compiles it once for all index sets of one shape. A trial point whose value is not finite is
      refused, and the region shrinks.

    Raises:
      ValueError: an unknown `update` or `start`; `memory`, `max_steps` or `restart` below 1; at the
        call, an empty selection, approximations larger than `max_bytes`, parameters that are not
        floating, and, outside `jit`, a value or gradient that is not finite at the start.
      TypeError: `"gauss_newton"` of elements that are no `SumOfSquares`.

    Example:
      The chained function of Rosenbrock, of 1000 variables:

      >>> import jax, jax.numpy as jnp, numpy as np, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> element = lambda u: 100 * (u[1] - u[0] ** 2) ** 2 + (1 - u[0]) ** 2
      >>> w = jnp.full(1000, 0.9)
      >>> rows = np.arange(999)[:, None] + np.arange(2)
      >>> chain = psjax.select(P("i"), {"i": rows}, like=w)
      >>> w, info = jax.jit(psjax.quasi_newton.minimize(element, atol=1e-2))(w, chain)
      >>> psjax.quasi_newton.STATUS[info.status], bool(info.value < 1e-4)
      ('converged: the gradient is small enough', True)
    """
    fns = list(element_fn) if isinstance(element_fn, Sequence) else [element_fn]
    one_kind = not isinstance(element_fn, Sequence)
    _check(update, fns, memory, start, max_steps, restart)

    def minimized(params: Params, selection: Any, *args: Any, state: State | None = None):
        params = jax.tree.map(jnp.asarray, params)
        selections = [selection] if one_kind else list(selection)
        of_kind = [tuple(args)] if one_kind else [tuple(x) for x in zip(*args)]
        of_kind = of_kind or [()] * len(fns)
        _check_call(params, selections, len(fns), update, memory, max_bytes)
        total = Total(fns, selections, of_kind, params, update, in_axes, chunk_size, axis_name)
        at = total.evaluate(params)
        if state is None:
            state = State(jnp.asarray(radius, at.value.dtype), total.start(at, memory, start))
        loop = _Loop(total, at, memory, rtol, atol, max_steps, max_cg_steps, restart)
        return loop.run(state)

    return minimized


def _check(
    update: str,
    fns: Sequence[Any],
    memory: int | None,
    start: str,
    max_steps: int,
    restart: int | None,
):
    for name, word, words in (("update", update, UPDATES), ("start", start, STARTS)):
        if word not in words:
            msg = f"minimize({name}={word!r}): pass one of {words}."
            raise ValueError(msg)
    for name, value in (("memory", memory), ("max_steps", max_steps), ("restart", restart)):
        if value is not None and not (isinstance(value, int) and value >= 1):
            msg = f"minimize({name}={value!r}): pass an integer of at least 1."
            raise ValueError(msg)
    if memory is not None and update not in ("sr1", "bfgs"):
        msg = (
            f"minimize(update={update!r}, memory={memory}): this update keeps no pairs; leave "
            'memory out, or pass update="sr1" or "bfgs".'
        )
        raise ValueError(msg)
    if start == "hessian" and (memory is not None or update not in ("sr1", "bfgs")):
        msg = (
            f'minimize(update={update!r}, memory={memory}, start="hessian"): only the matrices of '
            '"sr1" and "bfgs", without memory, can start from Hessians; leave start out.'
        )
        raise ValueError(msg)
    if update == "gauss_newton" and not all(isinstance(fn, SumOfSquares) for fn in fns):
        msg = (
            'minimize(update="gauss_newton"): element_fn must be '
            "psjax.quasi_newton.SumOfSquares(residual_fn), whose Jacobian it uses."
        )
        raise TypeError(msg)


def _check_call(
    params: Params,
    selections: Sequence[Selection],
    kinds: int,
    update: str,
    memory: int | None,
    max_bytes: int,
):
    if len(selections) != kinds:
        msg = f"minimize: {kinds} kinds of element need as many selections, got {len(selections)}."
        raise ValueError(msg)
    for i, selection in enumerate(selections):
        if selection.num_elements == 0:
            msg = f"minimize: selection {i} of {kinds} has no elements."
            raise ValueError(msg)
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            where = jax.tree_util.keystr(path) or "params"
            msg = (
                f"minimize: {where} is {x.dtype}; parameters must be floating. Pass what is not "
                "moved as a further argument of element_fn."
            )
            raise ValueError(msg)
    if update != "exact":
        needed = approximation_bytes(selections, params, memory)
        if needed > max_bytes:
            sizes = [f"{s.num_elements} of {Flat(s, params).size} entries" for s in selections]
            few = approximation_bytes(selections, params, 5)
            msg = (
                f"minimize: the approximations ({', '.join(sizes)}) take {needed:,} bytes, more "
                f"than max_bytes={max_bytes:,}. Pass memory=5, which takes {few:,}, "
                'update="exact", which keeps none, or a larger max_bytes.'
            )
            raise ValueError(msg)


class _Loop:
    """Algorithms 4.1 and 6.2 of Nocedal and Wright, *Numerical Optimization*."""

    def __init__(
        self,
        total: Total,
        at: Point,
        memory: int | None,
        rtol: float,
        atol: float,
        max_steps: int,
        max_cg_steps: int | None,
        restart: int | None,
    ):
        self.sum, self.at, self.memory, self.restart = total, at, memory, restart
        self.max_steps = max_steps
        weights = sum(x.size for x in jax.tree.leaves(at.params))
        self.max_cg_steps = weights if max_cg_steps is None else max_cg_steps
        self.norm = self._norm(at.gradient)
        self.goal = atol + rtol * self.norm

    def run(self, state: State) -> tuple[Any, Info]:
        finite = jnp.isfinite(self.at.value) & jnp.isfinite(self.norm)
        if not isinstance(finite, Tracer) and not finite:
            msg = (
                f"minimize: at the start the value is {self.at.value} and the norm of the gradient "
                f"{self.norm}; both must be finite. Pass other parameters."
            )
            raise ValueError(msg)
        status = jnp.where(finite, self._status(self.norm, jnp.int32(0)), 3)
        dtype, none = self.at.value.dtype, lambda kind: jnp.zeros(self.max_steps, kind)
        nan = jnp.full(self.max_steps, jnp.nan, dtype)
        info = Info(
            status,
            jnp.int32(0),
            self.at.value,
            self.norm,
            values=nan,
            gradient_norms=nan,
            radii=nan,
            ratios=nan,
            accepted=none(bool),
            cg_steps=none(jnp.int32),
            updated=nan,
            state=None,  # pyright: ignore[reportArgumentType]
        )
        first = _Carry(self.at, state, info, jnp.int32(0))
        running = lambda c: c.info.status == _RUNNING
        last = jax.lax.while_loop(running, self._step, first)
        return last.at.params, last.info._replace(state=last.state)

    def _norm(self, tree: Any):
        return jnp.sqrt(inner(tree, tree)).astype(self.at.value.dtype)

    def _status(self, norm: Array, steps: Array):
        status = jnp.where(steps >= self.max_steps, 1, _RUNNING)
        return jnp.where(norm <= self.goal, 0, status).astype(jnp.int32)

    def _step(self, c: _Carry) -> _Carry:
        at, (radius, approximation), info = c.at, c.state, c.info
        norm = info.gradient_norm
        multiply = self.sum.multiply(at.params, approximation)
        forcing = jnp.minimum(0.1, jnp.sqrt(norm)) * norm  # superlinear: (7.3) of the book
        step, image, products = steihaug(multiply, at.gradient, radius, forcing, self.max_cg_steps)
        length = self._norm(step)
        predicted = -(inner(at.gradient, step) + inner(step, image) / 2)
        trial = self.sum.evaluate(plus(at.params, 1, step))
        # Near a minimum both decreases are rounding: section 17.4.2 of Conn, Gould, Toint, 2000.
        rounding = 10 * jnp.finfo(at.value.dtype).eps * jnp.maximum(1, jnp.abs(at.value))
        ratio = (at.value - trial.value + rounding) / (predicted + rounding)
        trial_norm = self._norm(trial.gradient)
        finite = jnp.isfinite(trial.value) & jnp.isfinite(trial_norm)
        # Where the model promises no more than rounding, the gradient alone shows progress.
        unseen = predicted <= rounding
        accepted = finite & (ratio > _ACCEPT) & (~unseen | (trial_norm < norm))
        approximation, updated = self.sum.learn(approximation, step, at, trial)
        new = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), trial, at)
        smaller = jnp.where(finite, 0.5 * length, 0.1 * length)
        larger = jnp.where(length >= 0.99 * radius, 2 * radius, radius)
        next_radius = jnp.where(finite & (ratio > _GROW), larger, radius)
        next_radius = jnp.where(finite & (ratio >= _SHRINK), next_radius, smaller)
        rejected = jnp.where(accepted, 0, c.rejected + 1)
        if self.restart is not None and approximation:
            again = (rejected > 0) & (rejected % self.restart == 0)
            fresh = lambda _: [_updates.start(g, self.memory) for g in at.of_elements]
            approximation = jax.lax.cond(again, fresh, lambda b: b, approximation)
        norm = jnp.where(accepted, trial_norm, norm)
        status = self._status(norm, info.steps + 1)
        status = jnp.where((status == _RUNNING) & unseen & ~accepted, 2, status)
        i = info.steps
        info = info._replace(
            status=status,
            steps=i + 1,
            value=new.value,
            gradient_norm=norm,
            values=info.values.at[i].set(new.value),
            gradient_norms=info.gradient_norms.at[i].set(norm),
            radii=info.radii.at[i].set(radius),
            ratios=info.ratios.at[i].set(ratio.astype(norm.dtype)),
            accepted=info.accepted.at[i].set(accepted),
            cg_steps=info.cg_steps.at[i].set(products),
            updated=info.updated.at[i].set(updated.astype(norm.dtype)),
        )
        state = State(next_radius.astype(radius.dtype), approximation)
        return _Carry(new, state, info, rejected.astype(jnp.int32))
