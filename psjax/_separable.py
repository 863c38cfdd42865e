r"""Partially-separable functions: map over the elements, scatter their gradients.

$f(w) = \sum_e \hat f_e(U_e w)$ and $\nabla f(w) = \sum_e U_e^\top \nabla \hat f_e(U_e w)$ are
equations (3) and (4) of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize
partitioned neural network training*, G-2023-36. The idea is from A. Griewank and Ph. L. Toint,
*Partitioned variable metric updates for large structured optimization problems*, 1982.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, PyTree

from psjax._chunk import chunk_sizes
from psjax._elements import check_chunk_size, over_chunks, view
from psjax._placement import placed, vary, whole
from psjax._seen import give_back, over, see, settled
from psjax._selection import Selection, along
from psjax._sums import narrowed, wide, wide_zeros
from psjax._types import ElementFn, Params


def value_and_grad(
    element_fn: Callable[..., Any],
    in_axes: Any = None,
    chunk_size: int | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""Value and gradient of $f(w) = \sum_e \hat f(U_e w, \dots)$, computed element by element.

    $U_e w$ are the entries that element $e$ sees. The gradient is
    $\nabla f(w) = \sum_e U_e^\top \nabla \hat f(U_e w)$: equation (4) of P. Raynaud, D. Orban,
    J. Bigeon, *Partially-separable loss to parallelize partitioned neural network training*,
    G-2023-36.

    Args:
      element_fn: $\hat f$; `element_fn(element_params, *args)` returns a floating scalar. Leaves
        of `element_params` are the selected rows, `[m, ...]`. Elements are *added*: a mean over
        samples must divide by the size of the whole batch.
      in_axes: how each further argument is mapped; one value for all, or a tuple with one per
        argument. `None`: passed whole. `0`: element e gets row e of leaves `[E, ...]`. A
        `PartitionSpec` such as `P("label")`: indexed by the selection, like a parameter.
      chunk_size: number of elements evaluated at once. Gather and scatter happen inside the loop,
        so that memory grows with the chunk and not with E. None: chosen from the work and the
        memory of one element. On a CPU the chunk is just large enough to make a step of the loop
        worth its start; elsewhere it is all elements that fit into a quarter of the memory.
      has_aux: whether `element_fn` returns `(value, aux)`. The `aux` of all elements are returned
        as arrays `[E, ...]`, with zeros for elements that are not valid.

    Returns:
      A function `(params, selection, *args) -> (value, grads)`: a scalar and a tree like `params`;
      `((value, aux), grads)` with `has_aux`. They are the sums over **this device's** elements:
      inside `pmap` or `shard_map`, add them with `jax.lax.psum`, as in any data-parallel step.

      The sum over chunks is taken in float32 where dtypes are narrower, and rounded once. Within a
      chunk, gradients of shared leaves are summed in the dtype of the program, as JAX does.

    Raises:
      ValueError, TypeError: at the call, if `element_fn` does not return a floating scalar, the
        parameters have other shapes, nothing uses an index name, or there are too few samples.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.array([1., 2., 3., 4.])
      >>> s = psjax.select(P("i"), {"i": [[0, 1], [1, 2], [2, 3]]}, like=w)
      >>> psjax.value_and_grad(lambda u: u[0] * u[1])(w, s)
      (Array(20., dtype=float32), Array([2., 4., 6., 3.], dtype=float32))
    """
    call = "value_and_grad"
    check_chunk_size(call, chunk_size)

    def fn(params: Params, selection: Selection, *args: PyTree):
        operands = whole((params, *args))
        seen = view(call, selection, in_axes, params, args)
        treedef = jax.tree.structure(params)
        argnums = range(treedef.num_leaves)
        value, grads, aux = _evaluate(
            call, element_fn, seen, operands, argnums, chunk_size, has_aux
        )
        grads = placed(treedef.unflatten(grads), params)
        return ((value, aux) if has_aux else value), grads

    return fn


