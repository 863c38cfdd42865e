"""Which rows of the weights go from which worker to which, turn by turn."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from psjax._leaf import gather_leaf, scatter_leaf
from psjax._types import AxisName, Rows
from psjax.plan._plan import Plan
from psjax.plan._store import ROW, Store


class Routes:
    """Which rows go from whom to whom, turn by turn.

    `shifts` lists `(distance, rows)`: worker w gets so many rows of worker w - distance.
    """

    def __init__(self, plan: Plan, store: Store):
        W, T, s = plan.classes.shape
        owner, row = np.zeros((2, store.num_classes), int)
        w, i = np.nonzero(store.rows < store.num_classes)
        owner[store.rows[w, i]], row[store.rows[w, i]] = w, i
        w, t, place = np.nonzero(plan.classes < store.num_classes)
        c = plan.classes[w, t, place]
        d = (w - owner[c]) % W
        key = (d * T + t) * W + w  # what a worker gets of another in a turn, in the order of places
        order = np.argsort(key, kind="stable")
        ends = np.flatnonzero(np.append(key[order][1:] != key[order][:-1], True)) + 1
        counts = np.diff(ends, prepend=0)
        rank = np.arange(len(key)) - np.repeat(ends - counts, counts)
        d, t, w, place, c = (x[order] for x in (d, t, w, place, c))
        widths = np.zeros(W, int)
        np.maximum.at(widths, d[ends - 1], counts)
        # One all_to_all sends as many rows to everybody, and keeps as many at home.
        self.by_all_to_all = W > 2 and int(widths[1:].sum()) >= (W - 1) * int(widths.max())
        if self.by_all_to_all:
            widths[:] = widths.max()
        self.num_workers, self.num_turns, self.block_size = W, T, s
        self.num_rows = store.rows.shape[1]
        self.shifts = tuple((d, int(n)) for d, n in enumerate(widths) if n)
        self._moves = d, t, w, rank, row[c], place

    @functools.cached_property
    def tables(self):
        """For each of `shifts`, which rows and where to, of one shape.

        `send` int32 `[T, W, rows]`, rows of the owner's shard (m for none), and `put` int32
        `[T, W, rows]`, places in the worker's task (s for none).
        """
        W, T, tables = self.num_workers, self.num_turns, []
        for distance, width in self.shifts:
            _, t, w, rank, row, place = (x[self._moves[0] == distance] for x in self._moves)
            send = np.full((T, W, width), self.num_rows, np.int32)
            put = np.full((T, W, width), self.block_size, np.int32)
            send[t, (w - distance) % W, rank], put[t, w, rank] = row, place
            tables.append({"send": send, "put": put})
        return tables

    @property
    def rows_sent(self) -> int:
        """Rows of one class that a worker sends, and receives, at each turn, padding included."""
        return sum(width for d, width in self.shifts if d)

    def fetch(self, tables: Sequence[Rows], own: Array, axis_name: AxisName | None):
        """`[m, p]` of every worker to the `[s, p]` of this worker's task."""
        sent = [gather_leaf(own, ROW, {"row": table["send"]}, 0, {}) for table in tables]
        moved = self._move(sent, axis_name, 1)
        zeros = jnp.zeros((self.block_size, *own.shape[1:]), own.dtype)
        return _add_rows(zeros, moved, tables, "put")

    def give_back(
        self,
        tables: Sequence[Rows],
        grads: Array,
        total: Array,
        axis_name: AxisName | None,
        wire: Any = None,
    ):
        """The transpose: gradients `[s, p]` of the task, added to the `[m, p]` of their owners.

        They go over a `psjax.codec` wire, encoded, if there is one.
        """
        sent = [gather_leaf(grads, ROW, {"row": table["put"]}, 0, {}) for table in tables]
        move = lambda xs: self._move(xs, axis_name, -1)
        return _add_rows(
            total, move(sent) if wire is None else wire.rows(sent, move), tables, "send"
        )

    def _move(self, sent: Sequence[Array], axis_name: AxisName | None, direction: int):
        """Rows for each distance to the worker at that distance, or back."""
        W = self.num_workers
        if not self.by_all_to_all:
            return [
                jax.lax.ppermute(x, axis_name, [(w, (w + direction * d) % W) for w in range(W)])
                if d
                else x
                for (d, _), x in zip(self.shifts, sent)
            ]
        me, distances = jax.lax.axis_index(axis_name), jnp.arange(W)
        x = jnp.stack(sent)  # by distance; to whom is me + direction * distance
        x = x[(direction * (distances - me)) % W]
        x = jax.lax.all_to_all(x, axis_name, 0, 0)  # from whom
        return list(x[(me - direction * distances) % W])


def _add_rows(total: Array, moved: Sequence[Array], tables: Sequence[Rows], name: str):
    for table, y in zip(tables, moved):
        total = scatter_leaf(total, y, ROW, {"row": table[name]}, jnp.asarray(True), {})
    return total
