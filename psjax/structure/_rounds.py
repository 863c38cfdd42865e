"""Rounds of elements that share no weight: a colouring of the graph of overlaps.

The public names are in `psjax.structure`.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Integer

from psjax._selection import Selection, repeat
from psjax.structure._overlap import overlap


def rounds(num_classes: int) -> np.ndarray:
    """All pairs of classes in rounds of pairs that share no class: int32 `[R, C // 2, 2]`.

    Every pair k < j occurs once, and the pairs of a round are sorted. This is an edge colouring of
    the complete graph with the fewest colours: R = C - 1 for even C, and R = C for odd C. It is
    made by the circle method: one class (or, for odd C, an empty place) stands still, and the other
    classes turn around it.

    Raises:
      ValueError: there are fewer than two classes.
    """
    if num_classes < 2:
        msg = f"rounds({num_classes}): one class has no pairs; pass 2 or more."
        raise ValueError(msg)
    m = num_classes - 1 + num_classes % 2  # classes in the circle
    r, i = np.arange(m)[:, None], np.arange(1, (m + 1) // 2)
    pairs = np.stack([(r + i) % m, (r - i) % m], axis=-1)
    if num_classes > m:
        still = np.stack([r, np.full_like(r, m)], axis=-1)
        pairs = np.concatenate([pairs, still], axis=1)
    pairs = np.sort(pairs, axis=2)
    order = np.argsort(pairs[..., :1], axis=1)  # no class comes twice in a round
    return np.take_along_axis(pairs, order, axis=1).astype(np.int32)


def disjoint_rounds(selection: Selection, like: Any) -> list[np.ndarray]:
    """Elements in rounds of elements that share no weight: a colouring of the overlap graph.

    The colouring is greedy, starting with the element that overlaps most others. If the elements
    are pairs of rows of one axis, `rounds` is tried, too, and the fewer rounds are returned. For
    all pairs of classes, ordered or not, without the shared layers, that is the fewest possible. If
    all elements overlap, for example in a trunk that is kept, every round has one element.

    Args:
      selection: the index sets, with masks, if any, that are not traced.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.

    Returns:
      One array per round with its elements, ascending. Every valid element occurs once.
    """
    conflict = overlap(selection, like) > 0
    np.fill_diagonal(conflict, False)
    valid = np.flatnonzero(selection.valid)
    best = _greedy(conflict, valid)
    for name, index in selection.indices.items():
        index = np.asarray(index)
        if index.ndim != 2 or index.shape[1] != 2 or (index[valid] >= selection.sizes[name]).any():
            continue
        found = _circle(index, valid, selection.sizes[name])
        if len(found) < len(best) and not any(conflict[np.ix_(e, e)].any() for e in found):
            best = found
    return best


def in_rounds(selection: Selection, like: Any) -> Selection:
    """The elements of `disjoint_rounds` as selections to scan over: leaves `[R, m, ...]`.

    A round with fewer than m elements is padded with elements that are not valid. Masks are
    repeated for every round; draw large masks inside the loop.

    If no two elements of a round share a row of an axis, that axis is listed in
    `Selection.disjoint`. Evaluating the whole round at once (`chunk_size` m or more) then avoids a
    scatter. An axis is not listed if elements have different numbers of its rows.

    Args:
      selection: the index sets, with masks, if any, that are not traced.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
    """
    found = disjoint_rounds(selection, like)
    if not found:
        msg = "in_rounds(selection): no element of the selection is valid; select one or more."
        raise ValueError(msg)
    m = max(map(len, found))
    own = np.arange(m) < np.array([[len(e)] for e in found])
    order = np.stack([np.pad(e, (0, m - len(e)), mode="edge") for e in found])
    indices = {name: np.asarray(index)[order] for name, index in selection.indices.items()}
    keep = jax.tree.map(lambda x: repeat(x, len(found)), selection.keep)
    disjoint = tuple(
        name
        for name, index in sorted(indices.items())
        if index.ndim == 3
        and _no_row_twice(index, own, selection.sizes[name])
        and (index[own] < selection.sizes[name]).all()  # a partition has no padding
    )
    return dataclasses.replace(selection, indices=indices, valid=own, keep=keep, disjoint=disjoint)


def _greedy(conflict: Bool[np.ndarray, "E E"], elements: Integer[np.ndarray, " n"]):
    colour = np.full(len(conflict), -1)
    taken: list[np.ndarray] = []  # per colour, the elements that can no longer have it
    for e in elements[np.argsort(-conflict[elements].sum(axis=1), kind="stable")]:
        c = next((c for c, t in enumerate(taken) if not t[e]), len(taken))
        if c == len(taken):
            taken.append(np.zeros(len(conflict), bool))
        colour[e] = c
        taken[c] |= conflict[e]
    return [np.flatnonzero(colour == c) for c in range(len(taken))]


def _circle(index: Integer[np.ndarray, "..."], elements: Integer[np.ndarray, " n"], num_rows: int):
    """Rounds of pairs of rows by the circle method; a pair that occurs n times takes n rounds."""
    at = np.zeros((num_rows, num_rows), int)
    for r, pairs in enumerate(rounds(num_rows)):
        at[pairs[:, 0], pairs[:, 1]] = r
    found: dict[tuple[int, int], list[int]] = {}
    times: dict[tuple[int, int], int] = {}
    for e in elements:
        k, j = sorted(int(i) for i in index[e])
        times[k, j] = times.get((k, j), 0) + 1
        found.setdefault((times[k, j], int(at[k, j])), []).append(int(e))
    return [np.array(found[key]) for key in sorted(found)]


def _no_row_twice(index: Integer[np.ndarray, "..."], own: Bool[np.ndarray, "..."], size: int):
    return all(
        np.bincount(row[ok].ravel(), minlength=size + 1)[:size].max(initial=0) <= 1
        for row, ok in zip(index, own)
    )
