"""The sum of all kinds of elements, over all devices: value, gradient, and Hessians."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from psjax._selection import Selection
from psjax._separable import element_value_and_grad, value_and_grad
from psjax._types import Params
from psjax.quasi_newton import _updates
from psjax.quasi_newton._flat import Flat
from psjax.quasi_newton._hessian import element_gauss_newton, element_hessian, hessian_operator
from psjax.quasi_newton._model import operator


class Point(NamedTuple):
    """A point, and what is known of the sum there."""

    params: Any
    value: Array
    gradient: Any
    of_elements: list[Array]  # gradients [E, m] of every kind; empty where no rule needs them


class Total:
    """The sum of all kinds of elements, over all devices, and the Hessian of its model."""

    def __init__(
        self,
        fns: Sequence[Any],
        selections: Sequence[Selection],
        args: Sequence[tuple[Any, ...]],
        like: Params,
        update: str,
        in_axes: Any,
        chunk_size: int | None,
        axis_name: str | None,
    ):
        self.kinds = list(zip(fns, selections, args, strict=True))
        self.selections, self.like, self.update = selections, like, update
        self.flats = [Flat(s, like) for s in selections]
        self.options, self.axis_name = (in_axes, chunk_size), axis_name
        self.by_element = update in ("sr1", "bfgs")

    def evaluate(self, params: Params) -> Point:
        """Value and gradient at a point."""
        found = [self._of_kind(flat, params, *kind) for flat, kind in zip(self.flats, self.kinds)]
        values, gradients, of_elements = zip(*found)
        value, gradient = self.total((_sum(values), _sum(gradients)))
        return Point(params, value, gradient, list(of_elements) if self.by_element else [])

    def _of_kind(self, flat: Flat, params: Params, fn: Any, selection: Selection, args: Any):
        if not self.by_element:
            value, gradient = value_and_grad(fn, *self.options)(params, selection, *args)
            return value, gradient, None
        values, gradients = element_value_and_grad(fn, *self.options)(params, selection, *args)
        gradient = selection.scatter_add(gradients, params)
        vectors = flat.vectors(gradients)
        own = jnp.where(flat.real(), vectors, jnp.zeros_like(vectors))
        return jnp.sum(values), gradient, own

    def start(self, at: Point, memory: int | None, start: str) -> list[Any]:
        """Approximations to begin with."""
        found = [_updates.start(g, memory) for g in at.of_elements]
        if start == "identity":
            return found
        of_kind = lambda fn, s, args: element_hessian(fn, *self.options)(at.params, s, *args)
        return [_updates.of_matrices(of_kind(*kind)) for kind in self.kinds]

    def multiply(self, params: Params, approximation: list[Any]) -> Callable[[Any], Any]:
        """Products with the Hessian of the model at a point."""
        if self.update == "exact":
            products = [
                hessian_operator(fn, *self.options)(params, s, *args) for fn, s, args in self.kinds
            ]
            return lambda v: self.total(_sum([product(v) for product in products]))
        if self.update == "gauss_newton":
            of_kind = lambda fn, s, args: element_gauss_newton(fn, *self.options)(params, s, *args)
            approximation = [of_kind(*kind) for kind in self.kinds]
        product = operator(approximation, self.selections, self.like, self.update)
        return lambda v: self.total(product(v))

    def learn(self, approximation: list[Any], step: Params, before: Point, after: Point):
        """The approximations after a step, and the share of the elements that were updated."""
        new, count, number = [], jnp.zeros(()), jnp.zeros(())
        for flat, b, old, gradient in zip(
            self.flats, approximation, before.of_elements, after.of_elements
        ):
            b, good = _updates.updated(self.update, b, flat.gather(step), gradient - old)
            new.append(b)
            count += jnp.sum(good)
            number += jnp.sum(jnp.asarray(flat.selection.valid))
        count, number = self.total((count, number))
        return new, count / jnp.maximum(number, 1)

    def total(self, tree: Any) -> Any:
        """Summed over the devices."""
        return tree if self.axis_name is None else jax.lax.psum(tree, self.axis_name)


def _sum(trees: Sequence[Any]):
    return jax.tree.map(lambda *xs: sum(xs[1:], xs[0]), *trees)
