"""Methods to compare independent subnet training with: local SGD and data parallelism.

They have the signature of `psjax.local_update`. To compare, replace that call in a script. Every
worker has the whole network, so the selection is `psjax.replicas(params, n)`, and `loss_fn` is the
loss of the whole module.

Two more comparisons need no function. *Data parallel with dropout* tests the explanation that
section 6.1 of arXiv:1910.02120 gives for the gains of independent subnets ("a distributed version
of dropout"). It is `data_parallel` with a model in which each hidden neuron is dropped with
probability 1 - 1/n, `model.clone(dropout=1 - 1 / n)`; pass the keys as leaves of the batches. *A
fixed partition* is `psjax.ist.membership` with the same round number in every round.
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
    """Local SGD: every worker trains the whole network for J steps, then they are averaged.

    T. Lin, S. Stich, K. Patel, M. Jaggi, *Don't Use Large Mini-Batches, Use Local SGD*,
    arXiv:1808.07217. It is `psjax.local_update` over replicas.

    Args:
      loss_fn: as in `psjax.local_update`, for the whole network.
      optimizer: as in `psjax.local_update`; its state is averaged, too.
      in_axes: as in `psjax.local_update`.
      axis_name: as in `psjax.local_update`.
      mutable: as in `psjax.local_update`; overwritten entries are averaged like the weights.
      has_aux: as in `psjax.local_update`.
      chunk_size: as in `psjax.local_update`.

    Returns:
      A function like that of `psjax.local_update`.

    Raises:
      ValueError: at the call, if the selection divides an axis.
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
      in_axes: 0: worker e gets row e of batches `[E, J, ...]`. None: all get the same `[J, ...]`.
      axis_name: name of a mapped axis over which the workers are spread.
      mutable: must be empty, in contrast to `psjax.local_update`: the workers compute different new
        values at every step, and none of them is right for all. Get the statistics of a
        normalisation from `psjax.ist.calibrate`.
      chunk_size: number of workers evaluated at once, as in `psjax.value_and_grad`.

    Returns:
      A function like that of `psjax.local_update`, of `(params, opt_state, selection, batches)`. It
      takes J steps, each on the batches of all workers. `loss [E, J]` is the mean over the workers,
      repeated. `finite` is the same for all: a gradient that is not finite reaches all workers, and
      nothing is left out.

    Raises:
      ValueError: at the call, if the selection divides an axis, or the batches do not fit.
    """
    if mutable:
        msg = (
            f"data_parallel(mutable={tuple(mutable)}): gradients are averaged, but overwritten "
            "entries cannot be; train without them, and call psjax.ist.calibrate before predicting."
        )
        raise ValueError(msg)
    if in_axes not in (0, None):
        msg = f"data_parallel(in_axes={in_axes!r}): pass 0 or None."
        raise ValueError(msg)

    def wide_loss(
        wide: Params, batch: Batch, like: Params
    ):  # differentiated in low precision, summed in float32
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
            # JAX adds gradients of leaves that workers share in the dtype of fn.
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
    """A function with this value and gradient: the gradient that JAX derives would be n-fold."""
    fn = jax.custom_vjp(lambda params: value_and_grad(params)[0])
    scaled = lambda grads, ct: jax.tree.map(lambda g: (ct * g).astype(g.dtype), grads)
    fn.defvjp(value_and_grad, lambda grads, ct: (scaled(grads, ct),))
    return fn


def _check_replicas(call: str, selection: Selection):
    if selection.indices:
        msg = (
            f"{call}: the selection divides {sorted(selection.indices)}; every worker needs the "
            "whole network: pass psjax.replicas(params, n)."
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
