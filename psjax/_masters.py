r"""Weights in shards over the workers: fetch what a task needs, send its gradient home.

Section 5.4 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned
neural network training*, G-2023-36: "C + 1 master nodes can be utilized, with one storing the
common weights to all scores and the remaining C nodes storing the distinct weights of each score".
Here the workers are the masters: each has a share of the classes and 1/W of the common weights.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from psjax._leaf import _gather_leaf, _scatter_leaf
from psjax._select import _axis_sizes
from psjax._selection import _is_spec
from psjax._separable import _vary

_ROW = P("row")


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """Where the weights of a model live among W workers, as arrays that shard along dimension 0.

    A leaf with the class axis is kept class by class, `[W * m, ...]` with `m = ceil(C / W)`: the
    rows `w * m, ..., w * m + m - 1` are those of worker w, the last ones zeros where W does not
    divide C. Any other leaf is flat, `[W * ceil(size / W)]`; a scalar stays as it is, on every
    worker. Optimizers that treat entries alike run on these arrays as they are, each entry where it
    lives; those that need a norm run outside `shard_map`, on the sharded arrays.

    Args:
      axes: tree of `PartitionSpec`s as in `psjax.select`.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
      num_workers: W.
      axis: name of the class axis.

    Raises:
      ValueError: fewer than one worker; a class axis that no parameter has; axes that do not fit.
    """

    axes: Any
    like: Any
    num_workers: int
    axis: str = "class"

    def __post_init__(self):
        specs, _, sizes = _axis_sizes(self.axes, self.like)
        object.__setattr__(self, "axes", jax.tree.structure(self.like).unflatten(specs))
        if self.axis not in sizes:
            msg = f"Store(axis={self.axis!r}): no parameter has this axis; write one of {sizes}."
            raise ValueError(msg)
        if self.num_workers < 1:
            msg = f"Store(num_workers={self.num_workers}): write 1 worker or more."
            raise ValueError(msg)

    @functools.cached_property
    def num_classes(self) -> int:
        """C."""
        return _axis_sizes(self.axes, self.like)[2][self.axis]

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Which class is where: int32 `[W, m]`, C for an empty row."""
        parts = np.array_split(np.arange(self.num_classes, dtype=np.int32), self.num_workers)
        rows = np.full((self.num_workers, len(parts[0])), self.num_classes, np.int32)
        for w, part in enumerate(parts):
            rows[w, : len(part)] = part
        return rows

    def shard(self, tree: Any, axes: Any = None) -> Any:
        """From a whole tree to the arrays of the store; on the host or in `jit`.

        Args:
          tree: like the parameters, or another tree whose `axes` are given.
          axes: `PartitionSpec`s of the tree; None: the parameters'. For an optimizer's state,
            `psjax.ist.state_axes(optimizer, axes, like)`.
        """
        rows = self.rows.ravel()

        def leaf(spec, x):
            if not jnp.ndim(x):
                return x
            d = self._class_dim(spec)
            if d is None:
                x = x.reshape(-1)
                pad = -x.size % self.num_workers
                return jnp.pad(x, (0, pad))
            return _gather_leaf(jnp.moveaxis(jnp.asarray(x), d, 0), _ROW, {"row": rows}, 0)

        return jax.tree.map(leaf, self.axes if axes is None else axes, tree, is_leaf=_is_spec)

    def whole(self, tree: Any, like: Any = None, axes: Any = None) -> Any:
        """From the arrays of the store to the whole tree; the inverse of `shard`.

        Args:
          tree: what `shard` returns.
          like: arrays or `jax.ShapeDtypeStruct`s of the whole shapes; None: the parameters.
          axes: as in `shard`.
        """
        rows = self.rows.ravel()
        places = np.argsort(rows, kind="stable")[: self.num_classes]

        def leaf(spec, x, like):
            if not jnp.ndim(like):
                return x
            d = self._class_dim(spec)
            if d is None:
                return jnp.asarray(x)[: int(np.prod(like.shape))].reshape(like.shape)
            return jnp.moveaxis(jnp.asarray(x)[places], 0, d)

        axes = self.axes if axes is None else axes
        like = self.like if like is None else like
        return jax.tree.map(leaf, axes, tree, like, is_leaf=_is_spec)

    def specs(self, tree: Any, axis_name: str) -> Any:
        """`PartitionSpec`s of a tree of the store's arrays, for `jax.shard_map` or `device_put`."""
        return jax.tree.map(lambda x: P(axis_name) if jnp.ndim(x) else P(), tree)

    # ------------------------------------------- inside a mapped function, on a worker's own part

    def fetch_common(self, shards: Any, axis_name: str) -> list[jax.Array | None]:
        """The leaves without a class axis, whole, by one all-gather; None for the others."""
        places, leaves = self._common(shards)
        sizes = [x.size for x in leaves]
        whole = list(jax.tree.leaves(shards))
        out: list[jax.Array | None] = [x if not x.ndim else None for x in whole]
        for group in _by_dtype(leaves):
            flat = jnp.concatenate([leaves[i] for i in group])
            flat = jax.lax.all_gather(flat, axis_name)  # [W, all shares]
            ends = np.cumsum([sizes[i] for i in group])[:-1]
            for i, x in zip(group, jnp.split(flat, ends, axis=1)):
                shape = self._flat_like[places[i]].shape
                out[places[i]] = x.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        return out

    def return_common(self, grads: list[jax.Array | None], axis_name: str) -> list:
        """The sum over the workers of such leaves, each share where it lives.

        An all-to-all and a sum, which is what a reduce-scatter sends.
        """
        W = self.num_workers
        out: list[jax.Array | None] = [None] * len(grads)
        flat = {}
        for i, g in enumerate(grads):
            if g is not None and g.ndim:
                g = jnp.pad(g.reshape(-1), (0, -g.size % W))
                flat[i] = g.reshape(W, -1)
            elif g is not None:
                out[i] = jax.lax.psum(g, axis_name)
        keys = list(flat)
        for group in _by_dtype([flat[i] for i in keys]):
            group = [keys[i] for i in group]
            packed = jnp.concatenate([flat[i] for i in group], axis=1)
            total = jnp.sum(jax.lax.all_to_all(packed, axis_name, 0, 0), axis=0)
            ends = np.cumsum([flat[i].shape[1] for i in group])[:-1]
            for i, x in zip(group, jnp.split(total, ends)):
                out[i] = x
        return out

    def _common(self, shards):
        """Places among all leaves, and the shares, of leaves that are flat."""
        leaves = jax.tree.leaves(shards)
        places = [i for i, x in enumerate(leaves) if i not in self._class_dims and x.ndim]
        return places, [leaves[i] for i in places]

    def _class_dim(self, spec):
        return next((d for d, name in enumerate(spec or ()) if name == self.axis), None)

    @functools.cached_property
    def _specs(self):
        return _axis_sizes(self.axes, self.like)[0]

    @functools.cached_property
    def _flat_like(self):
        return jax.tree.leaves(self.like)

    @functools.cached_property
    def _class_dims(self) -> dict[int, int]:
        """Which leaf, counted flat, has the class axis, and where."""
        dims = {i: self._class_dim(spec) for i, spec in enumerate(self._specs)}
        return {i: d for i, d in dims.items() if d is not None}


