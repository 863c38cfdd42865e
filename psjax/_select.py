"""Index sets from the user, checked on the host: select, replicas, pairs of classes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._notation import is_plain, names, size_of, solved
from psjax._runs import runs_of
from psjax._selection import Selection, is_spec


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
    specs, paths, found = axis_sizes(axes, like)
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
    valid = np.ones(len(next(iter(padded.values()))), bool)
    distinct = tuple(sorted(in_params & set(padded)))
    disjoint = tuple(name for name in distinct if _no_row_twice(padded[name], found[name]))
    run_length, run_axes = runs_of(padded, [name for name in padded if name not in in_params])
    return Selection(
        padded,
        valid,
        specs,
        paths,
        tuple(sorted(found.items())),
        disjoint,
        distinct=distinct,
        run_length=run_length,
        run_axes=run_axes,
    )


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
    _check_classes("ordered_pairs", num_classes)
    k, j = np.nonzero(~np.eye(num_classes, dtype=bool))
    return np.stack([k, j], axis=1).astype(np.int32)


def unordered_pairs(num_classes: int) -> np.ndarray:
    """All pairs k < j: int32 `[C * (C - 1) / 2, 2]`, sorted; one for h_kj and h_jk together.

    Raises:
      ValueError: fewer than two classes have no pairs.
    """
    _check_classes("unordered_pairs", num_classes)
    return np.stack(np.triu_indices(num_classes, 1), axis=1).astype(np.int32)


def _check_classes(call, num_classes):
    if num_classes < 2:
        msg = f"{call}({num_classes}): one class has no pairs; write 2 or more."
        raise ValueError(msg)


def flat_specs(call, axes, like_paths=None):
    """Flat specs of a tree of axes, and their paths, which must be those of the parameters."""
    found = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_spec)
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


def axis_sizes(axes, like):
    """Flat specs and paths of the parameters, and the size of every named axis."""
    axes = axes(like) if isinstance(axes, Callable) and not is_spec(axes) else axes
    leaves = jax.tree_util.tree_leaves_with_path(like)
    paths = tuple(keystr(path) for path, _ in leaves)
    specs, _ = flat_specs("select", axes, paths)
    sizes, where = {}, {}
    for (path, x), spec in zip(leaves, specs):
        if len(spec) > x.ndim:
            msg = f"select(axes=...): {keystr(path)} has shape {tuple(x.shape)} but axes {spec}."
            raise ValueError(msg)
        for name, size in zip(spec, x.shape):
            if name is None or not is_plain(P(name)):
                continue
            if sizes.setdefault(name, size) != size:
                msg = (
                    f"select(axes=...): axis {name!r} has size {sizes[name]} in {where[name]} but "
                    f"{size} in {keystr(path)}."
                )
                raise ValueError(msg)
            where.setdefault(name, keystr(path))
    _solve(leaves, specs, sizes)
    return specs, paths, sizes


def _solve(leaves, specs, sizes):
    """Sizes of axes that stand only in products and sums, from those that are known."""
    dims = [
        (keystr(path), d, entry, x.shape[d])
        for (path, x), spec in zip(leaves, specs)
        for d, entry in enumerate(spec)
        if entry is not None and not is_plain(P(entry))
    ]
    left = dims
    while left:
        open_dims = []
        for dim in left:
            found = solved(dim[2], dim[3], sizes)
            if found is None:
                open_dims.append(dim)
                continue
            for name, size in found.items():
                if size < 1:
                    raise ValueError(_unfit(*dim, sizes))
                sizes[name] = size
        if len(open_dims) == len(left):
            path, d, entry, size = left[0]
            unknown = [name for name in names(P(entry)) if name not in sizes]
            msg = (
                f"select(axes=...): dimension {d} of {path} is {entry!r}, of size {size}, which "
                f"does not tell the sizes of {unknown}; write a number in the place of one."
            )
            raise ValueError(msg)
        left = open_dims
    for dim in dims:
        if size_of(dim[2], sizes) != dim[3]:
            raise ValueError(_unfit(*dim, sizes))


def _unfit(path, d, entry, size, sizes):
    known = {name: sizes[name] for name in names(P(entry)) if name in sizes}
    return (
        f"select(axes=...): dimension {d} of {path} has size {size}, but {entry!r} with the sizes "
        f"{known} is not that."
    )


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
    empty = -1 - np.arange(index.shape[1])  # each different from all rows, and from one another
    ordered = np.sort(np.where(filled, index, empty), axis=1)
    twice = np.argwhere(ordered[:, 1:] == ordered[:, :-1])
    if twice.size:
        e, place = twice[0]
        times = np.sum(ordered[e] == ordered[e, place])
        msg = (
            f"select(indices=...): element {e} holds row {ordered[e, place]} of axis {name!r} "
            f"{times} times; an element sees a row once."
        )
        raise ValueError(msg)


def _no_row_twice(index, size):
    """Whether no two elements hold the same row, known on the host: a partition, or a part of it.

    Elements of different numbers of rows return by a scatter: padding would need a place.
    """
    held = index.ravel()
    return index.ndim == 2 and bool((held < size).all() and np.bincount(held).max() <= 1)
