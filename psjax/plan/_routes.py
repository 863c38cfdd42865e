"""Which rows of the weights each worker sends to each other worker, per turn."""

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
    """Which rows each worker sends to each other worker, per turn.

    `shifts` lists `(distance, rows)`: worker w gets `rows` rows from worker w - distance.
    """

    def __init__(self, plan: Plan, store: Store):
        W, T, s = plan.classes.shape
        owner, row = np.zeros((2, store.num_classes), int)
        w, i = np.nonzero(store.rows < store.num_classes)
        owner[store.rows[w, i]], row[store.rows[w, i]] = w, i
        w, t, place = np.nonzero(plan.classes < store.num_classes)
        c = plan.classes[w, t, place]
        d = (w - owner[c]) % W
        key = (d * T + t) * W + w  # what a worker gets from another in a turn, by place
        order = np.argsort(key, kind="stable")
        ends = np.flatnonzero(np.append(key[order][1:] != key[order][:-1], True)) + 1
        counts = np.diff(ends, prepend=0)
        rank = np.arange(len(key)) - np.repeat(ends - counts, counts)
        d, t, w, place, c = (x[order] for x in (d, t, w, place, c))
        widths = np.zeros(W, int)
        np.maximum.at(widths, d[ends - 1], counts)
        # One all_to_all sends equally many rows to every worker, and keeps as many.
        self.by_all_to_all = W > 2 and int(widths[1:].sum()) >= (W - 1) * int(widths.max())
        if self.by_all_to_all:
            widths[:] = widths.max()
        self.num_workers, self.num_turns, self.block_size = W, T, s
        self.num_rows = store.rows.shape[1]
        self.shifts = tuple((d, int(n)) for d, n in enumerate(widths) if n)
        self._moves = d, t, w, rank, row[c], place

    @functools.cached_property
    def tables(self):
        """For each of `shifts`, which rows are sent, and to which places.

        `send` is int32 `[T, W, rows]`, rows of the owner's shard, padded with m. `put` is int32
        `[T, W, rows]`, places in the worker's task, padded with s.
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
        """Class rows that a worker sends, and receives, per turn, including padding."""
        return sum(width for d, width in self.shifts if d)

    def fetch(self, tables: Sequence[Rows], own: Array, axis_name: AxisName | None):
        """Fetch the rows `[s, p]` of this worker's task from the shards `[m, p]` of all workers."""
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
        """The transpose: add the task's gradients `[s, p]` to `[m, p]` at their owners.

        A `psjax.codec` wire, if there is one, encodes them.
        """
        sent = [gather_leaf(grads, ROW, {"row": table["put"]}, 0, {}) for table in tables]
        move = lambda xs: self._move(xs, axis_name, -1)
        return _add_rows(
            total, move(sent) if wire is None else wire.rows(sent, move), tables, "send"
        )

    def _move(self, sent: Sequence[Array], axis_name: AxisName | None, direction: int):
        """Send the rows of each distance to the worker at that distance, or back."""
        W = self.num_workers
        if not self.by_all_to_all:
            return [
                jax.lax.ppermute(x, axis_name, [(w, (w + direction * d) % W) for w in range(W)])
                if d
                else x
                for (d, _), x in zip(self.shifts, sent)
            ]
        me, distances = jax.lax.axis_index(axis_name), jnp.arange(W)
        x = jnp.stack(sent)  # by distance; the receiver is me + direction * distance
        x = x[(direction * (distances - me)) % W]
        x = jax.lax.all_to_all(x, axis_name, 0, 0)  # by sender
        return list(x[(me - direction * distances) % W])


def _add_rows(total: Array, moved: Sequence[Array], tables: Sequence[Rows], name: str):
    for table, y in zip(tables, moved):
        total = scatter_leaf(total, y, ROW, {"row": table[name]}, jnp.asarray(True), {})
    return total
