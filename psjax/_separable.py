r"""Partially-separable functions: map over the elements, scatter what comes back.

$f(w) = \sum_e \hat f_e(U_e w)$ and $\nabla f(w) = \sum_e U_e^\top \nabla \hat f_e(U_e w)$: (3) and
(4) of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural
network training*, G-2023-36, after A. Griewank and Ph. L. Toint, *Partitioned variable metric
updates for large structured optimization problems*, 1982.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._leaf import _gather_leaf, _merge_leaf, _scatter_leaf
from psjax._masks import _kept
from psjax._selection import _check_like, _selected

_ELEMENT = "element of the selection"  # the axis of arguments mapped with in_axes=0


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
    _check_chunk_size("value_and_grad", chunk_size)

    def fn(params, selection, *args):
        evaluate = _Elements("value_and_grad", element_fn, in_axes, chunk_size, selection)
        treedef = jax.tree.structure(params)
        value, grads = evaluate.sum(params, args, argnums=range(treedef.num_leaves))
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
    _check_chunk_size("element_value_and_grad", chunk_size)

    def fn(params, selection, *args):
        evaluate = _Elements("element_value_and_grad", element_fn, in_axes, chunk_size, selection)
        return evaluate.stack(params, args)

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
    _check_chunk_size("partially_separable", chunk_size)

    def evaluate(selection):
        return _Elements("partially_separable", element_fn, in_axes, chunk_size, selection)

    @jax.custom_jvp
    def fn(params, selection, args):
        return evaluate(selection).sum(params, args, argnums=())[0]

    def jvp(primals, tangents):
        params, selection, args = primals
        tangents = jax.tree.leaves((tangents[0], *tangents[2]))
        moved = [i for i, t in enumerate(tangents) if type(t) is not SymbolicZero]
        value, grads = evaluate(selection).sum(params, args, argnums=moved)
        tangent = jnp.zeros_like(value)
        for i, grad in zip(moved, grads):
            tangent = tangent + jnp.vdot(grad, tangents[i]).astype(value.dtype)
        return value, tangent

    fn.defjvp(jvp, symbolic_zeros=True)
    return lambda params, selection, *args: fn(params, selection, args)


class _Elements:
    """The elements of one call: gather, evaluate, scatter, a chunk at a time.

    Operands are the leaves of the parameters and of the arguments, flat; all are gathered and
    scattered by the same two functions, with the specs of the parameters or of `in_axes`.
    """

    def __init__(self, call, element_fn, in_axes, chunk_size, selection):
        if selection.valid.ndim != 1:
            msg = (
                f"{call}: the selection has leaves of shape {selection.valid.shape}; inside a "
                "mapped function take this device's part, [E], first."
            )
            raise ValueError(msg)
        self.call, self.element_fn, self.in_axes = call, element_fn, in_axes
        self.selection = selection
        self.num_elements = selection.num_elements
        if chunk_size is None:
            chunk_size = 1 if jax.default_backend() == "cpu" else self.num_elements
        # As few chunks as the size allows, then as even as they can be: less padding.
        self.num_chunks = -(-self.num_elements // chunk_size)
        self.chunk = -(-self.num_elements // self.num_chunks)

    # ------------------------------------------------------------------------- the three callers

    def sum(self, params, args, argnums):
        """Sum of values, and of gradients of the operands in `argnums`, a list."""
        operands, specs, treedef = self._operands(params, args)
        operands = self._dropped(operands)
        fn = self._fn_of_leaves(treedef)
        zeros = [jnp.zeros_like(operands[i]) for i in argnums]
        value_type = self._value_type(fn, operands, specs)
        init = self._varying((jnp.zeros((), value_type.dtype), zeros), operands)
        operands = self._varying(operands, operands)

        def body(carry, xs):
            indices, valid = xs
            value, totals = carry
            values, grads = self._chunk(fn, operands, specs, indices, valid, argnums)
            value = value + jnp.sum(jnp.where(valid, values, 0))
            totals = [
                self._add(total, grad, specs[i], indices, valid)
                for i, total, grad in zip(argnums, totals, grads)
            ]
            return (value, totals), None

        value, totals = self._loop(body, init)[0]
        return value, [_kept(self._keep(i), total) for i, total in zip(argnums, totals)]

    def stack(self, params, args):
        """Values `[E]` and gradients `[E, ...]` of the parameters."""
        operands, specs, treedef = self._operands(params, args)
        operands = self._dropped(operands)
        fn = self._fn_of_leaves(treedef)
        self._value_type(fn, operands, specs)
        operands = self._varying(operands, operands)
        treedef = jax.tree.structure(params)
        argnums = range(treedef.num_leaves)

        def body(carry, xs):
            indices, valid = xs
            stacked = self._chunk(fn, operands, specs, indices, valid, argnums)

            def clean(y):
                ones = (1,) * (y.ndim - valid.ndim)
                return jnp.where(valid.reshape(*valid.shape, *ones), y, 0)

            values, grads = jax.tree.map(clean, stacked)
            kept = [self._seen(i, operands[i], specs[i], indices, valid.ndim) for i in argnums]
            return carry, (values, [_kept(k, grad) for k, grad in zip(kept, grads)])

        values, grads = self._rows(self._loop(body, None)[1])
        return values, treedef.unflatten(grads)

    # ------------------------------------------------------------------------------------- parts

    def _chunk(self, fn, operands, specs, indices, valid, argnums):
        """Values and gradients of the elements of a chunk, `[chunk]`, or of one element, `[]`."""
        if argnums:
            both = jax.value_and_grad(fn, tuple(argnums))
        else:
            both = lambda *seen: (fn(*seen), ())
        return self._map(both, operands, specs, indices, valid)

    def _map(self, fn, operands, specs, indices, valid):
        """`fn` of what the elements of a chunk see, or one element: gather and map."""
        lead = valid.ndim
        seen = [_gather_leaf(x, spec, indices, lead) for x, spec in zip(operands, specs)]
        if not lead:
            return fn(*seen)
        # Shared leaves are not repeated: the map passes them whole to every element.
        mapped = tuple(0 if _selected(spec, indices) else None for spec in specs)
        if 0 not in mapped:  # replicas of one whole
            repeat = lambda y: jnp.broadcast_to(y, (*valid.shape, *y.shape))
            return jax.tree.map(repeat, fn(*seen))
        return jax.vmap(fn, in_axes=mapped)(*seen)

    def _add(self, total, grad, spec, indices, valid):
        """Add the gradients of a chunk; of all elements, without a scatter where none meet."""
        if self.num_chunks > 1 or not valid.ndim or not self.selection._one_holder(spec):
            return _scatter_leaf(total, grad, spec, indices, valid)
        return _merge_leaf(grad, spec, *self.selection._owners(valid))[0].astype(total.dtype)

    def _keep(self, i):
        """The mask of an operand, None where nothing of it is dropped."""
        keep = self.selection.keep
        return keep[i] if keep is not None and i < len(keep) else None

    def _dropped(self, operands):
        return [_kept(self._keep(i), x) for i, x in enumerate(operands)]

    def _seen(self, i, x, spec, indices, lead):
        """An operand's mask as the elements of a chunk see it."""
        keep = self._keep(i)
        if keep is None:
            return None
        return _gather_leaf(_kept(keep, jnp.ones(x.shape, bool)), spec, indices, lead)

    def _rows(self, stacked):
        """What `_loop` has stacked chunk by chunk, a row an element."""
        if self.chunk > 1:
            stacked = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), stacked)
        return jax.tree.map(lambda y: y[: self.num_elements], stacked)

    def _fn_of_leaves(self, treedef):
        return lambda *leaves: self.element_fn(*treedef.unflatten(leaves))

    def _loop(self, body, init):
        """Scan over the chunks; one chunk, no scan."""
        # Padding repeats the last element, masked: one of zeros could make NaN, and a NaN gets past
        # a mask in second derivatives.
        places = np.arange(self.num_chunks * self.chunk)
        rows = np.minimum(places, self.num_elements - 1)
        shape = (self.num_chunks, *([self.chunk] if self.chunk > 1 else []))
        cut = lambda x: jnp.asarray(x)[rows.reshape(shape)]
        valid = cut(self.selection.valid) & (places < self.num_elements).reshape(shape)
        xs = jax.tree.map(cut, self._indices()), valid
        if self.num_chunks == 1:
            carry, out = body(init, jax.tree.map(lambda x: x[0], xs))
            return carry, jax.tree.map(lambda y: y[None], out)
        return jax.lax.scan(body, init, xs)

    def _operands(self, params, args):
        """Flat arrays, parameters first, their specs, and the tree `(params, *args)` they were."""
        _check_like(self.call, self.selection, params)
        in_axes = _each_in_axes(self.call, self.in_axes, args)
        specs = list(self.selection.specs)
        for i, (axes, arg) in enumerate(zip(in_axes, args)):
            spec = P() if axes is None else P(_ELEMENT) if axes == 0 else axes
            self._check_argument(i, spec, arg)
            specs += [spec] * len(jax.tree.leaves(arg))
        used = {name for spec in specs for name in spec or ()}
        unused = sorted(set(self.selection.indices) - used)
        if unused:
            msg = (
                f"{self.call}: the selection has indices of {unused}, which neither a parameter "
                f"nor in_axes={self.in_axes} names; every element would see the whole."
            )
            raise ValueError(msg)
        operands, treedef = jax.tree.flatten((params, *args))
        return [jnp.asarray(x) for x in operands], specs, treedef

    def _indices(self):
        return {**self.selection.indices, _ELEMENT: np.arange(self.num_elements, dtype=np.int32)}

    def _check_argument(self, i, spec, arg):
        sizes = {**self.selection.sizes, _ELEMENT: self.num_elements}
        for path, x in jax.tree_util.tree_leaves_with_path(arg):
            for d, name in enumerate(spec):
                if name is None:
                    continue
                where = f"argument {i}{keystr(path)} has shape {jnp.shape(x)}"
                if name not in self.selection.indices and name != _ELEMENT:
                    msg = (
                        f"{self.call}: in_axes names {name!r}, of which the selection has no index."
                    )
                    raise ValueError(msg)
                if d >= jnp.ndim(x) or jnp.shape(x)[d] != sizes[name]:
                    msg = (
                        f"{self.call}: {where}; dimension {d} must be {name!r}, of size "
                        f"{sizes[name]}."
                    )
                    raise ValueError(msg)

    def _value_type(self, fn, operands, specs):
        """Shape and dtype of an element's value, without computing it."""
        indices = {name: jnp.zeros(x.shape[1:], jnp.int32) for name, x in self._indices().items()}
        value = jax.eval_shape(
            lambda *xs: fn(*[_gather_leaf(x, s, indices, 0) for x, s in zip(xs, specs)]), *operands
        )
        if not hasattr(value, "shape") or value.shape != ():
            got = jax.tree.map(lambda v: f"{v.dtype}{list(v.shape)}", value)
            msg = (
                f"{self.call}: element_fn must return a scalar, got {got}. Sum inside it; if it is "
                "a mean, divide by the size of the whole batch, because elements are added."
            )
            raise ValueError(msg)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            msg = f"{self.call}: element_fn must return a floating scalar, got {value.dtype}."
            raise TypeError(msg)
        return value

    def _varying(self, tree, operands):
        return _vary(tree, (self.selection, operands))


