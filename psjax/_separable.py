r"""Partially-separable functions: map over the elements, scatter what comes back.

$f(w) = \sum_e \hat f_e(U_e w)$ and $\nabla f(w) = \sum_e U_e^\top \nabla \hat f_e(U_e w)$: (3) and
(4) of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural
network training*, G-2023-36, after A. Griewank and Ph. L. Toint, *Partitioned variable metric
updates for large structured optimization problems*, 1982.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from psjax._elements import check_chunk_size, over_chunks, vary, view


def value_and_grad(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient of $f(w) = \sum_e \hat f(U_e w, \dots)$, element by element.

    $\nabla f(w) = \sum_e U_e^\top \nabla \hat f(U_e w)$: (4) of G-2023-36 (see the module).

    Args:
      element_fn: $\hat f$; `element_fn(element_params, *args)` returns a floating scalar. Leaves
        of `element_params` are the selected rows, `[m, ...]`. Elements are *added*: what is a mean
        over samples divides by the size of the whole batch.
      in_axes: what an element sees of each further argument, one for all or a tuple of one each:
        `None`, the whole; a `PartitionSpec` such as `P("label")`, the rows that the selection's
        indices of that name pick, as for parameters; 0, row e of leaves `[E, ...]`.
      chunk_size: elements evaluated at once. Gather and scatter happen inside the loop, so memory
        grows with the chunk and not with E. None: 1 on the CPU, where it is fastest, all elsewhere.

    Returns:
      A function `(params, selection, *args) -> (value, grads)`: a scalar and a tree like `params`.
      They are the sums over **this device's** elements: inside `pmap` or `shard_map`,
      `jax.lax.psum` them, as in any data-parallel step.

    Raises:
      ValueError, TypeError: at the call, for an `element_fn` that does not return a floating
        scalar, parameters of other shapes, an index name that nothing uses, too few samples.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.array([1., 2., 3., 4.])
      >>> s = psjax.select(P("i"), {"i": [[0, 1], [1, 2], [2, 3]]}, like=w)
      >>> psjax.value_and_grad(lambda u: u[0] * u[1])(w, s)
      (Array(20., dtype=float32), Array([2., 4., 6., 3.], dtype=float32))
    """
    check_chunk_size("value_and_grad", chunk_size)

    def fn(params, selection, *args):
        seen = view("value_and_grad", selection, in_axes, params, args)
        treedef = jax.tree.structure(params)
        argnums = range(treedef.num_leaves)
        value, grads = _sum(
            "value_and_grad", element_fn, seen, (params, *args), argnums, chunk_size
        )
        return value, treedef.unflatten(grads)

    return fn


