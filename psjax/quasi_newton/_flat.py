"""What elements see, as vectors: a tree of leaves `[E, ...]` as one array `[E, m]`, and back."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from psjax._selection import Selection
from psjax._types import Params


class Flat:
    """The vectors $U_e w$ of the elements of a selection.

    Attributes:
      size: m, entries of a vector, padding included.
      dtype: the widest of the leaves'.
    """

    def __init__(self, selection: Selection, like: Params):
        self.selection, self.like = selection, jax.eval_shape(lambda x: x, like)
        seen = jax.eval_shape(selection.gather, like)
        leaves, self._treedef = jax.tree.flatten(seen)
        self._shapes = [x.shape[1:] for x in leaves]
        self._dtypes = [x.dtype for x in leaves]
        self.size = sum(map(math.prod, self._shapes))
        self.dtype = jnp.result_type(*self._dtypes)

    def vectors(self, tree: Any) -> Float[Array, "E m"]:
        """`[E, ...] -> [E, m]`."""
        rows = [x.astype(self.dtype).reshape(len(x), -1) for x in jax.tree.leaves(tree)]
        return jnp.concatenate(rows, axis=1)

    def tree(self, vectors: Float[Array, "E m"]) -> Any:
        """`[E, m] -> [E, ...]`."""
        return self._tree(vectors, vectors.shape[:1])

    def one(self, vector: Float[Array, " m"]) -> Any:
        """`[m] -> [...]`: the parameters of one element."""
        return self._tree(vector, ())

    def _tree(self, vectors: Array, lead: tuple[int, ...]):
        leaves, start = [], 0
        for shape, dtype in zip(self._shapes, self._dtypes):
            stop = start + math.prod(shape)
            leaves.append(vectors[..., start:stop].reshape(*lead, *shape).astype(dtype))
            start = stop
        return self._treedef.unflatten(leaves)

    def gather(self, tree: Params) -> Float[Array, "E m"]:
        """$U_e v$ of a tree like the parameters."""
        return self.vectors(self.selection.gather(tree))

    def scatter_add(self, vectors: Float[Array, "E m"]) -> Params:
        r"""$\sum_e U_e^\top x_e$."""
        return self.selection.scatter_add(self.tree(vectors), self.like)

    def real(self) -> Bool[Array, "E m"]:
        """False for padding, for what is dropped, and for elements that are not valid."""
        ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), self.like)
        return self.gather(ones) != 0