def _vary(tree, over):
    """Make every leaf vary over the mapped axes that any leaf of `over` varies over.

    Under `shard_map(check_vma=True)` the derivative with respect to a replicated value is summed
    over devices by JAX; the contract is this device's sum. Shared leaves must therefore vary before
    they are differentiated, and a loop's carry from its start. A `where` with a varying mask does
    it, and XLA removes it.
    """
    mask = jnp.asarray(True)
    for x in jax.tree.leaves(over):
        if jnp.size(x):
            x = jax.random.key_data(x) if _is_key(x) else x
            mask = mask | jnp.ravel(x)[0].astype(bool)
    return jax.tree.map(lambda x: jnp.where(mask, x, x), tree)


def _is_key(x):
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _each_in_axes(call, in_axes, args):
    """`in_axes` as a tuple, one of None, 0 or a `PartitionSpec` for each argument."""
    if not isinstance(in_axes, tuple) or isinstance(in_axes, P):
        in_axes = (in_axes,) * len(args)
    if len(in_axes) != len(args):
        msg = f"{call}: in_axes has {len(in_axes)} entries for {len(args)} arguments."
        raise ValueError(msg)
    for i, axes in enumerate(in_axes):
        if not (axes is None or isinstance(axes, P) or (type(axes) is int and axes == 0)):
            msg = (
                f"{call}: in_axes[{i}] is {axes!r}; write None, 0 or a PartitionSpec of axis names "
                "of the selection."
            )
            raise ValueError(msg)
    return in_axes


def _check_chunk_size(call, chunk_size):
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        msg = f"{call}(chunk_size={chunk_size}): write a positive integer, or None."
        raise ValueError(msg)
