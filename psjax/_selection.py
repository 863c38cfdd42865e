"""Which entries of the parameters each element sees: gather, scatter_add, scatter_mean."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

_is_spec = lambda x: isinstance(x, P) or x is None


# ------------------------------------------------------------------------------------------------
# One leaf, one advanced index. `indices` maps axis names to int arrays `[*lead, m]` (keeps the
# axis) or `[*lead]` (takes one row and drops it); `lead` is 0 or 1 axes of elements.


def _layout(spec, indices, lead):
    """Dimensions that are indexed, their indices as an open mesh, where the kept ones return."""
    dims = [d for d, name in enumerate(spec or ()) if name in indices]
    kept = [d for d in dims if indices[spec[d]].ndim > lead]
    mesh = []
    for d in dims:
        index = indices[spec[d]]
        shape = [index.shape[lead] if k == d else 1 for k in kept]
        mesh.append(index.reshape(*index.shape[:lead], *shape))
    # After the advanced index: [*lead, *kept, *rest]. Where do the kept axes stand originally?
    dropped = [d for d in dims if d not in kept]
    home = [lead + d - sum(x < d for x in dropped) for d in kept]
    return dims, tuple(mesh), home


def _gather_leaf(x, spec, indices, lead):
    """`[...] -> [*lead, ...]`; a leaf without indexed axes comes back as it is, without `lead`."""
    dims, mesh, home = _layout(spec, indices, lead)
    if not dims:
        return x
    y = jnp.moveaxis(x, dims, range(len(dims)))
    if len(dims) == 1:
        fill = None if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 0
        y = y.at[mesh].get(mode="fill" if fill == 0 else "clip", fill_value=fill)
    else:  # one mask an axis: filling by a mask of all axes at once takes 5 times as long
        y = y.at[mesh].get(mode="clip")
        for index, size in zip(mesh, (x.shape[d] for d in dims)):
            y = jnp.where((index < size).reshape(*index.shape, *[1] * (y.ndim - index.ndim)), y, 0)
    return jnp.moveaxis(y, range(lead, lead + len(home)), home)


def _scatter_leaf(total, y, spec, indices, valid):
    """Add `y [*lead, ...]` where `valid [*lead]`; the transpose of `_gather_leaf`."""
    lead = valid.ndim
    y = jnp.where(valid.reshape(*valid.shape, *[1] * (y.ndim - lead)), y, 0).astype(total.dtype)
    dims, mesh, home = _layout(spec, indices, lead)
    if not dims:
        return total + jnp.sum(y, axis=tuple(range(lead)), dtype=total.dtype)
    y = jnp.moveaxis(y, home, range(lead, lead + len(home)))
    moved = jnp.moveaxis(total, dims, range(len(dims))).at[mesh].add(y, mode="drop")
    return jnp.moveaxis(moved, range(len(dims)), dims)


def _merge_leaf(y, spec, owners, places):
    """`[E, ...] -> [...]` where no entry has two holders, and which entries have one.

    The same as `_scatter_leaf` into zeros on a partition, by gathers from the inverse permutation:
    scattering columns takes 10 times as long. `owners` and `places` are those of `_owners`.
    """
    dims = [d for d, name in enumerate(spec) if name in owners]
    names = [spec[d] for d in dims]
    first, *rest = dims
    y = jnp.moveaxis(y, first + 1, 1)
    rows = owners[names[0]] * y.shape[1] + places[names[0]]  # -m for a row that nobody holds
    y = y.reshape(-1, *y.shape[2:]).at[rows].get(mode="clip")
    y = jnp.moveaxis(y, 0, first)
    for d, name in zip(rest, names[1:]):
        y = jnp.take(y, places[name], axis=d, mode="clip")
    held = _held(y.ndim, spec, owners)
    return jnp.where(held, y, 0), held


def _held(ndim, spec, owners):
    """Which entries of a leaf one element holds: its rows on every axis have the same owner."""
    dims = [d for d, name in enumerate(spec) if name in owners]
    along = lambda d: owners[spec[d]].reshape(*[-1 if k == d else 1 for k in range(ndim)])
    held = along(dims[0]) >= 0
    for d in dims[1:]:
        held = held & (along(d) == along(dims[0]))
    return held


def _map(fn, specs, *trees):
    """`fn(spec, *leaves)` over the leaves of trees shaped like `specs` (a flat tuple of specs)."""
    leaves, treedef = jax.tree.flatten(trees[0])
    rest = [treedef.flatten_up_to(tree) for tree in trees[1:]]
    return treedef.unflatten([fn(*args) for args in zip(specs, leaves, *rest, strict=True)])


# ------------------------------------------------------------------------------------------------


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("indices", "valid"),
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
    """

    indices: dict[str, Any]
    valid: Any
    specs: tuple[P, ...]
    paths: tuple[str, ...]
    axis_sizes: tuple[tuple[str, int], ...]
    disjoint: tuple[str, ...] = ()
    blocks: int = 1

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
        self._check("gather(params)", params)
        valid = jnp.asarray(self.valid)

        def leaf(spec, x):
            y = _gather_leaf(jnp.asarray(x), spec, self.indices, 1)
            if not _selected(spec, self.indices):
                y = jnp.broadcast_to(y, (self.num_elements, *y.shape))
            return jnp.where(valid.reshape(-1, *[1] * (y.ndim - 1)), y, jnp.zeros_like(y))

        return _map(leaf, self.specs, params)

    def scatter_add(self, stacked, like):
        r"""$\sum_e U_e^\top g_e$, the transpose of `gather`: `[E, ...] -> [...]`.

        Args:
          stacked: tree of arrays `[E, ...]` as `gather` returns.
          like: the parameters, or `jax.ShapeDtypeStruct`s of them.
        """
        self._check("scatter_add(stacked, like)", like)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        return self._add(zeros, stacked, jnp.asarray(self.valid))

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
        self._check("scatter_mean(stacked, params)", params)
        valid = jnp.asarray(self.valid)
        valid = valid if where is None else valid & where
        zeros = jax.tree.map(jnp.zeros_like, params)
        total, counts = self._add(zeros, stacked, valid), self._counts(params, valid, axis_name)
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)

        def mean(w, total, count):
            holders = jnp.maximum(count, 1).astype(total.dtype)
            whole = jnp.issubdtype(total.dtype, jnp.integer)
            return jnp.where(count == 0, w, total // holders if whole else total / holders)

        return jax.tree.map(mean, params, total, counts)

    def counts(self, params):
        """How many elements hold each entry: a tree like `params`, int32."""
        self._check("counts(params)", params)
        counts = self._counts(params, jnp.asarray(self.valid))
        return jax.tree.map(lambda n, x: jnp.broadcast_to(n, x.shape), counts, params)

    def split(self, n: int) -> "Selection":
        """Divide the elements among `n` workers: leaves `[E, ...] -> [n, ceil(E / n), ...]`.

        Elements keep their order; where `n` does not divide E, the last workers get copies of the
        last element that are not valid and hold nothing. For a user's `pmap`, or `psjax.shard`.

        Raises:
          ValueError: if `n` is less than 1, or the selection is split already.
        """
        if n < 1 or self.valid.ndim != 1:
            msg = f"split({n}): n must be positive and the selection [E], not {self.valid.shape}."
            raise ValueError(msg)
        divide = lambda x: _divide_rows(x, n)
        each = -(-self.num_elements // n)
        own = np.arange(n * each).reshape(n, each) < self.num_elements
        indices = jax.tree.map(divide, self.indices)
        return dataclasses.replace(self, indices=indices, valid=divide(self.valid) & own)

    def _add(self, zeros, stacked, valid):
        owners, places = self._owners(valid)

        def add(spec, zero, y):
            if self._one_holder(spec):
                return _merge_leaf(y, spec, owners, places)[0].astype(zero.dtype)
            return _scatter_leaf(zero, y, spec, self.indices, valid)

        return _map(add, self.specs, zeros, stacked)

    def _counts(self, params, valid, axis_name=None):
        """Counts with size 1 on every axis that is not selected: they are the same along it."""
        owners, _ = self._owners(valid, axis_name)

        def leaf(spec, x):
            if self._one_holder(spec):
                return _held(x.ndim, spec, owners).astype(jnp.int32)
            names = [*(spec or ()), *[None] * (x.ndim - len(spec or ()))]
            shape = [n if name in self.indices else 1 for n, name in zip(x.shape, names)]
            ones = _gather_leaf(jnp.ones(shape, jnp.int32), spec, self.indices, 1)
            if not _selected(spec, self.indices):
                ones = jnp.broadcast_to(ones, (self.num_elements, *ones.shape))
            count = _scatter_leaf(jnp.zeros(shape, jnp.int32), ones, spec, self.indices, valid)
            return count if axis_name is None else jax.lax.psum(count, axis_name)

        return _map(leaf, self.specs, params)

    def _one_holder(self, spec):
        """Whether no entry of such a leaf can have two holders."""
        names = {name for name in spec or () if name in self.indices}
        return bool(names) and names <= set(self.disjoint)

    def _owners(self, valid, axis_name=None):
        """The element that holds each row of the disjoint axes, -1 for none, and its place there.

        With `axis_name` elements are counted over all devices.
        """
        owners, places = {}, {}
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

    def _check(self, call, params):
        if self.valid.ndim != 1:
            msg = (
                f"{call}: the selection has leaves of shape {self.valid.shape}; inside a mapped "
                "function take this device's part, [E], first."
            )
            raise ValueError(msg)
        _check_like(f"Selection.{call}", self, params)


def _with_specs(selection, tree, specs):
    """The same index sets for another tree of the same axes, such as an optimizer's state."""
    paths = tuple(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))
    return dataclasses.replace(selection, specs=tuple(specs), paths=paths)


def _divide_rows(x, n):
    """`[E, ...] -> [n, ceil(E / n), ...]`, the last row repeated; NumPy's arrays stay so."""
    places = np.arange(n * -(-x.shape[0] // n)).reshape(n, -1)
    return x[np.minimum(places, x.shape[0] - 1)]


def _selected(spec, indices):
    return any(name in indices for name in spec or ())


def _check_like(call, selection, params):
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


# ------------------------------------------------------------------------------------------------
# Factories: everything is checked here, on the host.


def select(
    axes: Any,
    indices: Mapping[str, Any],
    *,
    like: Any,
    sizes: Mapping[str, int] | None = None,
) -> Selection:
    """A `Selection` from index sets, validated on the host.

    Args:
      axes: tree like the parameters with `PartitionSpec` leaves that name dimensions, as
        `flax.linen.get_partition_spec` returns: `P("class")`, `P(None, "hidden")`, `P()` for what
        everybody shares. Or a function of the parameters that returns one.
      indices: for each axis name to select, integers `[E, m]` (the element's rows, in this order),
        `[E]` (one row, and the element's array lacks the axis), or E sequences of different
        lengths (padded past the end). Names that no parameter has select samples; see `in_axes` of
        `psjax.value_and_grad`.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
      sizes: sizes of axes that no parameter has; by default their largest index + 1. Give them
        where index sets change between calls of a jitted function: sizes are static.

    Returns:
      A `Selection` of E elements, its arrays NumPy's.

    Raises:
      ValueError: axes that do not fit the parameters, one axis with two sizes, an index out of
        range, or a row twice within an element.
      TypeError: indices that are not integers.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = {"x": jnp.arange(5.)}
      >>> s = psjax.select({"x": P("i")}, {"i": [[0, 1, 2], [2, 3, 4]]}, like=w)
      >>> s.scatter_add(s.gather(w), w)["x"]
      Array([0., 1., 4., 3., 4.], dtype=float32)
    """
    specs, paths, found = _axis_sizes(axes, like)
    in_params = set(found)
    arrays = {name: _index_array(name, index) for name, index in indices.items()}
    _check_lengths(arrays)
    for name, size in (sizes or {}).items():
        if found.setdefault(name, size) != size:
            msg = f"select(sizes=...): axis {name!r} is {size} here but {found[name]} in like."
            raise ValueError(msg)
    for name, (index, filled) in arrays.items():
        if not index.size:
            msg = f"select(indices=...): axis {name!r} has no index; every element needs one."
            raise ValueError(msg)
        size = found.setdefault(name, int(index.max()) + 1)
        _check_range(name, index, filled, size)
        if name in in_params:
            _check_repeats(name, index, filled)
    padded = {
        name: np.where(filled, index, found[name]).astype(np.int32)
        for name, (index, filled) in arrays.items()
    }
    num_elements = len(next(iter(padded.values())))
    valid = np.ones(num_elements, bool)
    return Selection(padded, valid, specs, paths, tuple(sorted(found.items())))


def replicas(like: Any, num_elements: int) -> Selection:
    """Every element sees all parameters: data parallelism (sum) and local SGD (mean).

    Args:
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
      num_elements: E.

    Raises:
      ValueError: if `num_elements` is less than 1.
    """
    if num_elements < 1:
        msg = f"replicas(num_elements={num_elements}): write 1 or more."
        raise ValueError(msg)
    paths = tuple(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(like))
    return Selection({}, np.ones(num_elements, bool), (P(),) * len(paths), paths, ())


def ordered_pairs(num_classes: int) -> np.ndarray:
    """All ordered pairs (k, j), k != j: int32 `[C * (C - 1), 2]`, sorted; the elements of (6b).

    Raises:
      ValueError: fewer than two classes have no pairs.
    """
    return _pairs("ordered_pairs", num_classes, itertools.permutations)


def unordered_pairs(num_classes: int) -> np.ndarray:
    """All pairs k < j: int32 `[C * (C - 1) / 2, 2]`, sorted; one for h_kj and h_jk together.

    Raises:
      ValueError: fewer than two classes have no pairs.
    """
    return _pairs("unordered_pairs", num_classes, itertools.combinations)


def random_partition(
    key: jax.Array,
    axes: Any,
    sizes: Mapping[str, int],
    *,
    num_elements: int,
    stratified: bool = False,
) -> Selection:
    r"""Divide the rows of every named axis at random among the elements, each row to one.

    The membership indicators of section 3.1 of B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed
    Learning of Neural Networks using Independent Subnet Training*, arXiv:1910.02120, as index sets:
    $\sum_s m^l_{s,i} = 1$, $P[m^l_{s,i} = 1] = 1/n$, independent between axes.

    Where `num_elements` does not divide a size the shares differ by one row; the short ones, padded
    past the end, fall on random elements, independently for each axis, which keeps $1/n$ exact.

    Args:
      key: a PRNG key; may be traced, so that one compiled step serves every round.
      axes: tree of `PartitionSpec`s as in `select`.
      sizes: `{axis name: size}` of the axes to divide; other axes stay whole.
      num_elements: n.
      stratified: first cut every axis into n equal blocks, the shards of n owners, and divide each
        block among the elements; $n^2$ must divide the sizes. The marginals are the same; between
        owner and element the same number of rows passes whatever the key, so an exchange is one
        `all_to_all`.

    Returns:
      A `Selection` with `indices[name]` int32 `[n, ceil(size / n)]`, sorted within an element.

    Raises:
      ValueError: an axis that no parameter has, more elements than rows, blocks of unequal size.
    """
    specs, paths = _specs("random_partition", axes)
    known = {name for spec in specs for name in spec or () if name is not None}
    if num_elements < 1 or not sizes:
        msg = (
            f"random_partition(sizes={dict(sizes)}, num_elements={num_elements}): write one axis "
            "name with its size or more, and 1 element or more."
        )
        raise ValueError(msg)
    indices = {}
    for name, axis_key in zip(sorted(sizes), jax.random.split(key, len(sizes))):
        size = sizes[name]
        if name not in known:
            msg = (
                f"random_partition(sizes=...): no parameter has an axis {name!r}; the named ones "
                f"are {sorted(known)}. Annotate the parameters (flax.linen.with_partitioning)."
            )
            raise ValueError(msg)
        if num_elements > size:
            msg = (
                f"random_partition(num_elements={num_elements}): num_elements={num_elements} "
                f"exceeds size {size} of axis {name!r}; every element needs a row."
            )
            raise ValueError(msg)
        if not stratified:
            indices[name] = _shares(axis_key, size, num_elements)
            continue
        block, rest = divmod(size, num_elements)
        if rest or block % num_elements:
            msg = (
                f"random_partition(num_elements={num_elements}, stratified=True): axis {name!r} "
                f"has size {size}, which {num_elements} * {num_elements} must divide: "
                f"{num_elements} blocks, each of {num_elements} equal groups. Write another size, "
                "or stratified=False."
            )
            raise ValueError(msg)
        keys = jax.random.split(axis_key, num_elements)
        share = functools.partial(_shares, size=block, n=num_elements)
        within = jax.vmap(share)(keys)  # [owner, element, m]
        offset = block * jnp.arange(num_elements, dtype=jnp.int32)[:, None, None]
        indices[name] = jnp.moveaxis(within + offset, 0, 1).reshape(num_elements, -1)
    found = tuple(sorted(sizes.items()))
    valid = np.ones(num_elements, bool)
    blocks = num_elements if stratified else 1
    return Selection(indices, valid, specs, paths, found, tuple(sorted(sizes)), blocks)


def _shares(key, size, n):
    """A random partition of `size` rows among n: int32 `[n, ceil(size / n)]`, sorted, padded."""
    rows_key, short_key = jax.random.split(key)
    rows = jax.random.permutation(rows_key, jnp.arange(size, dtype=jnp.int32))
    if size % n == 0:
        return jnp.sort(rows.reshape(n, -1), axis=1)
    ranks = jax.random.permutation(short_key, jnp.arange(n, dtype=jnp.int32))
    lengths = size // n + (ranks < size % n).astype(jnp.int32)
    starts = jnp.cumsum(lengths, dtype=jnp.int32) - lengths
    places = jnp.arange(-(-size // n), dtype=jnp.int32)
    filled = places[None] < lengths[:, None]
    share = rows.at[starts[:, None] + places[None]].get(mode="fill", fill_value=size)
    return jnp.sort(jnp.where(filled, share, jnp.full_like(share, size)), axis=1)


def _pairs(call, num_classes, choose):
    if num_classes < 2:
        msg = f"{call}({num_classes}): one class has no pairs; write 2 or more."
        raise ValueError(msg)
    return np.array(list(choose(range(num_classes), 2)), np.int32)


def _specs(call, axes, like_paths=None):
    """Flat specs of a tree of axes, and their paths, which must be those of the parameters."""
    found = jax.tree_util.tree_leaves_with_path(axes, is_leaf=_is_spec)
    paths = tuple(keystr(path) for path, _ in found)
    if like_paths is not None and paths != like_paths:
        odd = sorted(set(paths) ^ set(like_paths)) or list(like_paths)
        msg = (
            f"{call}(axes=...): axes is not a tree like the parameters; they differ in "
            f"{', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}."
        )
        raise ValueError(msg)
    specs = []
    for path, spec in found:
        spec = P() if spec is None else spec
        if not isinstance(spec, P) or any(not isinstance(n, str | None) for n in spec):
            msg = (
                f"{call}(axes=...): {keystr(path)} has axes {spec!r}; write a PartitionSpec of "
                "names and None, one name a dimension."
            )
            raise ValueError(msg)
        specs.append(spec)
    return tuple(specs), paths


def _axis_sizes(axes, like):
    """Flat specs and paths of the parameters, and the size of every named axis."""
    axes = axes(like) if isinstance(axes, Callable) and not _is_spec(axes) else axes
    leaves = jax.tree_util.tree_leaves_with_path(like)
    paths = tuple(keystr(path) for path, _ in leaves)
    specs, _ = _specs("select", axes, paths)
    sizes, where = {}, {}
    for (path, x), spec in zip(leaves, specs):
        if len(spec) > x.ndim:
            msg = f"select(axes=...): {keystr(path)} has shape {tuple(x.shape)} but axes {spec}."
            raise ValueError(msg)
        for name, size in zip(spec, x.shape):
            if name is not None and sizes.setdefault(name, size) != size:
                msg = (
                    f"select(axes=...): axis {name!r} has size {sizes[name]} in {where[name]} but "
                    f"{size} in {keystr(path)}."
                )
                raise ValueError(msg)
            where.setdefault(name, keystr(path))
    return specs, paths, sizes


def _index_array(name, index) -> tuple[np.ndarray, np.ndarray]:
    """The index sets as one array, and which of its places are filled."""
    ragged = isinstance(index, Sequence) and len({np.shape(row) for row in index}) > 1
    rows = [np.asarray(row) for row in index] if ragged else [np.asarray(index)]
    if any(row.size and not np.issubdtype(row.dtype, np.integer) for row in rows):
        kinds = sorted({row.dtype.name for row in rows})
        msg = f"select(indices=...): axis {name!r} has indices of {kinds}; write integers."
        raise TypeError(msg)
    if ragged and max(row.ndim for row in rows) > 1:
        msg = f"select(indices=...): axis {name!r} has an element with indices of rank 2; write 1."
        raise ValueError(msg)
    if not ragged:
        if rows[0].ndim not in (1, 2):
            msg = (
                f"select(indices=...): axis {name!r} has indices of shape {rows[0].shape}; write "
                "[E, m], or [E] to take one row each."
            )
            raise ValueError(msg)
        return rows[0], np.ones(rows[0].shape, bool)
    width = max(row.size for row in rows)
    array, filled = np.zeros((len(rows), width), int), np.zeros((len(rows), width), bool)
    for e, row in enumerate(rows):
        array[e, : row.size], filled[e, : row.size] = row, True
    return array, filled


def _check_lengths(arrays):
    if not arrays:
        msg = "select(indices={}): nothing is selected; psjax.replicas(like, n) shares everything."
        raise ValueError(msg)
    lengths = {name: len(index) for name, (index, _) in arrays.items()}
    if len(set(lengths.values())) > 1:
        msg = f"select(indices=...): numbers of elements differ, {lengths}; write one row each."
        raise ValueError(msg)


def _check_range(name, index, filled, size):
    bad = np.argwhere(filled & ((index < 0) | (index >= size)))
    if bad.size:
        at = tuple(bad[0])
        msg = (
            f"select(indices=...): index {index[at]} of element {at[0]} is outside axis {name!r} "
            f"(size {size}). JAX would clamp the gather and drop the scatter, and the gradient "
            "would be wrong without a sign."
        )
        raise ValueError(msg)


def _check_repeats(name, index, filled):
    if index.ndim == 1:
        return
    for e, (row, ok) in enumerate(zip(index, filled)):
        rows, times = np.unique(row[ok], return_counts=True)
        if times.size and times.max() > 1:
            msg = (
                f"select(indices=...): element {e} holds row {rows[times.argmax()]} of axis "
                f"{name!r} {times.max()} times; an element sees a row once."
            )
            raise ValueError(msg)
