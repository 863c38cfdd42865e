"""Checks, while a round is traced, for mistakes that would raise no error by themselves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import Jaxpr, Literal
from jax.typing import DTypeLike
from jaxtyping import Array

from psjax._placement import varying
from psjax._programs import programs_in
from psjax._selection import Selection
from psjax._state import extra_arguments
from psjax._types import Batch, InAxes, OptState, Params

# Primitives whose result may change with one more zero.
_ORDERED = {
    "argmax",
    "argmin",
    "cummax",
    "cummin",
    "cumprod",
    "cumsum",
    "reduce_min",
    "reduce_prod",
    "sort",
    "top_k",
}


def check_axis_name(call: str, axis_name: str | None, params: Any, own: Any) -> None:
    """Raise if devices start from the same weights, train on different data, and do not average.

    `jax.shard_map` shows which values differ between devices where `check_vma` is True; `jax.pmap`
    and `check_vma=False` do not.
    """
    missing = sorted(varying(own) - varying(params) - {axis_name})
    if missing:
        msg = (
            f"{call}(axis_name={axis_name!r}): the selection or the batches differ along the "
            f"mapped axis {missing[0]!r} but the parameters do not, so that every device would "
            f"keep its own result. Pass axis_name={missing[0]!r} to average over it, or "
            f"jax.lax.pcast(params, {missing[0]!r}, to='varying') if each device trains alone."
        )
        raise ValueError(msg)


def check_low_precision(call: str, optimizer: Any, params: Any) -> None:
    """Raise if a zero gradient gives NaN in float16, where an epsilon such as 1e-8 is 0."""
    if not any(jnp.result_type(x) == jnp.float16 for x in jax.tree.leaves(params)):
        return
    if _finite(optimizer, params, lambda dtype: jnp.float32) and not _finite(
        optimizer, params, lambda dtype: dtype
    ):
        msg = (
            f"{call}(optimizer=...): a gradient of zero gives NaN, because a constant of the "
            "optimizer is 0 in float16 (numbers below 6e-8 are, such as eps=1e-8 of optax.adam). "
            "Pass a larger one, eps=1e-4, or keep the parameters in float32 and cast them to "
            "float16 in loss_fn."
        )
        raise ValueError(msg)


def _finite(
    optimizer: optax.GradientTransformation, params: Params, cast: Callable[[Any], DTypeLike]
):
    """Whether an update of small parameters along a gradient of zero is finite."""
    with jax.ensure_compile_time_eval():
        small = lambda x: jnp.ones((2,) * jnp.ndim(x), cast(jnp.result_type(x)))
        ones = jax.tree.map(small, params)
        zeros = jax.tree.map(jnp.zeros_like, ones)
        zero = lambda p: 0 * jnp.float32(sum(jnp.sum(x) for x in jax.tree.leaves(p)))
        options = extra_arguments(jnp.zeros(()), zeros, zero)
        updates, _ = optimizer.update(zeros, optimizer.init(ones), ones, **options)
        return all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(updates))


def check_padding(call: str, optimizer: Any, with_padding: Any, without: Any) -> None:
    """Raise if an update counts the entries of a leaf, because padding adds some.

    A mean divides by the number of entries, which is a constant of the traced program. So programs
    for two sizes are compared. Sums, such as norms, do not count zeros and pass. A count without a
    constant, such as `sum(exp(x))`, passes unnoticed.

    Args:
      call: the name of the public function.
      optimizer: an `optax.GradientTransformation` with extra arguments.
      with_padding: shapes of the parameters that an element sees.
      without: the same with another number of rows on every axis that has padding.
    """
    one, other = (_constants(optimizer, tree) for tree in (with_padding, without))
    ordered = [name for name, _ in one if name in _ORDERED]
    if ordered or one != other:
        what = f"has a {ordered[0]}" if ordered else "depends on the number of entries of a leaf"
        msg = (
            f"{call}(optimizer=...): the shares are uneven, and an update of this optimizer {what}:"
            " zeros in padded slots would count, as in the mean of optax.centralize or "
            "optax.clip_by_block_rms. Pass even shares, or an optimizer that takes sums or treats "
            "each entry by itself (optax.clip_by_global_norm; optax.adafactor with "
            "clipping_threshold=None, multiply_by_parameter_scale=False, factored=False)."
        )
        raise ValueError(msg)


def _constants(optimizer: optax.GradientTransformation, params: Params):
    """The primitives of an update with their constants."""
    update = optax.with_extra_args_support(optimizer).update

    def fn(grads: Params, params: Params, state: OptState, value: Array):
        size = lambda p: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p))
        options = extra_arguments(value, grads, lambda p: value * size(p))
        return update(grads, state, params, **options)

    state = jax.eval_shape(optimizer.init, params)
    value = jax.ShapeDtypeStruct((), jnp.result_type(float))
    found = []

    def walk(jaxpr: Jaxpr):
        for eqn in jaxpr.eqns:
            values = [np.asarray(x.val).tolist() for x in eqn.invars if isinstance(x, Literal)]
            found.append((eqn.primitive.name, repr(values)))  # as text: NaN equals itself
            for inner in programs_in(eqn):
                walk(inner)

    program = jax.make_jaxpr(fn)(params, params, state, value)
    walk(program.jaxpr)
    scalars = [np.asarray(x).tolist() for x in program.consts if not np.ndim(x)]
    return [*found, ("constants", repr(scalars))]


def check_steps(seen: Selection, first: int, in_axes: InAxes, batches: Batch):
    """Every leaf of the batches that an element sees begins with the same J, 1 or more."""
    leaves, E = jax.tree.leaves(batches), seen.num_elements
    one = seen.only(range(first, len(seen.specs)))[0]
    shapes = jax.eval_shape(lambda xs: one.map(lambda *xs: list(xs), xs), leaves)
    shapes = [x.shape for x in shapes]
    lengths = {shape[0] if shape else None for shape in shapes}
    if not shapes:
        msg = f"local_update: batches has no array; pass [{E}, J, ...]."
        raise ValueError(msg)
    if len(lengths) != 1 or None in lengths:
        msg = (
            f"local_update: leaves of batches have shapes {[jnp.shape(x) for x in leaves]}; an "
            f"element sees {shapes} (in_axes={in_axes!r}); all must begin with J, the number of "
            f"local steps: [{E}, J, ...] with in_axes=0."
        )
        raise ValueError(msg)
    if lengths == {0}:
        msg = "local_update: batches has J = 0 local steps; pass one or more."
        raise ValueError(msg)


def check_mutable(mutable: tuple[str, ...], params: Params):
    missing = [name for name in mutable if not isinstance(params, dict) or name not in params]
    if missing:
        have = sorted(params) if isinstance(params, dict) else type(params).__name__
        msg = (
            f"local_update(mutable={mutable}): the parameters have no {missing}; they are {have}. "
            "Pass the whole variables, such as {'params': ..., 'batch_stats': ...}."
        )
        raise ValueError(msg)
