"""Batches of a data set as index arrays: whole, by label, in tiles, stratified. Pure NumPy.

A data set stays on the device as uint8; a batch is a row of indices into it, made once on the host,
so that a whole epoch is one `jax.lax.scan`. An index past the end is an empty slot, of weight 0.
"""

import math
from typing import NamedTuple

import numpy as np


def check_labels(labels, num_classes: int) -> np.ndarray:
    """The labels as int32, checked on the host: inside `jit` nothing can raise.

    Raises:
      TypeError: labels that are not integers.
      ValueError: empty, of rank other than 1, or outside `[0, num_classes)`.
    """
    return labels_of(f"check_labels(labels, num_classes={num_classes})", labels, num_classes)


def labels_of(call, labels, num_classes):
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size:
        msg = f"{call}: labels have shape {labels.shape}; write a non-empty [N]."
        raise ValueError(msg)
    if not np.issubdtype(labels.dtype, np.integer):
        msg = f"{call}: labels are {labels.dtype}; write integers in [0, {num_classes})."
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
      weights: `[steps, ...]`, float32: 1/L for each sample of a batch of L, 0 for empty slots.
      labels: `[steps, rows]`, int32, the label of every row of `indices`: of a sample in flat
        batches (0 in an empty slot), of a row of slots in batches by label, of a tile (C, past the
        end, for an empty one).
    """

    indices: np.ndarray
    weights: np.ndarray
    labels: np.ndarray

    @property
    def padding_factor(self) -> float:
        """Slots per sample, at least 1: what empty slots cost."""
        return float(self.weights.size / np.count_nonzero(self.weights))


def _flat(labels, batch_size, order):
    """The epoch's samples as `[steps, batch_size]`, -1 where the last batch has none."""
    order = np.arange(len(labels)) if order is None else _check_order(order, len(labels))
    if not isinstance(batch_size, int) or not 1 <= batch_size <= len(order):
        msg = f"batches(batch_size={batch_size}): write an integer from 1 to {len(order)}."
        raise ValueError(msg)
    steps = math.ceil(len(order) / batch_size)
    flat = np.full(steps * batch_size, -1)
    flat[: len(order)] = order
    return flat.reshape(steps, batch_size)


def _check_order(order, num_samples):
    order = np.asarray(order)
    if order.ndim != 1 or not order.size:
        msg = (
            f"batches(order=...): it has shape {order.shape}; write a non-empty [M], or None for "
            "the data set's own order."
        )
        raise ValueError(msg)
    if not np.issubdtype(order.dtype, np.integer):
        msg = f"batches(order=...): it is {order.dtype}; write integers in [0, {num_samples})."
        raise TypeError(msg)
    bad = np.flatnonzero((order < 0) | (order >= num_samples))
    if bad.size:
        msg = (
            f"batches(order=...): entry {bad[0]} is {order[bad[0]]}; write positions in "
            f"[0, {num_samples}), the samples of the data set."
        )
        raise ValueError(msg)
    return order


def _weights(filled):
    """1/L where a slot is filled, L counted over everything but the first axis."""
    sizes = filled.sum(axis=tuple(range(1, filled.ndim)), keepdims=True)
    return (filled / sizes).astype(np.float32)


def batches(labels, batch_size: int, order=None) -> Batches:
    """Flat batches, `indices [steps, batch_size]`; the last one may be short, nothing is dropped.

    Args:
      labels: `[N]`, integers from 0.
      batch_size: L.
      order: `[M]`, the epoch's samples in order, positions in `[0, N)`; None: the data set's own. A
        position may be left out, or come more than once: it then counts each time.

    Raises:
      TypeError: labels or an order that are not integers.
      ValueError: empty labels or order, entries out of range, a batch larger than the epoch.
    """
    labels = labels_of("batches(labels)", labels, 2**31)
    flat = _flat(labels, batch_size, order)
    own = np.where(flat < 0, 0, labels[flat]).astype(np.int32)
    indices = np.where(flat < 0, len(labels), flat).astype(np.int32)
    return Batches(indices, _weights(flat >= 0), own)


def most_of_a_label(labels, num_classes: int, batch_size: int, order=None) -> int:
    """The largest count of one label in one batch of the epoch: the slots that drop nothing."""
    labels = check_labels(labels, num_classes)
    counts = [np.bincount(labels[b[b >= 0]]).max() for b in _flat(labels, batch_size, order)]
    return int(max(counts))


