"""What independent subnets are compared with, through the same core and with the same signature.

A script changes one word, `psjax.local_update`, and what follows from it: every worker has the
whole network, so the selection is `psjax.replicas(params, n)`, `loss_fn` that of the whole module.

Data parallel with dropout, the explanation that section 6.1 of arXiv:1910.02120 gives for the gains
of independent subnets ("a distributed version of dropout"), is `data_parallel` with a model whose
hidden layers drop each neuron with probability 1 - 1/n: `model.clone(dropout=1 - 1 / n)`, and the
keys as leaves of the batches. A partition that is never redrawn is `psjax.ist.membership` of one
and the same round.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Inexact

from psjax import _public
from psjax._local import LocalMetrics, all_finite, local_update
from psjax._selection import Selection
from psjax._separable import value_and_grad
from psjax._state import extra_arguments
from psjax._traps import check_axis_name, check_low_precision
from psjax._types import Batch, InAxes, OptState, Params
from psjax.plan._scores import score_exchange as score_exchange

__all__ = ["data_parallel", "local_sgd", "score_exchange"]
__dir__ = _public.listing(globals())


def local_sgd(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    in_axes: Any = 0,
    axis_name: str | None = None,
    *,
    mutable: Sequence[str] = (),
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, Any, LocalMetrics]]:
    """Local SGD: every worker trains the whole network for J steps; then all are averaged.

    T. Lin, S. Stich, K. Patel, M. Jaggi, *Don't Use Large Mini-Batches, Use Local SGD*,
    arXiv:1808.07217. It is `psjax.local_update` over replicas.

    Args:
      loss_fn: as in `psjax.local_update`; the whole network's.
      optimizer: as there; its state is averaged too.
      in_axes: as there.
      axis_name: as there.
      mutable: as there; overwritten entries are averaged like the weights.
      has_aux: as there.
      chunk_size: as there.

    Returns:
      A function like that of `psjax.local_update`.

    Raises:
      ValueError: at the call, a selection that divides anything.
    """
    options: Any = dict(mutable=mutable, has_aux=has_aux, chunk_size=chunk_size)
    update = local_update(loss_fn, optimizer, in_axes, axis_name, **options)

    def checked(params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        _check_replicas("local_sgd", selection)
        return update(params, opt_state, selection, batches)

    return checked


def data_parallel(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    in_axes: Any = 0,
    axis_name: str | None = None,
    *,
    mutable: Sequence[str] = (),
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, Any, LocalMetrics]]:
    """Data-parallel training: the workers' gradients are averaged at every step.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar`, a mean over the worker's batch.
      optimizer: any optax optimizer. It gets `value=`, `grad=` and `value_fn=` (`obj_fn=`) of the
        mean over the workers.
      in_axes: 0, worker e has row e of batches `[E, J, ...]`; None, all have the same `[J, ...]`.
      axis_name: name of a mapped axis over which the workers are spread.
      mutable: must be empty, the one exception to the common signature: there is no one worker
        whose overwritten entries would be right at every step. Statistics of a normalisation come
        from `psjax.ist.calibrate`.
      chunk_size: workers evaluated at once, as in `psjax.value_and_grad`.

    Returns:
      A function like that of `psjax.local_update`: `(params, opt_state, selection, batches)`, J
      steps, each on the batches of all workers. `loss [E, J]` is the mean over the workers,
      repeated, and `finite` is the same for all: a gradient that is not finite reaches everybody,
      and nothing is left out.

    Raises:
      ValueError: at the call, a selection that divides anything, or other batches.
    """
    if mutable:
        msg = (
            f"data_parallel(mutable={tuple(mutable)}): gradients are averaged, overwritten entries "
            "cannot be; train without them and psjax.ist.calibrate before predicting."
        )
        raise ValueError(msg)
    if in_axes not in (0, None):
        msg = f"data_parallel(in_axes={in_axes!r}): pass 0 or None."
        raise ValueError(msg)

    def wide_loss(
        wide: Params, batch: Batch, like: Params
    ):  # low precision is differentiated as it is, summed as float32
        params = jax.tree.map(lambda x, p: x.astype(p.dtype), wide, like)
        return _wide(loss_fn(params, batch))

    optimizer = optax.with_extra_args_support(optimizer)

    def update(params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        _check_replicas("data_parallel", selection)
        _check_rows(selection, batches, in_axes)
        check_axis_name("data_parallel", axis_name, params, (selection, batches))
        check_low_precision("data_parallel", optimizer, params)
        if in_axes == 0:
            batches = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), batches)
        workers = jnp.sum(jnp.asarray(selection.valid))
        if axis_name is not None:
            workers = jax.lax.psum(workers, axis_name)

        def mean(params: Params, batch: Batch):
            fn = lambda wide, batch: wide_loss(wide, batch, params)
            # Together, gradients of what workers share are added in the dtype that fn computes in.
            narrow = any(_wide(x).dtype != x.dtype for x in jax.tree.leaves(params))
            size = 1 if narrow and chunk_size is None else chunk_size
            sum_and_grad = value_and_grad(fn, in_axes=in_axes, chunk_size=size)
            loss, grads = sum_and_grad(jax.tree.map(_wide, params), selection, batch)
            if axis_name is not None:
                loss, grads = jax.lax.psum((loss, grads), axis_name)
            loss, grads = jax.tree.map(lambda x: x / workers.astype(x.dtype), (loss, grads))
            return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)

        def step(carry: tuple[Params, OptState], batch: Batch):
            params, opt_state = carry
            loss, grads = mean(params, batch)
            options = extra_arguments(loss, grads, _with_gradient(lambda w: mean(w, batch)))
            updates, opt_state = optimizer.update(grads, opt_state, params, **options)
            return (optax.apply_updates(params, updates), opt_state), loss

        (params, opt_state), loss = jax.lax.scan(step, (params, opt_state), batches)
        finite = jnp.all(jnp.isfinite(loss)) & all_finite((params, opt_state))
        repeat = lambda x: jnp.broadcast_to(x, (selection.num_elements, *x.shape))
        return params, opt_state, LocalMetrics(repeat(loss), repeat(finite))

    return update


def _wide(x: Inexact[Array, "..."]):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _with_gradient(value_and_grad: Callable[[Params], tuple[Array, Params]]):
    """The value as a function with the gradient given: JAX's own would be n-fold over devices."""
    fn = jax.custom_vjp(lambda params: value_and_grad(params)[0])
    scaled = lambda grads, ct: jax.tree.map(lambda g: (ct * g).astype(g.dtype), grads)
    fn.defvjp(value_and_grad, lambda grads, ct: (scaled(grads, ct),))
    return fn


def _check_replicas(call: str, selection: Selection):
    if selection.indices:
        msg = (
            f"{call}: the selection divides {sorted(selection.indices)}; every worker must see the "
            "whole: pass psjax.replicas(params, n)."
        )
        raise ValueError(msg)


def _check_rows(selection: Selection, batches: Batch, in_axes: InAxes):
    lead = [selection.num_elements] if in_axes == 0 else []
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batches)]
    steps = {shape[len(lead)] if len(shape) > len(lead) else 0 for shape in shapes}
    wrong = [s for s in shapes if list(s[: len(lead)]) != lead]
    if wrong or len(steps) != 1 or steps == {0}:
        begin = ", ".join(map(str, [*lead, "J"]))
        msg = (
            f"data_parallel: leaves of batches have shapes {shapes}; with in_axes={in_axes} they "
            f"must all begin with [{begin}], J >= 1 local steps."
        )
        raise ValueError(msg)
