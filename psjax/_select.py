"""`select` and `replicas`: selections from index sets, which are checked on the host."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath, keystr
from jaxtyping import Bool, Integer

from psjax._notation import is_plain, names, size_of, solved, terms
from psjax._runs import runs_of
from psjax._selection import Selection, is_spec
from psjax._types import Params, Sizes, Spec


def select(
    axes: Any,
    indices: Mapping[str, Any],
    *,
    like: Any,
    sizes: Mapping[str, int] | None = None,
    specialize: bool = True,
) -> Selection:
    """Make a `Selection` from index sets: which rows of the named axes each element sees.

    The index sets are checked on the host, before anything is traced.

    Args:
      axes: tree like the parameters with `PartitionSpec` leaves that name dimensions, as
        `flax.linen.get_partition_spec` returns: `P("class")`, `P(None, "hidden")`, and `P()` or
        None for leaves that all elements share. As in `in_axes` of `jax.vmap`, an entry may stand
        for a whole subtree, such as `{"trunk": None, "head": P("class")}`; every leaf needs an
        entry. A function of the parameters that returns such a tree is accepted, too; a callable
        pytree that contains specs, such as an equinox module, counts as a tree.
      indices: for each axis name to select, integers `[E, m]` (the element's rows, in this order),
        `[E]` (one row; the element's array then lacks the axis), E sequences of different lengths,
        or a `numpy.ma` masked array `[E, m]`, where masked places select nothing. A name that no
        parameter has selects samples; see `in_axes` of `psjax.value_and_grad`.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them. A None in it is not a leaf. Metadata
        boxes, such as `flax.linen.Partitioned` and `flax.nnx.Param`, are nodes of the tree: pass
        parameters with boxes both here and where the selection is used, or unbox in both places.
      sizes: sizes of axes that no parameter has; by default their largest index + 1. Sizes are
        static: pass them where index sets change between calls of a jitted function.
      specialize: whether programs may exploit the structure of these index sets. Computations that
        consecutive elements share are then done once, and an axis of which no two elements share a
        row needs no scatter. The structure is static: a jitted function compiles once for each.
        Pass False if index sets are drawn anew for every call, so that one program serves all.

    Returns:
      A `Selection` of E elements. Its arrays are NumPy arrays.

    Raises:
      ValueError: `axes` does not fit the parameters, an axis has two sizes, an index is out of
        range, an element has a row twice, or a name is not an axis of the parameters but nearly
        one, and `sizes` does not have it.
      TypeError: the indices are not integers.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = {"x": jnp.arange(5.)}
      >>> s = psjax.select({"x": P("i")}, {"i": [[0, 1, 2], [2, 3, 4]]}, like=w)
      >>> s.scatter_add(s.gather(w), w)["x"]
      Array([0., 1., 4., 3., 4.], dtype=float32)
    """
    return selection_of("select", axes, indices, like, sizes, specialize)


def selection_of(
    call: str,
    axes: Any,
    indices: Mapping[str, Any],
    like: Any,
    sizes: Mapping[str, int] | None = None,
    specialize: bool = True,
) -> Selection:
    """What `select` returns; `call` is the function that the user called, for messages."""
    specs, paths, found = axis_sizes(call, axes, like, sizes)
    in_params = sorted(found)
    arrays = {name: _index_array(call, name, index) for name, index in indices.items()}
    _check_lengths(call, arrays)
    for name, size in (sizes or {}).items():
        check_size(call, name, size, found)
        found[name] = int(size)
    for name, (index, filled) in arrays.items():
        if not index.size:
            msg = f"{call}(indices=...): axis {name!r} has no index; every element needs one."
            raise ValueError(msg)
        if name not in found:
            _check_name(call, name, in_params)
        size = found.setdefault(name, int(index.max(where=filled, initial=0)) + 1)
        _check_range(call, name, index, filled, size)
        if name in in_params:
            _check_repeats(call, name, index, filled)
    padded = {
        name: np.where(filled, index, found[name]).astype(np.int32)
        for name, (index, filled) in arrays.items()
    }
    valid = np.ones(len(next(iter(padded.values()))), bool)
    distinct = tuple(name for name in in_params if name in padded)
    disjoint, run_length, run_axes = (), 1, ()
    if specialize:
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


def check_size(call: str, name: str, size: Any, found: Mapping[str, int]) -> None:
    """Raise unless `size` is positive and equals the size of the axis in the parameters, if any."""
    if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
        msg = f"{call}(sizes=...): axis {name!r} has size {size!r}; pass an integer, 1 or more."
        raise ValueError(msg)
    if found.get(name, size) != size:
        msg = f"{call}(sizes=...): axis {name!r} is {size} here but {found[name]} in like."
        raise ValueError(msg)


def replicas(like: Any, num_elements: int) -> Selection:
    """Make a `Selection` in which every element sees all parameters.

    With `psjax.value_and_grad` it gives data parallelism, with `psjax.local_update` local SGD.

    Args:
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
      num_elements: number of elements, E.

    Raises:
      ValueError: if `num_elements` is less than 1.
    """
    check_count("replicas", "num_elements", num_elements)
    paths = tuple(keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(like))
    return Selection({}, np.ones(num_elements, bool), (P(),) * len(paths), paths, ())


def check_count(call: str, name: str, number: Any, least: int = 1) -> None:
    """Raise unless a number of something is an integer, `least` or more."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
        msg = f"{call}({name}={number!r}): pass {least} or more."
        raise ValueError(msg)


def flat_specs(call: str, axes: Any, like: Any = None) -> tuple[tuple[P, ...], tuple[str, ...]]:
    """The spec of every leaf of the parameters, flat, and the path of every leaf.

    Args:
      call: the function that the user called, for messages.
      axes: as in `select`.
      like: the parameters; None: `axes` is a whole tree, one entry per leaf.
    """
    if is_function(axes):
        if like is None:
            msg = (
                f"{call}(axes=...): axes is a function of the parameters; pass them as like=, or "
                "what the function returns."
            )
            raise ValueError(msg)
        axes = axes(like)
    found = jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_spec)
    arrays = [keystr(path) for path, x in found if hasattr(x, "shape")]
    if arrays:
        msg = (
            f"{call}(axes=...): axes has an array in {arrays[0]}; pass names, such as those that "
            "flax.linen.get_partition_spec or flax.nnx.get_partition_spec returns."
        )
        raise ValueError(msg)
    specs = [spec for _, spec in found] if like is None else _spread(call, found, like)
    leaves = found if like is None else jax.tree_util.tree_leaves_with_path(like)
    paths = tuple(keystr(path) for path, _ in leaves)
    for path, spec in zip(paths, specs):
        _check_spec(call, path, spec)
    return tuple(P() if spec is None else spec for spec in specs), paths


def is_function(axes: Any) -> bool:
    """Whether axes is a function of the parameters: callable, and not a pytree with specs in it."""
    held = jax.tree.leaves(axes, is_leaf=is_spec)
    return isinstance(axes, Callable) and not any(isinstance(x, P) for x in held)


def _spread(call: str, entries: Sequence[tuple[KeyPath, Any]], like: Params):
    """The entry of every leaf: that of the leaf itself, or of a subtree that the leaf is in."""
    as_keys = lambda path: tuple(map(str, path))
    given = {as_keys(path): spec for path, spec in entries}
    used, found, missing = set(), [], []
    for path, _ in jax.tree_util.tree_leaves_with_path(like):
        keys = as_keys(path)
        at = next((keys[:n] for n in range(len(keys) + 1) if keys[:n] in given), None)
        if at is None:
            missing.append(keystr(path))
            continue
        used.add(at)
        found.append(given[at])
    no_leaf = lambda x: not jax.tree.leaves(x)  # None, or an empty container: its entry is unused
    empty = jax.tree_util.tree_leaves_with_path(like, is_leaf=no_leaf)
    unused = [as_keys(path) for path, x in empty if no_leaf(x)]
    used |= {keys for keys in given for x in unused if keys[: len(x)] == x[: len(keys)]}
    extra = [keystr(path) for path, _ in entries if as_keys(path) not in used]
    if missing or extra:
        show = lambda xs: f"{', '.join(xs[:3])}{' ...' if len(xs) > 3 else ''}"
        parts = []
        if missing:
            parts.append(f"it has no entry for {show(missing)} (None: all elements share it)")
        if extra:
            parts.append(f"the parameters have no {show(extra)}")
        msg = (
            f"{call}(axes=...): axes is not a tree like the parameters; {'; '.join(parts)}. An "
            "entry may also stand for a whole subtree."
        )
        raise ValueError(msg)
    return found


def _check_spec(call: str, path: str, spec: Any):
    if spec is not None and (
        not isinstance(spec, P) or any(not isinstance(n, str | None) for n in spec)
    ):
        msg = (
            f"{call}(axes=...): {path} has axes {spec!r}; pass a PartitionSpec of names and None, "
            "one entry per dimension."
        )
        raise ValueError(msg)
    for entry in spec or ():
        try:
            terms(entry)
        except ValueError as error:
            msg = f"{call}(axes=...): {path} has axes {spec}; {error}"
            raise ValueError(msg) from None


def axis_sizes(
    call: str, axes: Any, like: Any, given: Mapping[str, Any] | None = None
) -> tuple[tuple[P, ...], tuple[str, ...], dict[str, int]]:
    """Flat specs and paths of the parameters, and the size of every named axis.

    `given` are sizes that the user knows, for axes that stand only in products and sums.
    """
    specs, paths = flat_specs(call, axes, like)
    shapes = [_shape(call, path, x) for path, x in zip(paths, jax.tree.leaves(like))]
    sizes, where = {}, {}
    for path, shape, spec in zip(paths, shapes, specs):
        if len(spec) > len(shape):
            msg = f"{call}(axes=...): {path} has shape {shape} but axes {spec}."
            raise ValueError(msg)
        for name, size in zip(spec, shape):
            if name is None or not is_plain(P(name)):
                continue
            if sizes.setdefault(name, size) != size:
                msg = (
                    f"{call}(axes=...): axis {name!r} has size {sizes[name]} in {where[name]} but "
                    f"{size} in {path}."
                )
                raise ValueError(msg)
            where.setdefault(name, path)
    used = {name for spec in specs for name in names(spec)} - set(sizes)
    known = {**(getattr(axes, "sizes", {}) if is_function(axes) else {}), **(given or {})}
    for name in sorted(used & set(known)):
        check_count(f"{call}(sizes=...)", name, known[name])
        sizes[name] = int(known[name])
    _solve(call, paths, shapes, specs, sizes)
    return specs, paths, sizes


def _shape(call: str, path: str, x: Any):
    if not (hasattr(x, "shape") and hasattr(x, "dtype")) and not np.isscalar(x):
        msg = (
            f"{call}(like=...): {path} is {x!r}, which is not an array; pass arrays, and None "
            "for everything else."
        )
        raise ValueError(msg)
    return tuple(np.shape(x))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of which this one may be a misspelling, or None."""
    name, folded = name.casefold(), {other.casefold(): other for other in known}
    # 'clas', 'Class', 'calss' and 'classes' are near to 'class'; 'batch' and 'patch' are two names.
    found = difflib.get_close_matches(name, folded, n=1, cutoff=0.83)
    found += [other for other in folded if sorted(other) == sorted(name)]
    return folded[found[0]] if found else None


def _solve(
    call: str,
    paths: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    specs: Sequence[Spec],
    sizes: dict[str, int],
):
    """Sizes of axes that stand only in products and sums, from those that are known."""
    dims = [
        (path, d, entry, shape[d])
        for path, shape, spec in zip(paths, shapes, specs)
        for d, entry in enumerate(spec or ())
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
                    raise ValueError(_unfit(call, *dim, sizes))
                sizes[name] = size
        if len(open_dims) == len(left):
            path, d, entry, size = left[0]
            unknown = [name for name in names(P(entry)) if name not in sizes]
            msg = (
                f"{call}(axes=...): dimension {d} of {path} is {entry!r}, of size {size}, which "
                f"does not tell the sizes of {unknown}; pass a number in place of one of them."
            )
            raise ValueError(msg)
        left = open_dims
    for dim in dims:
        if size_of(dim[2], sizes) != dim[3]:
            raise ValueError(_unfit(call, *dim, sizes))


def _unfit(call: str, path: str, d: int, entry: str, size: int, sizes: Sizes):
    known = {name: sizes[name] for name in names(P(entry)) if name in sizes}
    return (
        f"{call}(axes=...): dimension {d} of {path} has size {size}, but {entry!r} with the sizes "
        f"{known} is not that."
    )


def _index_array(call: str, name: str, index: Any) -> tuple[np.ndarray, np.ndarray]:
    """The index sets as one array, and which of its places are filled."""
    if isinstance(index, np.ma.MaskedArray):
        rows, filled = [np.ma.getdata(index)], ~np.ma.getmaskarray(index)
    else:
        rows, filled = _rows(index), None
    if any(row.size and not np.issubdtype(row.dtype, np.integer) for row in rows):
        kinds = sorted({row.dtype.name for row in rows})
        msg = f"{call}(indices=...): axis {name!r} has indices of {kinds}; pass integers."
        raise TypeError(msg)
    if len(rows) > 1 and max(row.ndim for row in rows) > 1:
        msg = f"{call}(indices=...): axis {name!r} has an element of rank 2; pass rank 1."
        raise ValueError(msg)
    if len(rows) == 1:
        if rows[0].ndim not in (1, 2):
            msg = (
                f"{call}(indices=...): axis {name!r} has indices of shape {rows[0].shape}; pass "
                "[E, m], or [E] to take one row each."
            )
            raise ValueError(msg)
        return rows[0], np.ones(rows[0].shape, bool) if filled is None else filled
    lengths = np.array([row.size for row in rows])
    filled = np.arange(lengths.max()) < lengths[:, None]
    array = np.zeros(filled.shape, int)
    array[filled] = np.concatenate([row.reshape(-1) for row in rows if row.size])
    return array, filled


def _rows(index: Any):
    """The index sets as one array, in a list, or as one array per element: of several lengths."""
    try:
        return [np.asarray(index)]
    except ValueError:  # an inhomogeneous shape
        return [np.asarray(row) for row in index]


def _check_lengths(call: str, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]]):
    if not arrays:
        msg = f"{call}(indices={{}}): nothing is selected; psjax.replicas(like, n) shares "
        raise ValueError(msg + "everything.")
    lengths = {name: len(index) for name, (index, _) in arrays.items()}
    if len(set(lengths.values())) > 1:
        msg = f"{call}(indices=...): numbers of elements differ, {lengths}; they must agree."
        raise ValueError(msg)


def _check_name(call: str, name: str, in_params: Sequence[str]):
    """Refuse a misspelled axis of the parameters: it would select samples."""
    other = nearest(name, in_params)
    if other is not None:
        msg = (
            f"{call}(indices=...): no parameter has an axis {name!r}; the nearest is {other!r}. "
            f"Pass {other!r}; or name a dimension of the parameters {name!r} in axes; or, for an "
            f"axis of samples, pass its size, sizes={{{name!r}: ...}}."
        )
        raise ValueError(msg)


def _check_range(
    call: str,
    name: str,
    index: Integer[np.ndarray, "E ..."],
    filled: Bool[np.ndarray, "E ..."],
    size: int,
):
    bad = filled & ((index < 0) | (index >= size))
    if bad.any():
        at = tuple(np.argwhere(bad)[0])
        msg = (
            f"{call}(indices=...): index {index[at]} of element {at[0]} is outside axis {name!r} "
            f"(size {size}). JAX would clamp the gather and drop the scatter, and the gradient "
            "would be wrong without an error."
        )
        raise ValueError(msg)


def _check_repeats(
    call: str, name: str, index: Integer[np.ndarray, "E ..."], filled: Bool[np.ndarray, "E ..."]
):
    if index.ndim == 1:
        return
    empty = -1 - np.arange(index.shape[1])  # each different from all rows, and from one another
    ordered = np.sort(np.where(filled, index, empty), axis=1)
    twice = ordered[:, 1:] == ordered[:, :-1]
    if twice.any():
        e, place = np.argwhere(twice)[0]
        times = np.sum(ordered[e] == ordered[e, place])
        msg = (
            f"{call}(indices=...): element {e} holds row {ordered[e, place]} of axis {name!r} "
            f"{times} times; pass every row once per element."
        )
        raise ValueError(msg)


def _no_row_twice(index: Integer[np.ndarray, "E ..."], size: int):
    """Whether no two elements hold the same row: a partition, or a part of one.

    False where elements have different numbers of rows: padding has no place in the leaf, so that
    these need a scatter.
    """
    held = index.ravel()
    return index.ndim == 2 and bool((held < size).all() and np.bincount(held).max() <= 1)