def batches_by_label(
    labels, num_classes: int, batch_size: int, order=None, slots: int | None = None
) -> Batches:
    """Batches sorted by label, `indices [steps, C, slots]`: row k holds the samples labelled k.

    The samples of step s are those of `batches(...)`; nothing is dropped, and a label that a batch
    lacks has only empty slots.

    Args:
      labels: `[N]`, integers in `[0, num_classes)`.
      num_classes: C.
      batch_size: L.
      order: `[M]`, the epoch's samples in order, as in `batches`; None: the data set's own.
      slots: samples of one label that a batch has room for; None: `most_of_a_label`. Give the
        largest over all epochs where the order changes, for a constant shape.

    Raises:
      ValueError: bad labels or sizes, or fewer slots than a batch needs.
    """
    labels = check_labels(labels, num_classes)
    flat = _flat(labels, batch_size, order)
    needed = most_of_a_label(labels, num_classes, batch_size, order)
    slots = needed if slots is None else slots
    if slots < needed:
        msg = (
            f"batches_by_label(slots={slots}): a batch has {needed} samples of one label; write "
            f"slots={needed} or more, for nothing may be dropped."
        )
        raise ValueError(msg)
    indices = np.full((len(flat), num_classes, slots), len(labels), np.int32)
    for step, batch in enumerate(flat):
        batch = batch[batch >= 0]
        for label in range(num_classes):
            own = batch[labels[batch] == label]
            indices[step, label, : len(own)] = own
    filled = indices < len(labels)
    rows = np.tile(np.arange(num_classes, dtype=np.int32), (len(flat), 1))
    return Batches(indices, _weights(filled), rows)


def tiles_by_label(
    labels, num_classes: int, batch_size: int, tile: int, order=None, tiles: int | None = None
) -> Batches:
    """Batches cut into tiles of `tile` samples of one label each, `indices [steps, tiles, tile]`.

    The work follows the true counts: a label with 13 samples has four tiles of 4, one with none has
    none. `labels[s, t]` says which label tile t of step s holds.

    Args:
      labels: `[N]`, integers in `[0, num_classes)`.
      num_classes: C.
      batch_size: L.
      order: `[M]`, the epoch's samples in order, as in `batches`; None: the data set's own.
      tile: samples a tile.
      tiles: tiles a batch; None: as many as the fullest batch of the epoch needs.

    Raises:
      ValueError: bad labels or sizes, or fewer tiles than a batch needs.
    """
    labels = check_labels(labels, num_classes)
    if not isinstance(tile, int) or tile < 1:
        msg = f"tiles_by_label(tile={tile}): write a positive integer."
        raise ValueError(msg)
    cut = []
    for batch in _flat(labels, batch_size, order):
        batch = batch[batch >= 0]
        by_label = [(label, batch[labels[batch] == label]) for label in range(num_classes)]
        parts = [(c, own[i : i + tile]) for c, own in by_label for i in range(0, len(own), tile)]
        cut.append(parts)
    needed = max(map(len, cut))
    tiles = needed if tiles is None else tiles
    if tiles < needed:
        msg = (
            f"tiles_by_label(tiles={tiles}): a batch needs {needed} tiles; write {needed} or more."
        )
        raise ValueError(msg)
    indices = np.full((len(cut), tiles, tile), len(labels), np.int32)
    tile_labels = np.full((len(cut), tiles), num_classes, np.int32)
    for step, parts in enumerate(cut):
        for t, (label, own) in enumerate(parts):
            indices[step, t, : len(own)] = own
            tile_labels[step, t] = label
    return Batches(indices, _weights(indices < len(labels)), tile_labels)


def stratified_order(labels, num_classes: int, batch_size: int, seed: int) -> np.ndarray:
    """A random order in which every batch has each label in its share of the data, to one sample.

    The samples of each label are shuffled and dealt out evenly over the epoch, so batches by label
    need hardly a slot more than samples. Every sample comes once.

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
    # Within a batch the places give away the label; nothing that follows may depend on it.
    return np.concatenate([rng.permutation(b[b >= 0]) for b in _flat(order, batch_size, order)])
