"""The quadratic model of a sum of elements: what it costs, and products with its Hessian."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from psjax._selection import Selection
from psjax._types import Params
from psjax.quasi_newton._flat import Flat
from psjax.quasi_newton._updates import of_matrices, product


def approximation_bytes(
    selection: Selection | Sequence[Selection], params: Params, memory: int | None = None
) -> int:
    r"""Bytes that the approximations of the elements' Hessians take.

    A matrix for every element, $\sum_e m_e^2$ numbers, or with `memory=k` pairs of vectors,
    $2 k \sum_e m_e$.

    Args:
      selection: the elements; or a sequence, one per kind of element.
      params: the parameters, or `jax.ShapeDtypeStruct`s of them.
      memory: as in `minimize`.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.zeros(1000)
      >>> pairs = psjax.select(P("i"), {"i": [[i, i + 1] for i in range(999)]}, like=w)
      >>> psjax.quasi_newton.approximation_bytes(pairs, w)  # 999 matrices of 2 x 2 float32
      15984
    """
    total = 0
    for s in [selection] if isinstance(selection, Selection) else selection:
        flat = Flat(s, params)
        numbers = flat.size if memory is None else 2 * memory
        total += s.num_elements * flat.size * numbers * jnp.dtype(flat.dtype).itemsize
    return total


def operator(
    approximation: Any, selection: Selection | Sequence[Selection], params: Params, update: str
) -> Callable[[Any], Any]:
    r"""Products with the model's Hessian.

    It is $\sum_e U_e^\top B_e U_e$ with a matrix $B_e$ per element.

    Args:
      approximation: `state.approximation` of `minimize`; or matrices `[E, m, m]`, as
        `element_hessian` returns them (a sequence of them, one per kind of element).
      selection: the elements; or a sequence, one per kind.
      params: the parameters, or `jax.ShapeDtypeStruct`s of them.
      update: the rule that made the approximation.

    Returns:
      A function of a tree like `params` that returns such a tree; it is linear and symmetric: for
      `lineax.FunctionLinearOperator`, or `jax.scipy.sparse.linalg.cg`.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.array([1., 2., 3.])
      >>> s = psjax.select(P("i"), {"i": [[0, 1], [1, 2]]}, like=w)
      >>> matrices = psjax.quasi_newton.element_hessian(lambda u: u[0] * u[1] ** 2)(w, s)
      >>> psjax.quasi_newton.operator(matrices, s, w, "exact")(jnp.array([1., 0., 0.]))
      Array([0., 4., 0.], dtype=float32)
    """
    one = isinstance(selection, Selection)
    kinds = [(selection, approximation)] if one else list(zip(selection, approximation))
    flats = [Flat(s, params) for s, _ in kinds]
    products = []
    for _, b in kinds:
        products.append(product(update, of_matrices(b) if isinstance(b, jax.Array) else b))

    def multiply(v: Any) -> Any:
        images = [flat.scatter_add(times(flat.gather(v))) for flat, times in zip(flats, products)]
        return jax.tree.map(lambda *xs: sum(xs), *images)

    return multiply