def element_value_and_grad(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient of every element, not summed: $\hat f_e(U_e w)$ and its own gradient.

    For statistics over elements, and for methods that scatter by themselves:
    `selection.scatter_add(grads, params)` is the whole gradient.

    Args:
      element_fn: as in `value_and_grad`.
      in_axes: as there.
      chunk_size: as there.

    Returns:
      A function `(params, selection, *args) -> (values [E], grads)` with leaves of `grads`
      `[E, ...]`, shaped as `selection.gather(params)`; zero for elements that are not valid.
    """
    check_chunk_size("element_value_and_grad", chunk_size)

    def fn(params, selection, *args):
        seen = view("element_value_and_grad", selection, in_axes, params, args)
        element, leaves, _ = _of_leaves("element_value_and_grad", element_fn, seen, (params, *args))
        leaves = vary(leaves, (selection, leaves))
        treedef = jax.tree.structure(params)
        argnums = tuple(range(treedef.num_leaves))
        masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
        masks = jax.tree.leaves(selection.masked(masks)) if selection.keep else []
        masked = seen.only(argnums)

        def body(carry, part):
            values, grads = part.map(jax.value_and_grad(element, argnums), leaves)
            grads = [jnp.where(_along(part.valid, g), g, 0) for g in grads]
            if masks:
                own = dataclasses.replace(masked, indices=part.indices, valid=part.valid)
                kept = own.map(lambda *xs: list(xs), masks)
                grads = [jnp.where(k, g, 0) for k, g in zip(kept, grads)]
            return carry, (jnp.where(part.valid, values, 0), grads)

        _, (values, grads) = over_chunks(seen, chunk_size, body, None)
        return values, treedef.unflatten(grads)

    return fn


def partially_separable(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., jax.Array]:
    r"""The scalar function $f(w) = \sum_e \hat f(U_e w, \dots)$, for JAX's own transformations.

    `jax.grad` of it costs what `value_and_grad` does; `jax.jvp`, `jax.hessian`, Hessian-vector
    products in every order, `vmap`, `scan`, `jax.checkpoint`, and gradients with respect to the
    other arguments work. Its tangent is the inner product of the scattered element gradients with
    the tangents, never a derivative through a `vmap` over the elements: that would be up to 400
    times slower for convolutions on the CPU.

    Inside `jax.shard_map` it has JAX's own semantics: with `check_vma=True` the gradient with
    respect to replicated parameters is already summed over devices; with `check_vma=False`, and
    in `pmap`, it is this device's, and the caller psums it.

    Args:
      element_fn: as in `value_and_grad`.
      in_axes: as there.
      chunk_size: as there.

    Returns:
      A function `(params, selection, *args) -> value`, the sum over this device's elements. What is
      differentiated must be one of its arguments: JAX refuses what `element_fn` closes over.
    """
    check_chunk_size("partially_separable", chunk_size)

    def evaluate(params, selection, args, argnums):
        seen = view("partially_separable", selection, in_axes, params, args)
        return _sum("partially_separable", element_fn, seen, (params, *args), argnums, chunk_size)

    @jax.custom_jvp
    def fn(params, selection, args):
        return evaluate(params, selection, args, ())[0]

    def jvp(primals, tangents):
        params, selection, args = primals
        tangents = jax.tree.leaves((tangents[0], *tangents[2]))
        moved = [i for i, t in enumerate(tangents) if type(t) is not SymbolicZero]
        value, grads = evaluate(params, selection, args, moved)
        tangent = jnp.zeros_like(value)
        for i, grad in zip(moved, grads):
            tangent = tangent + jnp.vdot(jnp.conj(grad), tangents[i]).real.astype(value.dtype)
        return value, tangent

    fn.defjvp(jvp, symbolic_zeros=True)
    return lambda params, selection, *args: fn(params, selection, args)


def _sum(call, element_fn, seen, args, argnums, chunk_size):
    """Sum of the elements' values, and of their gradients of some leaves of `args`, by number."""
    element, leaves, dtype = _of_leaves(call, element_fn, seen, args)
    both = (
        jax.value_and_grad(element, tuple(argnums)) if argnums else lambda *xs: (element(*xs), ())
    )
    zeros = jnp.zeros((), dtype), [jnp.zeros_like(leaves[i]) for i in argnums]
    init = vary(zeros, (seen, leaves))
    leaves = vary(leaves, (seen, leaves))

    def body(carry, part):
        value, totals = carry
        values, grads = part.map(both, leaves)
        value = value + jnp.sum(jnp.where(part.valid, values, 0))
        return (value, part.only(argnums).add(totals, list(grads))), None

    (value, totals), _ = over_chunks(seen, chunk_size, body, init)
    return value, seen.only(argnums).masked(totals)


def _of_leaves(call, element_fn, seen, args):
    """The element function of flat leaves, the leaves (0 where dropped), the dtype of a value."""
    leaves, treedef = jax.tree.flatten(args)
    leaves = seen.masked([jnp.asarray(x) for x in leaves])
    element = lambda *leaves: element_fn(*treedef.unflatten(leaves))
    value = jax.eval_shape(lambda xs: seen[0].map(element, xs), leaves)
    if not hasattr(value, "shape") or value.shape != ():
        got = jax.tree.map(lambda v: f"{v.dtype}{list(v.shape)}", value)
        msg = (
            f"{call}: element_fn must return a scalar, got {got}. Sum inside it; if it is a mean, "
            "divide by the size of the whole batch, because elements are added."
        )
        raise ValueError(msg)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        msg = f"{call}: element_fn must return a floating scalar, got {value.dtype}."
        raise TypeError(msg)
    return element, leaves, value.dtype


def _along(valid, y):
    return valid.reshape(*valid.shape, *(1,) * (y.ndim - valid.ndim))
