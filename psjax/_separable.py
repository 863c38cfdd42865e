r"""Partially-separable functions: map over the elements, scatter what comes back.

$f(w) = \sum_e \hat f_e(U_e w)$ and $\nabla f(w) = \sum_e U_e^\top \nabla \hat f_e(U_e w)$: (3) and
(4) of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural
network training*, G-2023-36, after A. Griewank and Ph. L. Toint, *Partitioned variable metric
updates for large structured optimization problems*, 1982.
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
        grows with the chunk and not with E. None: chosen for the platform that the program is
        lowered for, from what an element computes and holds: on a CPU as many as make a step of the
        loop worth starting, elsewhere all that fit into a quarter of the device's memory.
      has_aux: whether `element_fn` returns `(value, aux)`; the `aux` of all elements come back as
        arrays `[E, ...]`, zero for elements that are not valid.

    Returns:
      A function `(params, selection, *args) -> (value, grads)`: a scalar and a tree like `params`;
      `((value, aux), grads)` with `has_aux`. Chunks are summed in float32 where dtypes are
      narrower, and rounded once; within a chunk, gradients of what its elements share are summed as
      in any JAX program of that dtype.
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

    def jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]):
        params, selection, args = primals
        moves = jax.tree.leaves((tangents[0], *tangents[2]))
        moved = [i for i, t in enumerate(moves) if type(t) is not SymbolicZero]
        value, grads = evaluate(params, selection, args, moved)
        tangent = jnp.zeros_like(value)
        for i, grad in zip(moved, grads):
            # Of a real function JAX's gradient is the derivative, not its conjugate.
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
    """Sum of the elements' values, what they return besides, and gradients of some leaves.

    `argnums` are numbers of leaves of `args`, which `seen` says how the elements see.
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
    """The element function of flat leaves, the leaves (0 where dropped), the dtype of a value.

    And how many elements to evaluate at once, on a CPU and elsewhere.
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
