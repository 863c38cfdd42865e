"""Which entries of the parameters each element sees: gather, scatter_add, scatter_mean."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Bool, PyTree

from psjax._holders import holders_of
from psjax._leaf import gather_leaf, selected
from psjax._like import check_like
from psjax._masks import both, kept, masks_of
from psjax._placement import placed, whole
from psjax._runs import cut, cut_each, length_of, on_host, part_of_run
from psjax._seen import over, see
from psjax._sums import mean_of, narrowed, wide_zeros
from psjax._types import AnyArray, AxisName, Mask, Params, Spec, Struct

is_spec = lambda x: isinstance(x, P) or x is None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "valid", "keep"),
    meta_fields=(
        "specs",
        "paths",
        "axis_sizes",
        "disjoint",
        "blocks",
        "distinct",
        "run_length",
        "run_axes",
    ),
)
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Selection:
    r"""Which entries of the parameters each element sees: the matrices $U_e$ as index sets.

    Element $e$ sees $U_e w$. Gradients return through the transpose (`scatter_add`), weights
    through the pseudo-inverse (`scatter_mean`); (3) and (4) of P. Raynaud, D. Orban, J. Bigeon,
    *Partially-separable loss to parallelize partitioned neural network training*, G-2023-36.

    Made by `psjax.select`, which validates; a pytree whose index arrays are leaves, so that a new
    index set is a new argument of a jitted step and never a recompilation. `s[:3]` are some of the
    elements, `s[e]` is one, `len(s)` is their number.

    Attributes:
      indices: `{axis name: int32[E, m]}`, or `int32[E]` to take one row and drop the axis. An
        index past the end is padding: it gathers 0 and scatters nothing.
      valid: `bool[E]`; an element that is not valid holds nothing.
      specs: the `PartitionSpec` of every leaf of the parameters, flat.
      paths: the path of every such leaf, for messages.
      axis_sizes: `((axis name, size), ...)`, sorted.
      disjoint: names of axes no row of which two elements hold; what they alone select returns
        without a scatter.
      blocks: into how many equal blocks the axes were cut before they were divided; 1 if not.
      distinct: names of axes no row of which an element holds twice.
      run_length: elements that follow one another and have the same rows of the axes `run_axes`;
        it divides E. What these axes alone select, such as the samples of a label, and what depends
        on it and on shared leaves, is computed once per run.
      run_axes: names of these axes; `()` where `run_length` is 1.
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
    distinct: tuple[str, ...] = ()
    run_length: int = 1
    run_axes: tuple[str, ...] = ()

    @property
    def num_elements(self) -> int:
        """E, padding of `split` included."""
        return self.valid.shape[-1]

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each named axis."""
        return dict(self.axis_sizes)

    # -------------------------------------------------------------------------- the three matrices

    def gather(self, params: Params):
        """$U_e w$ of every element: `[...] -> [E, ...]`.

        Args:
          params: tree of arrays of the shapes that `select` was given.

        Returns:
          A tree of the same structure. A leaf with no selected axis is repeated, `[E, ...]`; an
          element that is not valid gets zeros.
        """
        self.check("Selection.gather(params)", params)
        params = whole(params)
        valid = jnp.asarray(self.valid)

        def leaf(spec: P, x: ArrayLike):
            y = gather_leaf(jnp.asarray(x), spec, self.indices, 1, self.sizes)
            if not selected(spec, self.indices):
                y = jnp.broadcast_to(y, (self.num_elements, *y.shape))
            return jnp.where(along(valid, y), y, jnp.zeros_like(y))

        return _map(leaf, self.specs, self.masked(params))

    def scatter_add(self, stacked: Params, like: Params):
        r"""$\sum_e U_e^\top g_e$, the transpose of `gather`: `[E, ...] -> [...]`.

        Summed in float32 where the parameters are narrower, and rounded once. Of bools, whether any
        element has True.

        Args:
          stacked: tree of arrays `[E, ...]` as `gather` returns.
          like: the parameters, or `jax.ShapeDtypeStruct`s of them.
        """
        self.check("Selection.scatter_add(stacked, like)", like)
        total = self.add_to(wide_zeros(like), whole(stacked), jnp.asarray(self.valid))
        return placed(narrowed(self.masked(total), like), like)

    def scatter_mean(
        self,
        stacked: Params,
        params: Params,
        where: Bool[AnyArray, " E"] | None = None,
        axis_name: AxisName | None = None,
    ):
        r"""$w + U^+(y - U w)$: set what one element holds, average what several do, keep the rest.

        Args:
          stacked: tree of arrays `[E, ...]`: the elements' own entries $y$.
          params: the parameters $w$ before; entries that nobody holds keep their bits.
          where: `bool[E]`, elements to count; None for all. The others may hold anything, NaN
            included.
          axis_name: name of a mapped axis (`pmap`, `shard_map`) over which elements are spread.

        Returns:
          A tree like `params`. On a partition, `scatter_mean(gather(w), w)` is `w` bit for bit
          (except that -0 and, on the CPU, subnormal numbers come back as 0). Sums are taken in
          float32 where the parameters are narrower, and rounded once. A mean of integers is rounded
          down, and of bools it is whether all holders have True; sums of integers are exact for
          up to 32767 holders of an entry.
        """
        self.check("Selection.scatter_mean(stacked, params)", params)
        valid = jnp.asarray(self.valid)
        valid = valid if where is None else valid & where

        def sums(stacked: Params, like: Params):
            total = self.masked(self.add_to(wide_zeros(like), stacked, valid))
            return total if axis_name is None else jax.lax.psum(total, axis_name)

        counts = self._counts(params, valid, axis_name)
        return placed(mean_of(sums, whole(stacked), whole(params), counts), params)

    def counts(
        self,
        params: Params,
        where: Bool[AnyArray, " E"] | None = None,
        axis_name: AxisName | None = None,
    ):
        """How many elements hold each entry: a tree like `params`, int32.

        Args:
          params: tree of arrays of the shapes that `select` was given.
          where: `bool[E]`, elements to count; None for all.
          axis_name: name of a mapped axis over which elements are spread.
        """
        self.check("Selection.counts(params)", params)
        valid = jnp.asarray(self.valid)
        valid = valid if where is None else valid & where
        counts = self._counts(params, valid, axis_name)
        return jax.tree.map(lambda n, x: jnp.broadcast_to(n, x.shape), counts, params)

    # --------------------------------------------------------------------- some of the elements

    def split(self, n: int) -> "Selection":
        """Divide the elements among `n` workers: leaves `[E, ...] -> [n, m, ...]`.

        Elements keep their order, and each worker has m = ceil(E / n) of them; where the elements
        come in runs, m is a multiple of a part of a run, so that a worker shares what its runs do.
        The last workers get copies of the last element that are not valid and hold nothing. For a
        user's `pmap`, or `psjax.shard`; `selection.split(n)[w]` is what worker w has, and `w` may
        be traced.

        Raises:
          ValueError: if `n` is less than 1, or the selection is split already.
        """
        if n < 1 or self.valid.ndim != 1:
            msg = f"split({n}): n must be positive and the selection [E], not {self.valid.shape}."
            raise ValueError(msg)
        part = part_of_run(self.num_elements, self.run_length, n)
        parts = self.parts(n, part * -(-self.num_elements // (n * part)), part)
        return dataclasses.replace(parts, keep=jax.tree.map(lambda x: repeat(x, n), self.keep))

    def parts(self, n: int, size: int, run_length: int = 1) -> "Selection":
        """`[n, size]` elements in their order, the last one repeated, not valid, as padding.

        Masks are left out. `run_length` must divide `size` and the selection's own.
        """
        indices = {name: cut(index, n, size) for name, index in self.indices.items()}
        real = cut(np.ones(self.num_elements, bool), n, size, False)
        return dataclasses.replace(
            self,
            indices=indices,
            valid=cut(self.valid, n, size) & real,
            keep=None,
            run_length=run_length,
            run_axes=self.run_axes if run_length > 1 else (),
        )

    def cut_runs(self, cuts: int, size: int) -> "Selection":
        """Every run in `cuts` parts of `size`, its last element repeated, not valid, as padding.

        Leaves `[E / run_length * cuts, size, ...]`; masks are left out.
        """
        each = lambda x: cut_each(x, self.run_length, cuts, size)
        indices = {name: each(index) for name, index in self.indices.items()}
        runs = self.num_elements // self.run_length
        real = np.tile(np.arange(cuts * size) < self.run_length, runs)
        valid = each(self.valid) & real.reshape(-1, size)
        return dataclasses.replace(self, indices=indices, valid=valid, keep=None, run_length=size)

    def __getitem__(self, rows: Any) -> "Selection":
        """Some elements, as of an array: `s[:3]`; `s[e]`, one; of a split selection `s[w]`."""
        host = isinstance(rows, np.ndarray | np.integer | int | slice | list)
        if self.valid.ndim > 1:
            return jax.tree.map(lambda x: (x if host else jnp.asarray(x))[rows], self)
        rows = np.asarray(rows) if isinstance(rows, list) else rows
        # With the ellipsis one number is an array, too.
        take = lambda x: (np if host and on_host(x) else jnp).asarray(x)[rows, ...]
        indices = {name: take(index) for name, index in self.indices.items()}
        runs = {"run_length": 1, "run_axes": ()}
        if host and self.run_length > 1:
            run = (np.arange(self.num_elements) // self.run_length)[rows]
            length = length_of(run) if run.ndim == 1 else 1
            runs = {"run_length": length, "run_axes": self.run_axes if length > 1 else ()}
        return dataclasses.replace(self, indices=indices, valid=take(self.valid), **runs)

    def __len__(self) -> int:
        """Number of elements; of a split selection, of workers."""
        return self.valid.shape[0]

    def __iter__(self) -> Iterator["Selection"]:
        return (self[i] for i in range(len(self)))

    # ------------------------------------------ the same elements, and what they see of other trees

    def of(
        self, specs: Sequence[Spec], tree: PyTree, keep: Sequence[Mask] | None = None
    ) -> "Selection":
        """The same elements, and what they see of another tree: a batch, an optimizer's state.

        Args:
          specs: the `PartitionSpec` of every leaf, flat.
          tree: the other tree.
          keep: the mask of every leaf, flat, or None: nothing of it is dropped.
        """
        paths = tuple(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
        keep = tuple(keep) if keep and any(k is not None for k in keep) else None
        return dataclasses.replace(self, specs=tuple(specs), paths=paths, keep=keep)

    def only(self, leaves: Sequence[int]) -> "Selection":
        """Of some leaves alone, by number; their tree is then a list."""
        pick = lambda xs: tuple(xs[i] for i in leaves)
        keep = None if self.keep is None else pick(self.keep)
        paths = tuple(f"[{i}]" for i in range(len(leaves)))
        return dataclasses.replace(self, specs=pick(self.specs), paths=paths, keep=keep)

    def map(self, fn: Callable[..., Any], leaves: Sequence[ArrayLike]):
        """`fn` of what every element sees of the leaves: `[E, ...]`; of one element, `[...]`.

        What elements share is not repeated: the map passes it whole to every element of a run, or
        to all.
        """
        return over(self, fn, see(self, leaves))

    def drop(self, keep: PyTree) -> "Selection":
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

    def masked(self, tree: PyTree):
        """A tree like the parameters with 0 for every weight that is dropped."""
        if self.keep is None:
            return tree
        leaves, treedef = jax.tree.flatten(tree)
        return treedef.unflatten([kept(k, x) for k, x in zip(self.keep, leaves, strict=True)])

    # ------------------------------------------------------------------------------ as an object

    def __repr__(self) -> str:
        """`Selection(90 elements; class [90, 2] of 10, label [90] of 10)`."""
        if not hasattr(self.valid, "shape"):  # a tree of something else, such as specs
            return f"Selection({self.indices}, {self.valid})"
        many = " x ".join(map(str, self.valid.shape)) or "1"
        parts = [f"{many} element{'' if many == '1' else 's'}"]
        seen = [
            f"{name} {list(getattr(index, 'shape', ()))} of {self.sizes.get(name)}"
            for name, index in self.indices.items()
        ]
        parts += [", ".join(seen) or "each of all parameters"]
        parts += ["some weights dropped"] if self.keep is not None else []
        return f"Selection({'; '.join(parts)})"

    def __eq__(self, other: object) -> bool:
        """Whether the index sets, masks and leaves are the same; of tracers, the same object."""
        if not isinstance(other, Selection) or self is other:
            return self is other
        (a, treedef), (b, other_def) = jax.tree.flatten(self), jax.tree.flatten(other)
        try:
            return treedef == other_def and all(map(np.array_equal, a, b))
        except jax.errors.TracerArrayConversionError:
            return False

    def __hash__(self) -> int:
        return hash((self.specs, self.paths, self.axis_sizes, jnp.shape(self.valid)))

    def check(self, call: str, params: Params):
        """Raise unless these are the parameters that `select` was given, and no split selection."""
        if self.valid.ndim != 1:
            msg = (
                f"{call}: the selection has leaves of shape {self.valid.shape}; inside a mapped "
                "function take this device's part, [E], first."
            )
            raise ValueError(msg)
        check_like(call, self, params)

    # ------------------------------------------------------------------------------------- parts

    def holders(self, valid: Bool[AnyArray, "..."], axis_name: AxisName | None = None):
        """Who holds each entry, of the elements that are `valid`; over devices with `axis_name`."""
        known = (self.sizes, self.disjoint, self.distinct)
        return holders_of(self.indices, valid, *known, axis_name)

    def add_to(self, totals: Params, stacked: Params, valid: Bool[AnyArray, "..."]):
        """Add what the elements that are `valid` hold to `totals`, without masks."""
        holders = self.holders(valid)
        add = lambda spec, total, y: holders.add(total, jnp.asarray(y), spec)
        return _map(add, self.specs, totals, stacked)

    def _counts(
        self, params: Params, valid: Bool[AnyArray, " E"], axis_name: AxisName | None = None
    ):
        """Counts with size 1 on every axis along which they are the same: not selected, no mask."""
        mine, everywhere = self.holders(valid), self.holders(valid, axis_name)

        def leaf(spec: P, keep: Mask, x: Struct):
            if keep is None and mine.alone(spec):
                return everywhere.number(x, spec)
            count = kept(keep, mine.number(x, spec))  # this device's, whose masks may be its own
            return count if axis_name is None else jax.lax.psum(count, axis_name)

        leaves, treedef = jax.tree.flatten(params)
        keep = self.keep or (None,) * len(leaves)
        counts = [leaf(*args) for args in zip(self.specs, keep, leaves, strict=True)]
        return treedef.unflatten(counts)


serialization.register_serialization_state(
    Selection,
    lambda s: serialization.to_state_dict({"indices": s.indices, "valid": s.valid, "keep": s.keep}),
    lambda s, state: dataclasses.replace(
        s,
        **serialization.from_state_dict(
            {"indices": s.indices, "valid": s.valid, "keep": s.keep}, state
        ),
    ),
)


def _map(fn: Callable[..., Any], specs: Sequence[Spec], *trees: Params):
    """`fn(spec, *leaves)` over the leaves of trees shaped like `specs` (a flat tuple of specs)."""
    leaves, treedef = jax.tree.flatten(trees[0])
    rest = [treedef.flatten_up_to(tree) for tree in trees[1:]]
    return treedef.unflatten([fn(*args) for args in zip(specs, leaves, *rest, strict=True)])


def along(valid: Bool[AnyArray, "..."], y: AnyArray):
    return valid.reshape((*valid.shape, *(1,) * (y.ndim - valid.ndim)))


def repeat(x: Any, n: int):
    """`[...] -> [n, ...]`; NumPy's arrays stay so."""
    return (np if on_host(x) else jnp).broadcast_to(x, (n, *x.shape))