def value_and_grad(
    element_fn: Callable[..., Any], plan: Any, store: Store, axis_name: str
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient of a partially-separable loss by a plan, the weights in shards.

    Every turn a worker fetches the classes of its task from those who have them, evaluates, and
    sends the gradient back, which is added where the weights live: $\sum_e U_e^\top g_e$. The
    common weights come by one all-gather and return by one all-to-all a step. Classes come by
    `ppermute`, one for each distance between owner and worker, or by one `all_to_all` where that
    sends no more (`Table` says how much).

    Args:
      element_fn: `element_fn(params, batch, pairs)`, a scalar: `params` is the tree of a model with
        s classes, `batch` has leaves `[l, S, ...]`, `pairs` is bool `[l, s]` of (label, other);
        `psjax.losses.block` is made for it. Elements are added.
      plan: a `Plan`.
      store: the `Store` of as many workers and classes.
      axis_name: name of the mapped axis, of size W.

    Returns:
      A function `(shards, batch) -> (value, grads)` for the inside of your `jax.shard_map`,
      `jax.pmap` or `jax.vmap`: `shards` are this worker's rows of the store's arrays, `batch` its
      part `[T, l, S, ...]` of `Plan.batches`, `grads` the whole gradient of this worker's rows.
      `value` is the sum over **this worker's** tasks: `jax.lax.psum` it.

    Raises:
      ValueError: a plan for another number of workers or classes; at the call, a mapped axis of
        another size, or batches that do not begin with `[T, l]`.
    """
    if (plan.num_workers, plan.num_classes) != (store.num_workers, store.num_classes):
        msg = (
            f"value_and_grad(plan, store): the plan is for {plan.num_workers} workers and "
            f"{plan.num_classes} classes, the store for {store.num_workers} and "
            f"{store.num_classes}; make both for the same."
        )
        raise ValueError(msg)
    routes = _Routes(plan, store)

    def fn(shards, batch):
        _check_call(plan, store, shards, batch, axis_name)
        me = jax.lax.axis_index(axis_name)
        leaves, treedef = jax.tree.flatten(shards)
        places = store._class_dims
        shards_like = [leaves[i] for i in places]
        task_like = [
            jax.ShapeDtypeStruct((plan.block_size, *x.shape[1:]), x.dtype) for x in shards_like
        ]
        own, common = _pack(shards_like), store.fetch_common(shards, axis_name)
        value = jnp.zeros((), jnp.result_type(*(x.dtype for x in leaves)))
        init = jax.tree.map(jnp.zeros_like, (value, own, common))
        own, common, init = _vary((own, common, init), (me, batch))

        def turn(carry, xs):
            value, totals, common_totals = carry
            tables, pairs, batch = xs
            held = [routes.fetch(tables, x, axis_name) for x in own]
            operands = list(common)
            for (i, d), x in zip(places.items(), _unpack(held, task_like)):
                operands[i] = jnp.moveaxis(x, 0, d)
            loss, grads = jax.value_and_grad(
                lambda operands: element_fn(treedef.unflatten(operands), batch, pairs)
            )(operands)
            back = _pack([jnp.moveaxis(grads[i], d, 0) for i, d in places.items()])
            totals = [routes.give_back(tables, g, x, axis_name) for g, x in zip(back, totals)]
            common_totals = [
                None if total is None else total + g for total, g in zip(common_totals, grads)
            ]
            return (value + loss, totals, common_totals), None

        tables = jax.tree.map(lambda x: jnp.take(jnp.asarray(x), me, axis=1), routes.tables)
        xs = (tables, jnp.asarray(plan.pairs)[me], batch)
        if plan.num_turns == 1:
            carry, _ = turn(init, jax.tree.map(lambda x: x[0], xs))
        else:
            carry, _ = jax.lax.scan(turn, init, xs)
        value, totals, common_totals = carry
        grads = store.return_common(common_totals, axis_name)
        for i, g in zip(places, _unpack(totals, shards_like)):
            grads[i] = g
        return value, treedef.unflatten(grads)

    return fn


class _Routes:
    """Which rows go from whom to whom, turn by turn.

    `shifts` lists `(distance, rows)`: worker w gets so many rows of worker w - distance.
    """

    def __init__(self, plan, store):
        W, T, s = plan.classes.shape
        owner, row = np.zeros((2, store.num_classes), int)
        w, i = np.nonzero(store.rows < store.num_classes)
        owner[store.rows[w, i]], row[store.rows[w, i]] = w, i
        w, t, place = np.nonzero(plan.classes < store.num_classes)
        c = plan.classes[w, t, place]
        d = (w - owner[c]) % W
        key = (d * T + t) * W + w  # what a worker gets of another in a turn, in the order of places
        order = np.argsort(key, kind="stable")
        rank = np.arange(len(key)) - np.searchsorted(key[order], key[order])
        d, t, w, place, c = (x[order] for x in (d, t, w, place, c))
        widths = np.zeros(W, int)
        np.maximum.at(widths, d, rank + 1)
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

    def fetch(self, tables, own, axis_name):
        """`[m, p]` of every worker to the `[s, p]` of this worker's task."""
        sent = [_gather_leaf(own, _ROW, {"row": table["send"]}, 0) for table in tables]
        moved = self._move(sent, axis_name, 1)
        zeros = jnp.zeros((self.block_size, *own.shape[1:]), own.dtype)
        return _add_rows(zeros, moved, tables, "put")

    def give_back(self, tables, grads, total, axis_name):
        """The transpose: gradients `[s, p]` of the task, added to the `[m, p]` of their owners."""
        sent = [_gather_leaf(grads, _ROW, {"row": table["put"]}, 0) for table in tables]
        return _add_rows(total, self._move(sent, axis_name, -1), tables, "send")

    def _move(self, sent, axis_name, direction):
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


def _add_rows(total, moved, tables, name):
    for table, y in zip(tables, moved):
        total = _scatter_leaf(total, y, _ROW, {"row": table[name]}, jnp.asarray(True))
    return total


def _by_dtype(leaves):
    """Positions of the leaves, in groups of one dtype."""
    groups = {}
    for i, x in enumerate(leaves):
        groups.setdefault(x.dtype, []).append(i)
    return list(groups.values())


def _pack(leaves):
    """Leaves `[rows, ...]` side by side, `[rows, p]`, one array a dtype."""
    return [
        jnp.concatenate([leaves[i].reshape(leaves[i].shape[0], -1) for i in group], axis=1)
        for group in _by_dtype(leaves)
    ]


def _unpack(packed, like):
    out: list[Any] = [None] * len(like)
    for group, x in zip(_by_dtype(like), packed):
        sizes = [int(np.prod(like[i].shape[1:])) for i in group]
        for i, part in zip(group, jnp.split(x, np.cumsum(sizes)[:-1], axis=1)):
            out[i] = part.reshape(like[i].shape)
    return out


def _check_call(plan, store, shards, batch, axis_name):
    size = jax.lax.axis_size(axis_name)
    if size != store.num_workers:
        msg = (
            f"plan.value_and_grad: the axis {axis_name!r} has {size} workers, the plan "
            f"{store.num_workers}."
        )
        raise ValueError(msg)
    _check_shards("plan.value_and_grad", store, shards)
    lead = plan.pairs.shape[1:3]
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if x.shape[:2] != lead:
            msg = (
                f"plan.value_and_grad: batch{jax.tree_util.keystr(path)} has shape {x.shape}; it "
                f"must begin with [turns, labels] = {list(lead)}: this worker's part of "
                "Plan.batches."
            )
            raise ValueError(msg)


def _check_shards(call, store, shards):
    like = jax.eval_shape(store.shard, store.like)
    want = jax.tree.map(
        lambda x: (x.shape[0] // store.num_workers, *x.shape[1:]) if x.shape else (), like
    )
    got = jax.tree.map(jnp.shape, shards)
    if got != want:
        msg = (
            f"{call}: a worker's shards have shapes {got}, but the store's are {want}; write "
            "Store.shard(params) and map over dimension 0."
        )
        raise ValueError(msg)


__all__ = ("Store", "value_and_grad")
