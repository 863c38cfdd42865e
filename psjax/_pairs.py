"""Pairs of classes: one row for each element of the paper's loss."""

import numpy as np


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


def _check_classes(call: str, num_classes: int):
    if num_classes < 2:
        msg = f"{call}({num_classes}): one class has no pairs; write 2 or more."
        raise ValueError(msg)
