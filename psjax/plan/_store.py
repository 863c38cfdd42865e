"""Where the weights of a model live among the workers, in shards."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from psjax._leaf import gather_leaf
from psjax._notation import names
from psjax._select import axis_sizes, flat_specs
from psjax.plan._pack import by_dtype

ROW = P("row")


@dataclasses.dataclass(frozen=True, eq=False)
class Store:
    """Where the weights of a model live among W workers, as arrays that shard along dimension 0.

    A leaf with the class axis is kept class by class, `[W * m, ...]` with `m = ceil(C / W)`: the
    rows `w * m, ..., w * m + m - 1` are those of worker w, the last ones zeros where W does not
    divide C. Any other leaf is flat, `[W * ceil(size / W)]`; a scalar stays as it is, on every
    worker. Optimizers that treat entries alike run on these arrays as they are, each entry where it
    lives; those that need a norm run outside `shard_map`, on the sharded arrays.

    Args:
      axes: as in `psjax.select`; kept as a whole tree of `PartitionSpec`s.
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
        specs, paths, sizes = axis_sizes("Store", self.axes, self.like)
        object.__setattr__(self, "axes", jax.tree.structure(self.like).unflatten(specs))
        if self.axis not in sizes:
            msg = f"Store(axis={self.axis!r}): no parameter has this axis; write one of {sizes}."
            raise ValueError(msg)
        for path, spec in zip(paths, specs):
            if self.axis in names(spec) and spec.count(self.axis) != 1:
                msg = (
                    f"Store(axis={self.axis!r}): {path} has axes {spec}; in a store the axis must "
                    "be one dimension, alone. Reshape the parameter so that it is."
                )
                raise ValueError(msg)
        if self.num_workers < 1:
            msg = f"Store(num_workers={self.num_workers}): write 1 worker or more."
            raise ValueError(msg)

    @functools.cached_property
    def num_classes(self) -> int:
        """C."""
        return axis_sizes("Store", self.axes, self.like)[2][self.axis]

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
            return gather_leaf(jnp.moveaxis(jnp.asarray(x), d, 0), ROW, {"row": rows}, 0, {})

        axes = self.axes if axes is None else self._full("Store.shard", axes, tree)
        return jax.tree.map(leaf, axes, tree)

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

        like = self.like if like is None else like
        axes = self.axes if axes is None else self._full("Store.whole", axes, like)
        return jax.tree.map(leaf, axes, tree, like)

    def specs(self, tree: Any, axis_name: str) -> Any:
        """`PartitionSpec`s of a tree of the store's arrays, for `jax.shard_map` or `device_put`."""
        return jax.tree.map(lambda x: P(axis_name) if jnp.ndim(x) else P(), tree)

    def check(self, call: str, shards: Any) -> None:
        """Raise unless these are one worker's rows of the store's arrays.

        Args:
          call: the function that the user called, for the message.
          shards: this worker's part of what `shard` returns.

        Raises:
          ValueError: other shapes.
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
        for group in by_dtype([flat[i] for i in keys]):
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
        places = [i for i, x in enumerate(leaves) if i not in self.class_dims and x.ndim]
        return places, [leaves[i] for i in places]

    def _full(self, call, axes, tree):
        return jax.tree.structure(tree).unflatten(flat_specs(call, axes, tree)[0])

    def _class_dim(self, spec):
        return next((d for d, name in enumerate(spec or ()) if name == self.axis), None)

    @functools.cached_property
    def leaf_specs(self):
        return axis_sizes("Store", self.axes, self.like)[0]

    @functools.cached_property
    def _flat_like(self):
        return jax.tree.leaves(self.like)

    @functools.cached_property
    def class_dims(self) -> dict[int, int]:
        """Which leaf, counted flat, has the class axis, and where."""
        dims = {i: self._class_dim(spec) for i, spec in enumerate(self.leaf_specs)}
        return {i: d for i, d in dims.items() if d is not None}
