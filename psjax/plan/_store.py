"""`Store`: the layout of a model's weights in shards over the workers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from psjax._leaf import gather_leaf
from psjax._notation import Layout, is_plain, names
from psjax._select import axis_sizes, flat_specs
from psjax._types import AnyArray, Axes, Params, Struct
from psjax.plan._pack import by_dtype

ROW = P("row")


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """The layout of a model's weights over W workers: arrays that are sharded along dimension 0.

    A leaf with the class axis has one row per class, `[W * m, ...]` with `m = ceil(C / W)`. Worker
    w owns the rows `w * m` to `w * m + m - 1`; the last rows are zero if W does not divide C. Any
    other leaf is flat, `[W * ceil(size / W)]`. A scalar is unchanged, and every worker has it.

    Element-wise optimizers can run on each worker's shard inside `shard_map`. An optimizer that
    needs a norm must run outside, on the sharded arrays.

    Args:
      axes: as in `psjax.select`; stored as a whole tree of `PartitionSpec`s.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
      num_workers: number of workers, W.
      axis: name of the class axis.

    Raises:
      ValueError: there is no worker, no parameter has the class axis, or the axes do not fit.
    """

    axes: Any
    like: Any
    num_workers: int
    axis: str = "class"

    def __post_init__(self):
        specs, paths, sizes = axis_sizes("Store", self.axes, self.like)
        object.__setattr__(self, "axes", jax.tree.structure(self.like).unflatten(specs))
        if self.axis not in sizes:
            msg = f"Store(axis={self.axis!r}): no parameter has this axis; pass one of {sizes}."
            raise ValueError(msg)
        for path, spec in zip(paths, specs):
            parts = [part for part in Layout(spec, len(spec), sizes).pieces]
            if self.axis in names(spec) and any(list(p).count(self.axis) != 1 for p in parts):
                msg = (
                    f"Store(axis={self.axis!r}): {path} has axes {spec}; in a store every part of "
                    "a leaf must have the axis once, or none of them."
                )
                raise ValueError(msg)
        if self.num_workers < 1:
            msg = f"Store(num_workers={self.num_workers}): pass 1 worker or more."
            raise ValueError(msg)

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every named axis."""
        return axis_sizes("Store", self.axes, self.like)[2]

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return self.sizes[self.axis]

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """The classes of each worker: int32 `[W, m]`, padded with C."""
        parts = np.array_split(np.arange(self.num_classes, dtype=np.int32), self.num_workers)
        rows = np.full((self.num_workers, len(parts[0])), self.num_classes, np.int32)
        for w, part in enumerate(parts):
            rows[w, : len(part)] = part
        return rows

    def shard(self, tree: Any, axes: Any = None) -> Any:
        """Lay out a whole tree as the arrays of the store, on the host or in `jit`.

        Args:
          tree: the parameters, or another tree with its `axes`.
          axes: `PartitionSpec`s of the tree; None: those of the parameters. For an optimizer's
            state, pass `psjax.ist.state_axes(optimizer, axes, like)`.
        """
        rows = self.rows.ravel()

        def leaf(spec: P, x: Any):
            if not jnp.ndim(x):
                return x
            if self.axis not in names(spec):
                x = x.reshape(-1)
                pad = -x.size % self.num_workers
                return jnp.pad(x, (0, pad))
            of_class = self._by_class(spec, jnp.asarray(x), self.num_classes)
            return gather_leaf(of_class, ROW, {"row": rows}, 0, {})

        axes = self.axes if axes is None else self._full("Store.shard", axes, tree)
        return jax.tree.map(leaf, axes, tree)

    def whole(self, tree: Any, like: Any = None, axes: Any = None) -> Any:
        """The whole tree from the arrays of the store: the inverse of `shard`.

        Args:
          tree: what `shard` returns.
          like: arrays or `jax.ShapeDtypeStruct`s with the whole shapes; None: the parameters.
          axes: as in `shard`.
        """
        rows = self.rows.ravel()
        places = np.argsort(rows, kind="stable")[: self.num_classes]

        def leaf(spec: P, x: Any, like: Struct):
            if not like.shape:
                return x
            if self.axis not in names(spec):
                return jnp.asarray(x)[: int(np.prod(like.shape))].reshape(like.shape)
            return self._of_classes(spec, jnp.asarray(x)[places], like.shape, self.num_classes)

        like = self.like if like is None else like
        axes = self.axes if axes is None else self._full("Store.whole", axes, like)
        return jax.tree.map(leaf, axes, tree, like)

    def specs(self, tree: Any, axis_name: str) -> Any:
        """The `PartitionSpec`s of the store's arrays, for `jax.shard_map` or `jax.device_put`."""
        return jax.tree.map(lambda x: P(axis_name) if jnp.ndim(x) else P(), tree)

    def check(self, call: str, shards: Any) -> None:
        """Raise unless `shards` are one worker's rows of the arrays of the store.

        Args:
          call: the function that the user called, for the message.
          shards: this worker's part of what `shard` returns.

        Raises:
          ValueError: the shapes differ.
        """
        like = jax.eval_shape(self.shard, self.like)
        want = jax.tree.map(
            lambda x: (x.shape[0] // self.num_workers, *x.shape[1:]) if x.shape else (), like
        )
        got = jax.tree.map(jnp.shape, shards)
        if got != want:
            msg = (
                f"{call}: a worker's shards have shapes {got}, but the store's are {want}; pass "
                "Store.shard(params) and map over dimension 0."
            )
            raise ValueError(msg)

    # ------------------------------------------- inside a mapped function, on a worker's own part

    def fetch_common(self, shards: Any, axis_name: str) -> list[jax.Array | None]:
        """The leaves without a class axis, whole, by one all-gather; None for the others."""
        places, leaves = self._common(shards)
        sizes = [x.size for x in leaves]
        whole = list(jax.tree.leaves(shards))
        out: list[jax.Array | None] = [x if not x.ndim else None for x in whole]
        for group in by_dtype(leaves):
            flat = jnp.concatenate([leaves[i] for i in group])
            flat = jax.lax.all_gather(flat, axis_name)  # [W, all shares]
            ends = np.cumsum([sizes[i] for i in group])[:-1]
            for i, x in zip(group, jnp.split(flat, ends, axis=1)):
                shape = self._flat_like[places[i]].shape
                out[places[i]] = x.reshape(-1)[: int(np.prod(shape))].reshape(shape)
        return out

    def return_common(
        self, grads: list[jax.Array | None], axis_name: str, wire: Any = None
    ) -> list:
        """Sum such leaves over the workers; each share of the sum returns to its owner.

        It is an all-to-all and a sum, which sends as much as a reduce-scatter. A `psjax.codec`
        wire, if there is one, encodes it.
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
        for group in by_dtype([flat[i] for i in keys]):
            group = [keys[i] for i in group]
            packed = jnp.concatenate([flat[i] for i in group], axis=1)
            swap = lambda x: jax.lax.all_to_all(x, axis_name, 0, 0)
            total = jnp.sum(
                swap(packed) if wire is None else wire.to_owners([packed])[0][0], axis=0
            )
            ends = np.cumsum([flat[i].shape[1] for i in group])[:-1]
            for i, x in zip(group, jnp.split(total, ends)):
                out[i] = x
        return out

    def _common(self, shards: Params):
        """The flat leaves: their places among all leaves, and their shares."""
        leaves = jax.tree.leaves(shards)
        places = [i for i, x in enumerate(leaves) if i not in self.class_leaves and x.ndim]
        return places, [leaves[i] for i in places]

    def _full(self, call: str, axes: Axes, tree: PyTree):
        return jax.tree.structure(tree).unflatten(flat_specs(call, axes, tree)[0])

    def _by_class(self, spec: P, x: AnyArray, num: int):
        if is_plain(spec):
            return jnp.moveaxis(x, tuple(spec).index(self.axis), 0)
        return Layout(spec, x.ndim, {**self.sizes, self.axis: num}).rows(x, self.axis)

    def _of_classes(self, spec: P, rows: AnyArray, shape: tuple[int, ...], num: int):
        if is_plain(spec):
            return jnp.moveaxis(rows, 0, tuple(spec).index(self.axis))
        layout = Layout(spec, len(shape), {**self.sizes, self.axis: num})
        return layout.of_rows(rows, self.axis, shape)

    @functools.cached_property
    def leaf_specs(self):
        return axis_sizes("Store", self.axes, self.like)[0]

    @functools.cached_property
    def _flat_like(self):
        return jax.tree.leaves(self.like)

    @functools.cached_property
    def class_leaves(self) -> tuple[int, ...]:
        """Numbers of the leaves that have the class axis."""
        return tuple(i for i, spec in enumerate(self.leaf_specs) if self.axis in names(spec))

    def by_class(self, i: int, x: AnyArray, num: int):
        """Leaf i of a model with `num` classes, class by class: `[num, ...]`."""
        return self._by_class(self.leaf_specs[i], x, num)

    def of_classes(self, i: int, rows: AnyArray, num: int):
        """The inverse of `by_class`."""
        return self._of_classes(self.leaf_specs[i], rows, self._flat_like[i].shape, num)
