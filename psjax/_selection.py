"""Which entries of the parameters each element sees: gather, scatter_add, scatter_mean."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._leaf import gather_leaf, held_entries, merge_leaf, scatter_leaf
from psjax._masks import both, broadcasts, kept, masks_of

is_spec = lambda x: isinstance(x, P) or x is None


def _map(fn, specs, *trees):
    """`fn(spec, *leaves)` over the leaves of trees shaped like `specs` (a flat tuple of specs)."""
    leaves, treedef = jax.tree.flatten(trees[0])
    rest = [treedef.flatten_up_to(tree) for tree in trees[1:]]
    return treedef.unflatten([fn(*args) for args in zip(specs, leaves, *rest, strict=True)])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "valid", "keep"),
    meta_fields=("specs", "paths", "axis_sizes", "disjoint", "blocks"),
)
@dataclasses.dataclass(frozen=True)
class Selection:
    r"""Which entries of the parameters each element sees: the matrices $U_e$ as index sets.

    Element $e$ sees $U_e w$. Gradients go home through the transpose (`scatter_add`), weights
    through the pseudo-inverse (`scatter_mean`); (3) and (4) of P. Raynaud, D. Orban, J. Bigeon,
    *Partially-separable loss to parallelize partitioned neural network training*, G-2023-36.

    Made by `psjax.select`, which validates; a pytree whose index arrays are leaves, so that a new
    index set is a new argument of a jitted step and never a recompilation.

    Attributes:
      indices: `{axis name: int32[E, m]}`, or `int32[E]` to take one row and drop the axis. An
        index past the end is padding: it gathers 0 and scatters nothing.
      valid: `bool[E]`; an element that is not valid holds nothing.
      specs: the `PartitionSpec` of every leaf of the parameters, flat.
      paths: the path of every such leaf, for messages.
      axis_sizes: `((axis name, size), ...)`, sorted.
      disjoint: names of axes no row of which two elements hold, by construction
        (`psjax.random_partition`); what they alone select goes home faster.
      blocks: into how many equal blocks the axes were cut before they were divided; 1 if not.
      keep: a mask of every leaf, flat, or None: what `drop` has dropped.
    """

    indices: dict[str, Any]
    valid: Any
    specs: tuple[P, ...]
    paths: tuple[str, ...]
    axis_sizes: tuple[tuple[str, int], ...]
    disjoint: tuple[str, ...] = ()
    blocks: int = 1
    keep: tuple[Any, ...] | None = None

    @property
    def num_elements(self) -> int:
        """E, padding of `split` included."""
        return self.valid.shape[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each named axis."""
        return dict(self.axis_sizes)

    def gather(self, params):
        """$U_e w$ of every element: `[...] -> [E, ...]`.

        Args:
          params: tree of arrays of the shapes that `select` was given.

        Returns:
          A tree of the same structure. A leaf with no selected axis is repeated, `[E, ...]`; an
          element that is not valid gets zeros.
        """
        self.check("Selection.gather(params)", params)
        valid = jnp.asarray(self.valid)

        def leaf(spec, x):
            y = gather_leaf(jnp.asarray(x), spec, self.indices, 1)
            if not selected(spec, self.indices):
                y = jnp.broadcast_to(y, (self.num_elements, *y.shape))
            return jnp.where(valid.reshape(-1, *[1] * (y.ndim - 1)), y, jnp.zeros_like(y))

        return _map(leaf, self.specs, self.masked(params))

    def scatter_add(self, stacked, like):
        r"""$\sum_e U_e^\top g_e$, the transpose of `gather`: `[E, ...] -> [...]`.

        Args:
          stacked: tree of arrays `[E, ...]` as `gather` returns.
          like: the parameters, or `jax.ShapeDtypeStruct`s of them.
        """
        self.check("Selection.scatter_add(stacked, like)", like)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return self.masked(self._add(zeros, stacked, jnp.asarray(self.valid)))

    def scatter_mean(self, stacked, params, where=None, axis_name=None):
        r"""$w + U^+(y - U w)$: set what one element holds, average what several do, keep the rest.

        Args:
          stacked: tree of arrays `[E, ...]`: the elements' own entries $y$.
          params: the parameters $w$ before; entries that nobody holds keep their bits.
          where: `bool[E]`, elements to count; None for all. The others may hold anything, NaN
            included.
          axis_name: name of a mapped axis (`pmap`, `shard_map`) over which elements are spread.

        Returns:
          A tree like `params`. On a partition, `scatter_mean(gather(w), w)` is `w` bit for bit (but
          -0 and, on the CPU, subnormal numbers come back as 0). A mean of integers is rounded down.
        """
        self.check("Selection.scatter_mean(stacked, params)", params)
        valid = jnp.asarray(self.valid)
        valid = valid if where is None else valid & where
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, counts = self._add(zeros, stacked, valid), self._counts(params, valid, axis_name)
        total = self.masked(total)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)

        def mean(w, total, count):
            holders = jnp.maximum(count, 1).astype(total.dtype)
            whole = jnp.issubdtype(total.dtype, jnp.integer)
            return jnp.where(count == 0, w, total // holders if whole else total / holders)

        return jax.tree.map(mean, params, total, counts)

    def counts(self, params):
        """How many elements hold each entry: a tree like `params`, int32."""
        self.check("Selection.counts(params)", params)
        counts = self._counts(params, jnp.asarray(self.valid))
        return jax.tree.map(lambda n, x: jnp.broadcast_to(n, x.shape), counts, params)

    def split(self, n: int) -> "Selection":
        """Divide the elements among `n` workers: leaves `[E, ...] -> [n, ceil(E / n), ...]`.

        Elements keep their order; where `n` does not divide E, the last workers get copies of the
        last element that are not valid and hold nothing. For a user's `pmap`, or `psjax.shard`;
        `selection.split(n)[w]` is what worker w has.

        Raises:
          ValueError: if `n` is less than 1, or the selection is split already.
        """
        if n < 1 or self.valid.ndim != 1:
            msg = f"split({n}): n must be positive and the selection [E], not {self.valid.shape}."
            raise ValueError(msg)
        parts = self.parts(n, -(-self.num_elements // n))
        return dataclasses.replace(parts, keep=jax.tree.map(lambda x: repeat(x, n), self.keep))

    def parts(self, n: int, size: int) -> "Selection":
        """`[n, size]` elements in their order, the last one repeated, not valid, as padding."""
        places = np.arange(n * size).reshape(n, size)
        rows = np.minimum(places, self.num_elements - 1)
        parts = dataclasses.replace(self, keep=None)[rows]
        return dataclasses.replace(parts, valid=parts.valid & (places < self.num_elements))

    def __getitem__(self, rows) -> "Selection":
        """Some elements, as of an array: `s[:3]`; `s[e]`, one; of a split selection `s[w]`."""
        if self.valid.ndim > 1:
            return jax.tree.map(lambda x: x[rows], self)
        host = isinstance(rows, np.ndarray | int | slice)
        take = lambda x: (
            np.asarray(x)[rows, ...] if host and isinstance(x, np.ndarray) else jnp.asarray(x)[rows]
        )
        indices = {name: take(index) for name, index in self.indices.items()}
        return dataclasses.replace(self, indices=indices, valid=take(self.valid))

    # ------------------------------------------ the same elements, and what they see of other trees

    def of(self, specs, tree, keep=None) -> "Selection":
        """The same elements, and what they see of another tree: a batch, an optimizer's state.

        Args:
          specs: the `PartitionSpec` of every leaf, flat.
          tree: the other tree.
          keep: the mask of every leaf, flat, or None: nothing of it is dropped.
        """
        paths = tuple(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        keep = tuple(keep) if keep and any(k is not None for k in keep) else None
        return dataclasses.replace(self, specs=tuple(specs), paths=paths, keep=keep)

    def only(self, leaves) -> "Selection":
        """Of some leaves alone, by number; their tree is then a list."""
        pick = lambda xs: tuple(xs[i] for i in leaves)
        keep = None if self.keep is None else pick(self.keep)
        paths = tuple(f"[{i}]" for i in range(len(leaves)))
        return dataclasses.replace(self, specs=pick(self.specs), paths=paths, keep=keep)

    def map(self, fn, leaves):
        """`fn` of what every element sees of the leaves: `[E, ...]`; of one element, `[...]`.

        Shared leaves are not repeated: the map passes them whole to every element.
        """
        lead = self.valid.ndim
        seen = [gather_leaf(x, s, self.indices, lead) for x, s in zip(leaves, self.specs)]
        if not lead:
            return fn(*seen)
        mapped = tuple(0 if selected(spec, self.indices) else None for spec in self.specs)
        if 0 not in mapped:  # replicas of one whole
            repeat = lambda y: jnp.broadcast_to(y, (*self.valid.shape, *y.shape))
            return jax.tree.map(repeat, fn(*seen))
        return jax.vmap(fn, in_axes=mapped)(*seen)

    def add(self, total, stacked):
        """`total` and what the elements give, without masks: `scatter_add` in a loop."""
        return self._add(total, stacked, jnp.asarray(self.valid))

    def drop(self, keep) -> "Selection":
        """The same elements, none of which sees the weights that `keep` drops: dropout.

        A dropped weight is 0 to every element and nobody holds it: its gradient is 0,
        `scatter_mean` keeps its bits, `counts` says 0, `psjax.local_update` leaves it and its
        moments alone. Nothing is rescaled; `psjax.dropout_mask` draws masks and says how to.

        Masks are data, as index sets are: another one, of the same shapes, is a new argument of a
        jitted step and never a recompilation. `s.drop(a).drop(b)` drops what either does. The
        gradient of a dropped weight is 0, but an optimizer outside, its momentum or weight decay,
        may still move it.

        Args:
          keep: tree like the parameters with leaves None (nothing is dropped), a bool (the whole
            leaf is kept or dropped) or a bool array that broadcasts to the leaf, such as
            `[rows, 1]`. They may be traced.

        Raises:
          ValueError: a tree that is not like the parameters; a selection that is split already; at
            the first use, a mask that does not broadcast to its leaf.
          TypeError: masks that are not bool.

        Example:
          >>> import jax.numpy as jnp, psjax
          >>> w = {"trunk": jnp.ones(2), "own": jnp.ones(3)}
          >>> keep = {"trunk": False, "own": jnp.array([True, True, False])}
          >>> psjax.replicas(w, 4).drop(keep).counts(w)
          {'own': Array([4, 4, 0], dtype=int32), 'trunk': Array([0, 0], dtype=int32)}
        """
        if self.valid.ndim != 1:
            msg = (
                f"Selection.drop(keep): the selection has leaves of shape {self.valid.shape}; drop "
                "first and split then, or take this device's part, [E], first."
            )
            raise ValueError(msg)
        masks = masks_of(keep, self.paths)
        if self.keep is not None:
            masks = tuple(
                both(path, a, b) for path, a, b in zip(self.paths, self.keep, masks, strict=True)
            )
        return dataclasses.replace(self, keep=masks)

    def masked(self, tree):
        """A tree like the parameters with 0 for every weight that is dropped."""
        if self.keep is None:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten([kept(k, x) for k, x in zip(self.keep, leaves, strict=True)])

    def _add(self, zeros, stacked, valid):
        owners, places = self._owners(valid)

        def add(spec, zero, y):
            if self._one_holder(spec):
                return zero + merge_leaf(y, spec, owners, places)[0].astype(zero.dtype)
            return scatter_leaf(zero, y, spec, self.indices, valid)

        return _map(add, self.specs, zeros, stacked)

    def _counts(self, params, valid, axis_name=None):
        """Counts with size 1 on every axis along which they are the same: not selected, no mask."""
        owners, _ = self._owners(valid, axis_name)
        mine, _ = self._owners(valid) if self.keep is not None else (owners, {})

        def leaf(spec, keep, x):
            if self._one_holder(spec):
                if keep is None:
                    return held_entries(x.ndim, spec, owners).astype(jnp.int32)
                count = kept(keep, held_entries(x.ndim, spec, mine).astype(jnp.int32))
                return count if axis_name is None else jax.lax.psum(count, axis_name)
            names = [*(spec or ()), *[None] * (x.ndim - len(spec or ()))]
            shape = [n if name in self.indices else 1 for n, name in zip(x.shape, names)]
            ones = gather_leaf(jnp.ones(shape, jnp.int32), spec, self.indices, 1)
            if not selected(spec, self.indices):
                ones = jnp.broadcast_to(ones, (self.num_elements, *ones.shape))
            count = scatter_leaf(jnp.zeros(shape, jnp.int32), ones, spec, self.indices, valid)
            count = kept(keep, count)  # this device's, whose masks may be its own
            return count if axis_name is None else jax.lax.psum(count, axis_name)

        leaves, treedef = jax.tree.flatten(params)
        keep = self.keep or (None,) * len(leaves)
        counts = [leaf(*args) for args in zip(self.specs, keep, leaves, strict=True)]
        return treedef.unflatten(counts)

    def _one_holder(self, spec):
        """Whether no entry of such a leaf can have two holders."""
        names = {name for name in spec or () if name in self.indices}
        return bool(names) and names <= set(self.disjoint)

    def _owners(self, valid, axis_name=None):
        """The element that holds each row of the disjoint axes, -1 for none, and its place there.

        With `axis_name` elements are counted over all devices.
        """
        owners, places = {}, {}
        if not self.disjoint:
            return owners, places
        element = jnp.arange(self.num_elements, dtype=jnp.int32)
        if axis_name is not None:
            element = element + self.num_elements * jax.lax.axis_index(axis_name)
        for name in self.disjoint:
            index, size = jnp.asarray(self.indices[name]), self.sizes[name]
            index = jnp.where(valid[:, None], index, jnp.full_like(index, size))
            place = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=jnp.int32), index.shape)
            nobody = jnp.full(size, -1, jnp.int32)
            owner = nobody.at[index].set(
                jnp.broadcast_to(element[:, None], index.shape), mode="drop"
            )
            owners[name] = owner if axis_name is None else jax.lax.pmax(owner, axis_name)
            places[name] = jnp.zeros(size, jnp.int32).at[index].set(place, mode="drop")
        return owners, places

    def check(self, call, params):
        """Raise unless these are the parameters that `select` was given, and no split selection."""
        if self.valid.ndim != 1:
            msg = (
                f"{call}: the selection has leaves of shape {self.valid.shape}; inside a mapped "
                "function take this device's part, [E], first."
            )
            raise ValueError(msg)
        check_like(call, self, params)


def repeat(x: Any, n: int):
    """`[...] -> [n, ...]`; NumPy's arrays stay so."""
    host = isinstance(x, np.ndarray | np.generic)
    return (np if host else jnp).broadcast_to(x, (n, *x.shape))


def selected(spec, indices):
    return any(name in indices for name in spec or ())


def check_like(call, selection, params):
    """The parameters must be those that `select` was given: a wrong size would gather zeros."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = tuple(keystr(path) for path, _ in leaves)
    if paths != selection.paths:
        odd = sorted(set(paths) ^ set(selection.paths)) or list(paths)
        msg = (
            f"{call}: the parameters are not the tree that select(like=...) was given; they differ "
            f"in {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}."
        )
        raise ValueError(msg)
    for (path, x), spec in zip(leaves, selection.specs):
        for d, name in enumerate(spec or ()):
            if name in selection.sizes and (d >= x.ndim or x.shape[d] != selection.sizes[name]):
                msg = (
                    f"{call}: {keystr(path)} has shape {tuple(x.shape)}, but axis {name!r} "
                    f"(dimension {d}) had size {selection.sizes[name]} in select(like=...)."
                )
                raise ValueError(msg)
    for (path, x), keep in zip(leaves, selection.keep or ()):
        if keep is not None and not broadcasts(keep.shape, x.shape):
            msg = (
                f"{call}: the mask that Selection.drop got for {keystr(path)} has shape "
                f"{tuple(keep.shape)}, which does not broadcast to the leaf's {tuple(x.shape)}."
            )
            raise ValueError(msg)
