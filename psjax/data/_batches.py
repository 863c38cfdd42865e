"""Batches of a data set as index arrays: flat, sorted by label, in tiles, stratified.

The data set stays on the device as uint8. A batch is a row of indices into it, made on the host
with NumPy, so that a whole epoch is one `jax.lax.scan`. A *slot* is a place for a sample. An index
past the end means an empty slot, which has weight 0.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Integer

from psjax._types import Labels


def check_labels(labels: Labels, num_classes: int) -> np.ndarray:
    """Return the labels as int32, checked on the host, because code in `jit` cannot raise.

    Raises:
      TypeError: labels are not integers.
      ValueError: labels are empty, not of rank 1, or outside `[0, num_classes)`.
    """
    return labels_of(f"check_labels(labels, num_classes={num_classes})", labels, num_classes)


def labels_of(call: str, labels: Labels, num_classes: int):
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size:
        msg = f"{call}: labels have shape {labels.shape}; pass a non-empty [N]."
        raise ValueError(msg)
    if not np.issubdtype(labels.dtype, np.integer):
        msg = f"{call}: labels are {labels.dtype}; pass integers in [0, {num_classes})."
        raise TypeError(msg)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        msg = f"{call}: label {labels[bad[0]]} of sample {bad[0]} is outside [0, {num_classes})."
        raise ValueError(msg)
    return labels.astype(np.int32)


class Batches(NamedTuple):
    """Index batches of one epoch.

    Attributes:
      indices: `[steps, ...]`, int32 positions in the data set; N, past the end, for empty slots.
      weights: `[steps, ...]`, 1/L for each sample of a batch of L, 0 for empty slots. float32, or
        float64 if `jax_enable_x64` is on when the batches are made.
      labels: `[steps, rows]`, int32, the label of every row of `indices`. A row is a sample in flat
        batches (0 for an empty slot), a row of slots in batches by label, and a tile in tiles (C,
        past the end, for an empty tile).
    """

    indices: np.ndarray
    weights: np.ndarray
    labels: np.ndarray

    @property
    def padding_factor(self) -> float:
        """Slots per sample, 1 or more: how much work empty slots add."""
        return float(self.weights.size / np.count_nonzero(self.weights))


def _flat(labels: Integer[np.ndarray, " N"], batch_size: int, order: Labels | None):
    """The samples of the epoch as `[steps, batch_size]`; the last batch is padded with -1."""
    order = np.arange(len(labels)) if order is None else _check_order(order, len(labels))
    if not isinstance(batch_size, int) or not 1 <= batch_size <= len(order):
        msg = f"batches(batch_size={batch_size}): pass an integer from 1 to {len(order)}."
        raise ValueError(msg)
    steps = math.ceil(len(order) / batch_size)
    flat = np.full(steps * batch_size, -1)
    flat[: len(order)] = order
    return flat.reshape(steps, batch_size)


def _check_order(order: Labels, num_samples: int):
    order = np.asarray(order)
    if order.ndim != 1 or not order.size:
        msg = (
            f"batches(order=...): it has shape {order.shape}; pass a non-empty [M], or None for "
            "the data set's own order."
        )
        raise ValueError(msg)
    if not np.issubdtype(order.dtype, np.integer):
        msg = f"batches(order=...): it is {order.dtype}; pass integers in [0, {num_samples})."
        raise TypeError(msg)
    bad = np.flatnonzero((order < 0) | (order >= num_samples))
    if bad.size:
        msg = (
            f"batches(order=...): entry {bad[0]} is {order[bad[0]]}; pass positions in "
            f"[0, {num_samples}), the samples of the data set."
        )
        raise ValueError(msg)
    return order


def _weights(filled: Bool[np.ndarray, "..."]):
    """1/L where a slot is filled, L counted over all axes except the first."""
    sizes = filled.sum(axis=tuple(range(1, filled.ndim)), keepdims=True)
    return (filled / sizes).astype(jnp.result_type(float))


class _Runs(NamedTuple):
    """An epoch sorted by step and then by label. A run consists of the samples of a step and label.

    Attributes:
      steps: number of batches in the epoch.
      samples: `[M]`; within a run, they keep the order of the epoch.
      run: `[M]`, the run of each sample.
      place: `[M]`, the position of each sample in its run.
      step, label, length: `[runs]`.
    """

    steps: int
    samples: np.ndarray
    run: np.ndarray
    place: np.ndarray
    step: np.ndarray
    label: np.ndarray
    length: np.ndarray


def _runs(labels: Integer[np.ndarray, " N"], batch_size: int, order: Labels | None) -> _Runs:
    flat = _flat(labels, batch_size, order)
    samples = flat[flat >= 0]
    step, own = np.arange(len(samples)) // batch_size, labels[samples]
    key = step * (int(own.max()) + 1) + own
    by = np.argsort(key, kind="stable")
    samples, key, step, own = samples[by], key[by], step[by], own[by]
    first = np.diff(key, prepend=-1) > 0
    starts, run = np.flatnonzero(first), np.cumsum(first) - 1
    length = np.diff(starts, append=len(samples))
    place = np.arange(len(samples)) - starts[run]
    return _Runs(len(flat), samples, run, place, step[starts], own[starts], length)


def batches(labels: Labels, batch_size: int, order: Labels | None = None) -> Batches:
    """Flat batches, `indices [steps, batch_size]`. The last one may be short; nothing is dropped.

    Args:
      labels: `[N]`, integers from 0.
      batch_size: samples per batch, L.
      order: `[M]`, the samples of the epoch in order, as positions in `[0, N)`; None: in the order
        of the data set. A position may be left out, or occur several times and count each time.

    Raises:
      TypeError: labels or order are not integers.
      ValueError: labels or order are empty, an entry is out of range, or a batch is larger than the
        epoch.
    """
    labels = labels_of("batches(labels)", labels, 2**31)
    flat = _flat(labels, batch_size, order)
    own = np.where(flat < 0, 0, labels[flat]).astype(np.int32)
    indices = np.where(flat < 0, len(labels), flat).astype(np.int32)
    return Batches(indices, _weights(flat >= 0), own)


def most_of_a_label(
    labels: Labels, num_classes: int, batch_size: int, order: Labels | None = None
) -> int:
    """The largest number of samples of one label in a batch: so many slots drop nothing."""
    labels = check_labels(labels, num_classes)
    return int(_runs(labels, batch_size, order).length.max())


def batches_by_label(
    labels: Labels,
    num_classes: int,
    batch_size: int,
    order: Labels | None = None,
    slots: int | None = None,
) -> Batches:
    """Batches sorted by label, `indices [steps, C, slots]`: row k has the samples with label k.

    The samples of step s are those of `batches(...)`. Nothing is dropped, and a label without
    samples in a batch has only empty slots.

    Args:
      labels: `[N]`, integers in `[0, num_classes)`.
      num_classes: number of classes, C.
      batch_size: samples per batch, L.
      order: `[M]`, the samples of the epoch in order, as in `batches`.
      slots: places per label in a batch; None: `most_of_a_label`. If the order changes between
        epochs, pass the largest number of all epochs, for a constant shape.

    Raises:
      ValueError: labels or sizes are wrong, or a batch needs more slots.
    """
    labels = check_labels(labels, num_classes)
    runs = _runs(labels, batch_size, order)
    needed = int(runs.length.max())
    slots = needed if slots is None else slots
    if slots < needed:
        msg = (
            f"batches_by_label(slots={slots}): a batch has {needed} samples of one label; pass "
            f"slots={needed} or more, so that nothing is dropped."
        )
        raise ValueError(msg)
    indices = np.full((runs.steps, num_classes, slots), len(labels), np.int32)
    indices[runs.step[runs.run], runs.label[runs.run], runs.place] = runs.samples
    rows = np.tile(np.arange(num_classes, dtype=np.int32), (runs.steps, 1))
    return Batches(indices, _weights(indices < len(labels)), rows)


def tiles_by_label(
    labels: Labels,
    num_classes: int,
    batch_size: int,
    tile: int,
    order: Labels | None = None,
    tiles: int | None = None,
) -> Batches:
    """Batches cut into tiles of `tile` samples of one label each, `indices [steps, tiles, tile]`.

    The work follows the true counts: a label with 13 samples has four tiles of 4, and a label
    without samples has none. `labels[s, t]` is the label of tile t in step s.

    Args:
      labels: `[N]`, integers in `[0, num_classes)`.
      num_classes: number of classes, C.
      batch_size: samples per batch, L.
      order: `[M]`, the samples of the epoch in order, as in `batches`.
      tile: samples per tile.
      tiles: tiles per batch; None: as many as the fullest batch of the epoch needs.

    Raises:
      ValueError: labels or sizes are wrong, or a batch needs more tiles.
    """
    labels = check_labels(labels, num_classes)
    if not isinstance(tile, int) or tile < 1:
        msg = f"tiles_by_label(tile={tile}): pass a positive integer."
        raise ValueError(msg)
    runs = _runs(labels, batch_size, order)
    of_run = -(-runs.length // tile)
    start = np.cumsum(of_run) - of_run  # tiles of all earlier runs, then of those in the same step
    start -= start[np.searchsorted(runs.step, runs.step)]
    needed = int((start + of_run).max())
    tiles = needed if tiles is None else tiles
    if tiles < needed:
        msg = f"tiles_by_label(tiles={tiles}): a batch needs {needed} tiles; pass {needed} or more."
        raise ValueError(msg)
    indices = np.full((runs.steps, tiles, tile), len(labels), np.int32)
    tile_labels = np.full((runs.steps, tiles), num_classes, np.int32)
    step, at = runs.step[runs.run], start[runs.run] + runs.place // tile
    indices[step, at, runs.place % tile] = runs.samples
    tile_labels[step, at] = runs.label[runs.run]
    return Batches(indices, _weights(indices < len(labels)), tile_labels)


def stratified_order(labels: Labels, num_classes: int, batch_size: int, seed: int) -> np.ndarray:
    """A random order in which each batch has each label in proportion, up to one sample.

    The samples of each label are shuffled and spread evenly over the epoch, so that batches by
    label have hardly any empty slots. Every sample occurs once.

    Returns:
      `[N]`, int64, for the argument `order`.
    """
    labels = check_labels(labels, num_classes)
    _flat(labels, batch_size, None)
    rng = np.random.default_rng(seed)
    place = np.empty(len(labels))
    for label in range(num_classes):
        own = rng.permutation(np.flatnonzero(labels == label))
        place[own] = (np.arange(len(own)) + rng.uniform()) / max(len(own), 1)
    order = np.argsort(place, kind="stable")
    # Shuffle within each batch: otherwise the place of a sample would reveal its label.
    return np.concatenate([rng.permutation(b[b >= 0]) for b in _flat(order, batch_size, order)])
