"""How many weights elements see, and how many two elements share.

They are counted per leaf and per axis on the host, from the rows of the elements. No matrix over
all weights is made. The public names are in `psjax.structure`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from psjax._like import check_like
from psjax._selection import Selection
from psjax._types import Params


def num_weights(selection: Selection, like: Any) -> np.ndarray:
    """Count the weights that each element of a selection sees: `int64[E]`.

    Padding does not count, and neither do weights that `Selection.drop` dropped.

    Args:
      selection: the index sets, with masks, if any, that are not traced.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
    """
    E, held = selection.num_elements, _rows("num_weights", selection, like)
    sizes = np.zeros(E, np.int64)
    for names, table in _tables(selection, like):
        same, other = _same(names, table)
        ndim, shape = len(other), [n for n in table.shape if n > 1]
        padded = np.zeros([n + 1 for n in shape], np.int64)  # padding points past the end
        padded[tuple(slice(n) for n in shape)] = table.reshape(shape)
        mesh = [
            held[name].reshape(E, *[-1 if k == d else 1 for k in range(ndim)])
            for d, name in enumerate(other)
        ]
        kept = np.reshape(padded[tuple(mesh)], (E if ndim else 1, -1)).sum(axis=1)
        for name in same:
            kept = kept * np.sum(held[name] < selection.sizes[name], axis=1)
        sizes += kept
    return np.where(selection.valid, sizes, 0)


def overlap(selection: Selection, like: Any) -> np.ndarray:
    r"""Count the weights that every two elements share: `int64[E, E]`, the ones in $U_e U_f^\top$.

    The diagonal is `num_weights`. Two elements with 0 can be evaluated together. The count goes
    axis by axis, from the rows that two elements share. Memory `[E, rows]` is needed only for axes
    along which a mask of `Selection.drop` differs.

    Args:
      selection: the index sets, with masks, if any, that are not traced.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
    """
    E, rows = selection.num_elements, _rows("overlap", selection, like)
    held = {}
    for name, index in rows.items():  # in floating point, for faster products
        held[name] = np.zeros((E, selection.sizes[name] + 1))
        np.put_along_axis(held[name], index, 1.0, axis=1)
        held[name] = held[name][:, :-1]
    common = {name: x @ x.T for name, x in held.items()}
    total = np.zeros((E, E))
    for names, table in _tables(selection, like):
        same, other = _same(names, table)
        grid = np.ones((E, 1))
        for name in other:
            grid = (grid[:, :, None] * held[name][:, None, :]).reshape(E, -1)
        total += math.prod((common[name] for name in same), start=(grid * table.ravel()) @ grid.T)
    valid = np.asarray(selection.valid)
    return np.where(valid[:, None] & valid, total, 0).astype(np.int64)


def _rows(call: str, selection: Selection, like: Params):
    """The rows of every axis that each element sees, `[E, m]`, on the host."""
    if selection.valid.ndim != 1:
        msg = (
            f"{call}(selection): the selection has leaves of shape {selection.valid.shape}; pass "
            "the selection before split, [E]."
        )
        raise ValueError(msg)
    check_like(call, selection, like)
    in_params = {name for spec in selection.specs for name in spec or ()}
    return {
        name: np.asarray(index).reshape(selection.num_elements, -1)
        for name, index in selection.indices.items()
        if name in in_params
    }


def _tables(selection: Selection, like: Params):
    """Per leaf, the selected axes and a table with the number of kept weights in their rows.

    A table has one dimension per axis; its size is 1 if the numbers are equal in all rows.
    """
    for spec, x, keep in zip(
        selection.specs,
        jax.tree.leaves(like),
        selection.keep or [None] * len(selection.specs),
        strict=True,
    ):
        names = [*(spec or ()), *[None] * (len(x.shape) - len(spec or ()))]
        mask = np.ones((), bool) if keep is None else np.asarray(keep)
        mask = mask.reshape((1,) * (len(names) - mask.ndim) + mask.shape)
        rest = tuple(d for d, name in enumerate(names) if name not in selection.indices)
        times = math.prod(x.shape[d] for d in rest if mask.shape[d] == 1)
        own = [name for name in names if name in selection.indices]
        yield own, mask.sum(axis=rest, dtype=np.int64) * times


def _same(names: Sequence[str], table: np.ndarray | np.integer):
    """The axes along which a table does not change, and the others."""
    same = [name for name, n in zip(names, table.shape) if n == 1]
    return same, [name for name, n in zip(names, table.shape) if n > 1]