def element_value_and_grad(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient of each element, not summed: $\hat f_e(U_e w)$ and its gradient.

    Use it for statistics over elements, or to scatter in another way:
    `selection.scatter_add(grads, params)` is the whole gradient.

    Args:
      element_fn: as in `value_and_grad`.
      in_axes: as in `value_and_grad`.
      chunk_size: as in `value_and_grad`.

    Returns:
      A function `(params, selection, *args) -> (values, grads)`: values `[E]`, and gradients with
      the shapes of `selection.gather(params)`, `[E, ...]`. Elements that are not valid give zeros.
    """
    call = "element_value_and_grad"
    check_chunk_size(call, chunk_size)

    def fn(params: Params, selection: Selection, *args: PyTree):
        operands = whole((params, *args))
        seen = view(call, selection, in_axes, params, args)
        element, leaves, _, sizes = _of_leaves(
            call, element_fn, seen, operands, chunk_size, has_aux=False
        )
        leaves = vary(leaves, (selection, leaves))
        treedef = jax.tree.structure(params)
        argnums = tuple(range(treedef.num_leaves))
        masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool), params)
        masks = jax.tree.leaves(selection.masked(masks)) if selection.keep else []
        of_params = seen.only(argnums)
        both = jax.value_and_grad(lambda *xs: element(*xs)[0], argnums)

        def body(carry: PyTree, part: Selection, leaves: Sequence[Array]):
            values, grads = part.map(both, leaves)
            grads = [jnp.where(along(part.valid, g), g, jnp.zeros_like(g)) for g in grads]
            if masks:
                own = dataclasses.replace(part, specs=of_params.specs, paths=of_params.paths)
                kept = own.map(lambda *xs: list(xs), masks)
                grads = [jnp.where(k, g, jnp.zeros_like(g)) for k, g in zip(kept, grads)]
            return carry, (jnp.where(part.valid, values, jnp.zeros_like(values)), grads)

        _, (values, grads) = over_chunks(settled(seen), sizes, body, None, leaves)
        return values, treedef.unflatten(grads)

    return fn


def partially_separable(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., jax.Array]:
    r"""The scalar function $f(w) = \sum_e \hat f(U_e w, \dots)$, for JAX's own transformations.

    Every JAX transformation accepts it: `jax.grad`, at the cost of `value_and_grad`; `jax.jvp`,
    `jax.hessian`, Hessian-vector products in every order, `vmap`, `scan`, `jax.checkpoint`; and
    gradients with respect to the other arguments.

    Inside `jax.shard_map` it behaves as any JAX function: with `check_vma=True`, the gradient with
    respect to replicated parameters is already summed over devices; with `check_vma=False`, and
    in `pmap`, it is this device's part, and you add the parts with `jax.lax.psum`.

    Args:
      element_fn: as in `value_and_grad`.
      in_axes: as in `value_and_grad`.
      chunk_size: as in `value_and_grad`.

    Returns:
      A function `(params, selection, *args) -> value`, the sum over this device's elements. You can
      differentiate with respect to its arguments only: JAX refuses values that `element_fn` closes
      over.
    """
    call = "partially_separable"
    check_chunk_size(call, chunk_size)

    def evaluate(
        params: Params, selection: Selection, args: tuple[Any, ...], argnums: Sequence[int]
    ):
        operands = whole((params, *args))
        seen = view(call, selection, in_axes, params, args)
        value, grads, _ = _evaluate(call, element_fn, seen, operands, argnums, chunk_size)
        like = jax.tree.leaves((params, *args))
        return value, [placed(g, like[i]) for i, g in zip(argnums, grads)]

    @jax.custom_jvp
    def fn(params: Params, selection: Selection, args: PyTree):
        return evaluate(params, selection, args, ())[0]

    # The tangent is the inner product of the scattered element gradients with the tangents. A
    # derivative through a `vmap` over the elements takes up to 400 times longer for convolutions
    # on the CPU.
    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]):
        params, selection, args = primals
        moves = jax.tree.leaves((tangents[0], *tangents[2]))
        moved = [i for i, t in enumerate(moves) if type(t) is not SymbolicZero]
        value, grads = evaluate(params, selection, args, moved)
        tangent = jnp.zeros_like(value)
        for i, grad in zip(moved, grads):
            # JAX's gradient of a real function is its derivative, without a conjugate.
            tangent = tangent + jnp.real(jnp.sum(grad * moves[i])).astype(value.dtype)
        return value, tangent

    fn.defjvp(jvp, symbolic_zeros=True)
    arrays = lambda tree: jax.tree.map(jnp.asarray, tree)
    return lambda params, selection, *args: fn(arrays(params), selection, arrays(args))


def _evaluate(
    call: str,
    element_fn: ElementFn,
    seen: Selection,
    args: tuple[Any, ...],
    argnums: Sequence[int],
    chunk_size: int | None,
    has_aux: bool = False,
):
    """The sum of the elements' values, gradients of some leaves, and the elements' `aux`.

    `argnums` are numbers of leaves of `args`; `seen` says how the elements see these leaves.
    """
    element, leaves, dtype, sizes = _of_leaves(call, element_fn, seen, args, chunk_size, has_aux)
    argnums = tuple(argnums)
    moved = [leaves[i] for i in argnums]
    zeros = jnp.zeros((), wide(dtype)), wide_zeros(moved)
    init = vary(zeros, (seen, leaves))
    leaves = vary(leaves, (seen, leaves))
    seen = settled(seen)

    def body(carry: PyTree, part: Selection, leaves: Sequence[Array]):
        value, totals = carry
        of_part = see(part, leaves)

        def total(*own: Array):
            full = list(of_part)
            for i, x in zip(argnums, own):
                full[i] = x
            values, aux = over(part, element, full)
            values = jnp.where(part.valid, values, jnp.zeros_like(values))
            return jnp.sum(values, dtype=wide(dtype)), aux

        if argnums:
            numbers = tuple(range(len(argnums)))
            (more, aux), grads = jax.value_and_grad(total, numbers, has_aux=True)(
                *(of_part[i] for i in argnums)
            )
        else:
            (more, aux), grads = total(), ()
        clean = lambda y: jnp.where(along(part.valid, y), y, jnp.zeros_like(y))
        totals = give_back(part.only(argnums), totals, list(grads))
        return (value + more, totals), jax.tree.map(clean, aux)

    (value, totals), aux = over_chunks(seen, sizes, body, init, leaves)
    totals = seen.only(argnums).masked(totals)
    return value.astype(dtype), narrowed(totals, moved), aux


def _of_leaves(
    call: str,
    element_fn: ElementFn,
    seen: Selection,
    args: tuple[Any, ...],
    chunk_size: int | None,
    has_aux: bool,
):
    """Check the element function and make it one of flat leaves.

    Returns that function, the leaves (0 where dropped), the dtype of a value, and how many elements
    to evaluate at once: on a CPU, and elsewhere.
    """
    leaves, treedef = jax.tree.flatten(args)
    leaves = seen.masked([jnp.asarray(x) for x in leaves])

    def element(*leaves: Array):
        out = element_fn(*treedef.unflatten(leaves))
        return out if has_aux else (out, ())

    one = jax.eval_shape(lambda xs: see(seen[0], xs), leaves)
    program, out = jax.make_jaxpr(element, return_shape=True)(*one)
    if has_aux and not (isinstance(out, tuple) and len(out) == 2):
        msg = f"{call}(has_aux=True): element_fn must return (value, aux), got {out}."
        raise TypeError(msg)
    value = out[0]
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
    sizes = (chunk_size, chunk_size)
    if chunk_size is None:
        sizes = chunk_sizes(program, seen.num_elements, seen.run_length)
    return element, leaves, value.dtype, sizes
