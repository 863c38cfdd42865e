"""Images and labels of a data set in memory: digits, and the sets of TensorFlow Datasets."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Integer, Shaped

from psjax._types import AnyArray
from psjax.data import _records
from psjax.data._batches import labels_of


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
      ValueError: unknown set or split; images of more than one shape; labels outside `[0, C)`; a
        damaged file of a TFDS set, by name.
      FileNotFoundError: a TFDS set that is not prepared, or of which a file is missing, with the
        command that prepares it.
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
    classes: Sequence[int] | Integer[np.ndarray, " n"],
    name: str = "digits",
    split: str = "train",
    data_dir: str | None = None,
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


def _needs(package: str, name: str):
    return f"load({name!r}) needs {package}: pip install 'psjax[data]'."


def _load_digits(split: str):
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(_needs("scikit-learn", "digits")) from error
    images, labels = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[:1437] if split == "train" else order[1437:]
    images = images.reshape(-1, 8, 8, 1).astype(np.uint8)
    return Dataset("digits", images[order], labels[order].astype(np.int32), 10, 1 / 16)


def _load_tfds(name: str, split: str, data_dir: str | None, rows: Sequence[int] | None = None):
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


def _tfds_labels(name: str, split: str, data_dir: str | None):
    """Labels and their number, without decoding an image."""
    records, num_classes = _tfds_records(name, split, data_dir, None, skip=True)
    return _labels_of(records, name, split, num_classes), num_classes


def _labels_of(records: Sequence[Mapping[str, Any]], name: str, split: str, num_classes: int):
    call = f"load({name!r}, split={split!r})"
    return labels_of(call, [record["label"] for record in records], num_classes)


def _tfds_records(
    name: str, split: str, data_dir: str | None, rows: Sequence[int] | None, skip: bool = False
):
    try:
        import array_record.python.array_record_module  # noqa: F401, what TFDS reads with
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(_needs("tensorflow-datasets and array_record", name)) from error
    known = ["digits", *tfds.list_builders(with_community_datasets=False)]
    if name not in known:
        nearest = lambda names: difflib.get_close_matches(str(name).lower(), names, n=1)
        near = nearest(["digits", *_TFDS]) or nearest(known)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"load({name!r}): no such data set in TensorFlow Datasets.{hint}"
        raise ValueError(msg)
    call = f"load({name!r}, split={split!r})"
    cure = _records.how_to_prepare(name, data_dir)
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir)
    except ImportError:
        raise
    except Exception as error:  # of many types, some of them TFDS's own
        folder = _records.folder_of(name, data_dir)
        raise _records.unreadable(call, folder, error, cure) from error
    features = builder.info.features
    label = features["label"] if features and {"image", "label"} <= set(features) else None
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else None
    if num_classes is None:
        msg = (
            f"load({name!r}): not an image classification set (it has no 'image', or no 'label' "
            "that is one class)."
        )
        raise ValueError(msg)
    splits = builder.info.splits
    if splits and split not in splits:
        msg = (
            f"{call}: the set has no such split, only {sorted(splits)}. Divide one that it has, "
            f"or read another with tfds.data_source({name!r})."
        )
        raise ValueError(msg)
    try:
        decoders = {"image": tfds.decode.SkipDecoding()} if skip else None
        source = builder.as_data_source(split=split, decoders=decoders)
    except (
        FileNotFoundError,
        NotImplementedError,
        LookupError,
        ValueError,
        AssertionError,
    ) as error:
        raise _records.unprepared(call, builder.data_dir, cure) from error
    files = dict(zip(splits[split].filepaths, splits[split].shard_lengths)) if splits else {}
    shards = _records.Shards(call, builder.data_dir, files, cure)
    shards.check()
    try:
        rows = range(len(source)) if rows is None else rows
        return source.__getitems__(rows), num_classes  # 5 times faster than each
    except ImportError as error:
        raise ImportError(_needs(error.name or "pillow", name)) from error
    except Exception as error:  # of array_record, of the message or of the image
        raise shards.blame(error) from error


def take(
    x: Shaped[AnyArray, "N ..."],
    indices: Integer[AnyArray, "..."],
    scale: ArrayLike | None = None,
):
    """Rows of `x` on the device, zeros for empty slots: `[N, ...] -> [*indices.shape, ...]`.

    For use inside `jit`: `take(images, batch_indices, dataset.scale)`.

    Args:
      x: `[N, ...]`, images or labels.
      indices: integers in `[0, N]`; N, past the end, is an empty slot.
      scale: None to leave `x` as it is; a number to multiply it with. The product is float32, or
        float64 if `jax_enable_x64` is on.
    """
    rows = jnp.asarray(x).at[indices].get(mode="fill", fill_value=0)
    return rows if scale is None else rows.astype(float) * jnp.asarray(scale, float)
