"""Pairs of classes: one row per element of a partially-separable loss."""

import numpy as np


def ordered_pairs(num_classes: int) -> np.ndarray:
    """All ordered pairs of classes (k, j), k != j: int32 `[C * (C - 1), 2]`, sorted.

    They are the elements of the loss (6b) of Raynaud, Orban and Bigeon, G-2023-36.

    Raises:
      ValueError: fewer than two classes have no pairs.
    """
    _check_classes("ordered_pairs", num_classes)
    k, j = np.nonzero(~np.eye(num_classes, dtype=bool))
    return np.stack([k, j], axis=1).astype(np.int32)


def unordered_pairs(num_classes: int) -> np.ndarray:
    """All pairs of classes k < j: int32 `[C * (C - 1) / 2, 2]`, sorted.

    One pair stands for two terms of the loss, (k, j) and (j, k).

    Raises:
      ValueError: fewer than two classes have no pairs.
    """
    _check_classes("unordered_pairs", num_classes)
    return np.stack(np.triu_indices(num_classes, 1), axis=1).astype(np.int32)


def _check_classes(call: str, num_classes: int):
    if num_classes < 2:
        msg = f"{call}({num_classes}): one class has no pairs; pass 2 or more."
        raise ValueError(msg)
