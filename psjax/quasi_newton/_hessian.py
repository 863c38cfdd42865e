"""Second derivatives of single elements, and of their sum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from psjax._elements import over_chunks, view
from psjax._placement import whole
from psjax._selection import Selection
from psjax._separable import value_and_grad
from psjax._types import ElementFn, Params
from psjax.quasi_newton._flat import Flat


class SumOfSquares:
    r"""An element function that is half a sum of squares.

    It is $\hat f(u) = \frac12 \lVert r(u) \rVert^2$ with residuals r.
    With this as `element_fn`, `minimize(..., update="gauss_newton")` uses $J^\top J$, with $J$ the
    Jacobian of r, in the place of the Hessian.

    Args:
      residual_fn: `residual_fn(element_params, *args) -> r`, an array of any shape.

    Attributes:
      residual_fn: as given.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> element = psjax.quasi_newton.SumOfSquares(lambda u: u - 3.0)
      >>> element(jnp.array([1.0, 2.0]))
      Array(2.5, dtype=float32)
    """

    def __init__(self, residual_fn: Callable[..., Any]):
        self.residual_fn = residual_fn

    def __call__(self, params: Params, *args: Any) -> Float[Array, ""]:
        return jnp.sum(self.residual_fn(params, *args) ** 2) / 2


def element_hessian(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., jax.Array]:
    r"""The Hessian of every element.

    It is $\nabla^2 \hat f_e(U_e w)$, and the Hessian of the sum is
    $\sum_e U_e^\top \nabla^2 \hat f_e U_e$; `operator` multiplies with it.

    Args:
      element_fn: as in `psjax.value_and_grad`, twice differentiable.
      in_axes: as in `psjax.value_and_grad`.
      chunk_size: elements evaluated at once; None: all.

    Returns:
      A function `(params, selection, *args) -> [E, m, m]`, where an element sees m entries: its
      leaves one after the other, each in row-major order. Zero for elements that are not valid.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.array([1., 2., 3.])
      >>> s = psjax.select(P("i"), {"i": [[0, 1], [1, 2]]}, like=w)
      >>> psjax.quasi_newton.element_hessian(lambda u: u[0] * u[1] ** 2)(w, s)
      Array([[[0., 4.],
              [4., 2.]],
      <BLANKLINE>
             [[0., 6.],
              [6., 4.]]], dtype=float32)
    """
    return _of_elements("element_hessian", element_fn, jax.hessian, in_axes, chunk_size)


def element_gauss_newton(
    element_fn: SumOfSquares, in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., jax.Array]:
    r"""The Gauss–Newton matrix of every element, $J_e^\top J_e$ with the Jacobian of its residuals.

    Args:
      element_fn: a `SumOfSquares`.
      in_axes: as in `psjax.value_and_grad`.
      chunk_size: elements evaluated at once; None: all.

    Returns:
      A function `(params, selection, *args) -> [E, m, m]`, as `element_hessian`.

    Raises:
      TypeError: another `element_fn`.
    """
    if not isinstance(element_fn, SumOfSquares):
        msg = (
            f"element_gauss_newton(element_fn={element_fn!r}): pass "
            "psjax.quasi_newton.SumOfSquares(residual_fn), whose Jacobian it uses."
        )
        raise TypeError(msg)

    def product(residuals: Callable[[Array], Any]):
        def at(u: Array):
            jacobian = jax.jacobian(lambda u: jnp.ravel(residuals(u)))(u)
            return jacobian.T @ jacobian

        return at

    return _of_elements(
        "element_gauss_newton", element_fn.residual_fn, product, in_axes, chunk_size
    )


def _of_elements(
    call: str,
    fn: ElementFn,
    second: Callable[[Callable[[Array], Any]], Callable[[Array], Array]],
    in_axes: Any,
    chunk_size: int | None,
):
    def of_elements(params: Params, selection: Selection, *args: Any):
        flat = Flat(selection, params)
        operands = whole((params, *args))
        seen = view(call, selection, in_axes, params, args)
        leaves, treedef = jax.tree.flatten(operands)
        leaves = seen.masked([jnp.asarray(x) for x in leaves])
        count = jax.tree.structure(params).num_leaves

        def one(*own: Array):
            vector = flat.vectors([x[None] for x in own[:count]])[0]

            def of_vector(u: Array):
                mine = jax.tree.leaves(flat.one(u))
                return fn(*treedef.unflatten([*mine, *own[count:]]))

            return second(of_vector)(vector)

        body = lambda _, part, leaves: (None, part.map(one, leaves))
        size = selection.num_elements if chunk_size is None else chunk_size
        _, matrices = over_chunks(seen, size, body, None, leaves)
        real = flat.real()
        keep = real[:, :, None] & real[:, None, :]
        return jnp.where(keep, matrices, jnp.zeros_like(matrices))

    return of_elements


def hessian_operator(
    element_fn: Callable[..., Any], in_axes: Any = None, chunk_size: int | None = None
) -> Callable[..., Callable[[Any], Any]]:
    r"""Products with the Hessian of the sum.

    It is $\sum_e U_e^\top \nabla^2 \hat f_e U_e$, from second derivatives of the elements.
    Forward over reverse: a product costs about two gradients, and no matrix is formed.

    Args:
      element_fn: as in `psjax.value_and_grad`, twice differentiable.
      in_axes: as in `psjax.value_and_grad`.
      chunk_size: as in `psjax.value_and_grad`.

    Returns:
      A function `(params, selection, *args) -> product`, with `product(v)` a tree like `params`,
      linear in the tree `v`; for `lineax.FunctionLinearOperator`, or `jax.scipy.sparse.linalg.cg`.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.array([1., 2., 3.])
      >>> s = psjax.select(P("i"), {"i": [[0, 1], [1, 2]]}, like=w)
      >>> product = psjax.quasi_newton.hessian_operator(lambda u: u[0] * u[1] ** 2)(w, s)
      >>> product(jnp.array([1., 0., 0.]))
      Array([0., 4., 0.], dtype=float32)
    """
    of_sum = value_and_grad(element_fn, in_axes, chunk_size)

    def at(params: Params, selection: Selection, *args: Any):
        gradient = lambda w: of_sum(w, selection, *args)[1]
        _, product = jax.linearize(gradient, params)
        return product

    return at
