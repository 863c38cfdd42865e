"""Images in memory, and batches of them as index arrays: whole, by label, in tiles, stratified.

A data set stays on the device as uint8; a batch is a row of indices into it, made once on the host,
so that a whole epoch is one `jax.lax.scan`. An index past the end is an empty slot, of weight 0.
"""

import difflib
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from psjax._speech import WORDS as WORDS
from psjax._speech import LogMel as LogMel
from psjax._speech import SpeechDataset as SpeechDataset
from psjax._speech import load_speech as load_speech
from psjax._speech import log_mel as log_mel
from psjax._xc import SparseDataset as SparseDataset
from psjax._xc import pad_rows as pad_rows
from psjax._xc import read_xc as read_xc
from psjax._xc import write_xc as write_xc


class Dataset(NamedTuple):
    """Images and labels of one split.

    Attributes:
      name: of the set.
      images: `[N, height, width, channels]`, uint8.
      labels: `[N]`, int32 in `[0, num_classes)`.
      num_classes: C.
      scale: what one unit of uint8 is worth, so that `images * scale` lies in [0, 1].
    """

    name: str
    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    scale: float


_TFDS = ("mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "cifar100", "svhn_cropped")


def load(name: str = "digits", split: str = "train", data_dir: str | None = None) -> Dataset:
    """One split of a data set, in the set's own order.

    Args:
      name: `digits` (scikit-learn's 1797 real 8x8 images, no network; 1437 and 360 of them by a
        fixed permutation) or any image classification set of TensorFlow Datasets.
      split: `train` or `test`.
      data_dir: where TFDS keeps its sets; None: `TFDS_DATA_DIR`, else TFDS's own default.

    Raises:
      ValueError: unknown set or split; images of more than one shape; labels outside `[0, C)`.
      FileNotFoundError: a TFDS set that is not prepared, with the command that prepares it.
      ImportError: scikit-learn or tensorflow-datasets is not installed.
    """
    if split not in ("train", "test"):
        msg = f"load({name!r}, split={split!r}): write 'train' or 'test'."
        raise ValueError(msg)
    return _load_digits(split) if name == "digits" else _load_tfds(name, split, data_dir)


class OwnRows(NamedTuple):
    """What a worker reads of a set: the images of its own classes, and where they are.

    Attributes:
      dataset: images and labels of these classes alone, M of them, in the set's order.
      all_labels: `[N]`, int32, of every sample, from which all workers make the same batches.
      places: `[N + 1]`, int32: the row of each sample among the M images; M, an empty slot, for
        samples of other classes and for the empty slot N.
    """

    dataset: Dataset
    all_labels: np.ndarray
    places: np.ndarray


def load_classes(
    classes, name: str = "digits", split: str = "train", data_dir: str | None = None
) -> OwnRows:
    """The images of some classes; the others are not decoded, and not kept.

    A worker of a plan reads the classes `plan.labels[w]` that are not padding,
    `plan.labels[w][plan.labels[w] < plan.num_classes]`; `own.places[rows.indices[:, w]]` are then
    the rows of `plan.batches(own.all_labels, ...)` among `own.dataset.images`.

    Args:
      classes: integers in `[0, C)`, C the classes of the set.
      name: as in `load`.
      split: as in `load`.
      data_dir: as in `load`.

    Raises:
      ValueError: as `load`; a class of which the set has no sample.
    """
    wanted = np.unique(np.asarray(classes))
    whole = load(name, split, data_dir) if name == "digits" else None
    if whole is not None:
        labels, num_classes = whole.labels, whole.num_classes
    else:
        labels, num_classes = _tfds_labels(name, split, data_dir)
    missing = sorted(set(wanted.tolist()) - set(labels.tolist()))
    if missing:
        msg = (
            f"load_classes({wanted.tolist()}, {name!r}): no sample of {split!r} is labelled "
            f"{missing}; the set has labels from {labels.min()} to {labels.max()}."
        )
        raise ValueError(msg)
    rows = np.flatnonzero(np.isin(labels, wanted))
    places = np.full(len(labels) + 1, len(rows), np.int32)
    places[rows] = np.arange(len(rows))
    if whole is not None:
        own = Dataset(name, whole.images[rows], labels[rows], num_classes, whole.scale)
    else:
        own = _load_tfds(name, split, data_dir, rows.tolist())
    return OwnRows(own, labels, places)


def _needs(package, name):
    return f"load({name!r}) needs {package}: pip install 'psjax[experiments]'."


def _load_digits(split):
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(_needs("scikit-learn", "digits")) from error
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[:1437] if split == "train" else order[1437:]
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    return Dataset("digits", images[order], labels[order].astype(np.int32), 10, 1 / 16)


def _load_tfds(name, split, data_dir, rows=None):
    records, num_classes = _tfds_records(name, split, data_dir, rows)
    labels = _labels_of(records, name, split, num_classes)
    images = [record["image"] for record in records]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        msg = (
            f"load({name!r}, split={split!r}): the images have {len(shapes)} shapes, from "
            f"{shapes[0]} to {shapes[-1]}; a batch needs one. Read the set with "
            f"tfds.data_source({name!r}), resize its images, and build a psjax.data.Dataset."
        )
        raise ValueError(msg)
    return Dataset(name, np.stack(images), labels, num_classes, 1 / 255)


def _tfds_labels(name, split, data_dir):
    """Labels and their number, without decoding an image."""
    records, num_classes = _tfds_records(name, split, data_dir, None, skip=True)
    return _labels_of(records, name, split, num_classes), num_classes


def _labels_of(records, name, split, num_classes):
    call = f"load({name!r}, split={split!r})"
    return _check_labels(call, [record["label"] for record in records], num_classes)


def _tfds_records(name, split, data_dir, rows, skip=False):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(_needs("tensorflow-datasets", name)) from error
    known = ["digits", *tfds.list_builders(with_community_datasets=False)]
    if name not in known:
        nearest = lambda names: difflib.get_close_matches(str(name).lower(), names, n=1)
        near = nearest(["digits", *_TFDS]) or nearest(known)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"load({name!r}): no such data set in TensorFlow Datasets.{hint}"
        raise ValueError(msg)
    builder: Any = tfds.builder(name, data_dir=data_dir)
    features = builder.info.features
    label = features["label"] if features and {"image", "label"} <= set(features) else None
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else None
    if num_classes is None:
        msg = (
            f"load({name!r}): not an image classification set (it has no 'image', or no 'label' "
            "that is one class)."
        )
        raise ValueError(msg)
    if builder.info.splits and split not in builder.info.splits:
        msg = (
            f"load({name!r}, split={split!r}): the set has no such split, only "
            f"{sorted(builder.info.splits)}. Divide one that it has, or read another with "
            f"tfds.data_source({name!r})."
        )
        raise ValueError(msg)
    try:
        decoders = {"image": tfds.decode.SkipDecoding()} if skip else None
        source = builder.as_data_source(split=split, decoders=decoders)
        rows = range(len(source)) if rows is None else rows
        return source.__getitems__(rows), num_classes  # 5 times faster than each
    except (FileNotFoundError, NotImplementedError, ValueError, AssertionError) as error:
        msg = (
            f"load({name!r}, split={split!r}): not prepared as array_record in "
            f'{builder.data_dir}. With network and TensorFlow, once: python -c "import '
            f"tensorflow_datasets as tfds; tfds.builder('{name}', data_dir={data_dir!r}, "
            "file_format='array_record').download_and_prepare()\"; or set TFDS_DATA_DIR to where "
            "it is."
        )
        raise FileNotFoundError(msg) from error


def check_labels(labels, num_classes: int) -> np.ndarray:
    """The labels as int32, checked on the host: inside `jit` nothing can raise.

    Raises:
      TypeError: labels that are not integers.
      ValueError: empty, of rank other than 1, or outside `[0, num_classes)`.
    """
    return _check_labels(f"check_labels(labels, num_classes={num_classes})", labels, num_classes)


def _check_labels(call, labels, num_classes):
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


def take(x, indices, scale=None):
    """Rows of `x` on the device, zeros for empty slots: `[N, ...] -> [*indices.shape, ...]`.

    For use inside `jit`: `take(images, batch_indices, dataset.scale)`.

    Args:
      x: `[N, ...]`, images or labels.
      indices: integers in `[0, N]`; N, past the end, is an empty slot.
      scale: None to leave `x` as it is; a number to multiply it with, as float32.
    """
    rows = jnp.asarray(x).at[indices].get(mode="fill", fill_value=0)
    return rows if scale is None else rows.astype(jnp.float32) * scale


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
    labels = _check_labels("batches(labels)", labels, 2**31)
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
