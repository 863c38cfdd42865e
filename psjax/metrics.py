"""Metrics of the Extreme Classification repository, for few labels out of very many.

Precision and nDCG at k, and the propensity-scored precision of Jain, Prabhu, Varma: *Extreme
multi-label loss functions for recommendation, tagging, ranking & other missing label applications*,
KDD 2016, https://doi.org/10.1145/2939672.2939756. As in the repository's scripts, every function
returns the values at 1, 2, ..., k together, and a sample without labels counts as 0. They compute
in float64 with NumPy. Pass all samples of a split at once: a mean of batches may differ.
"""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from jaxtyping import Float, Integer, Num, Shaped

from psjax import _public
from psjax._types import AnyArray

__all__ = ["ndcg_at_k", "precision_at_k", "propensities", "propensity_scored_precision_at_k"]
__dir__ = _public.listing(globals())

Scores: TypeAlias = Sequence[Sequence[float]] | Num[AnyArray, "N P"]  # or the numbers of labels
Labels: TypeAlias = Sequence[Sequence[int]] | Integer[AnyArray, "N K"]


def _hits(
    call: str,
    predictions: Scores,
    labels: Labels,
    num_labels: int,
    k: int,
):
    """Top predictions `[N, k]`, labels `[N, K]`, and whether each prediction is a label."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 2 or labels.ndim != 2 or len(predictions) != len(labels):
        msg = (
            f"{call}: predictions have shape {predictions.shape} and labels {labels.shape}; pass "
            "[N, num_labels] scores or [N, k] ids, and [N, K] ids."
        )
        raise ValueError(msg)
    if not len(labels):
        msg = f"{call}: no samples."
        raise ValueError(msg)
    if not np.issubdtype(labels.dtype, np.integer):
        msg = f"{call}: labels are {labels.dtype}; pass ids in [0, {num_labels}], padded."
        raise TypeError(msg)
    if not isinstance(k, int) or not 1 <= k <= predictions.shape[1]:
        msg = f"{call}: k={k}; pass an integer from 1 to {predictions.shape[1]}."
        raise ValueError(msg)
    if np.issubdtype(predictions.dtype, np.integer):
        top = predictions[:, :k]
    else:
        top = _top_k(call, predictions, num_labels, k)
    for what, ids in (("prediction", top), ("label", labels)):
        bad = np.argwhere((ids < 0) | (ids > num_labels))
        if bad.size:
            row, column = bad[0]
            msg = (
                f"{call}: {what} {ids[row, column]} of sample {row} is outside [0, {num_labels}); "
                f"pass {num_labels} for an empty place."
            )
            raise ValueError(msg)
        ordered = np.sort(ids, axis=1)
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < num_labels)
        if twice.any():
            row, column = np.argwhere(twice)[0]
            msg = f"{call}: {what} {ordered[row, column]} of sample {row} is repeated."
            raise ValueError(msg)
    hits = np.zeros(top.shape, bool)
    for column in labels.T:  # one column at a time: no array of K N k comparisons
        hits |= top == column[:, None]
    return top, labels, hits & (top < num_labels)


def _top_k(call: str, scores: Shaped[np.ndarray, "N P"], num_labels: int, k: int):
    """Ids of the k largest scores per row, best first; of equal scores, the lowest id first."""
    if scores.shape[1] != num_labels or not np.issubdtype(scores.dtype, np.floating):
        msg = (
            f"{call}: predictions are {scores.dtype}{list(scores.shape)}; pass floating scores of "
            f"all {num_labels} labels, or integer ids, best first."
        )
        raise ValueError(msg)
    if np.isnan(scores).any():
        msg = f"{call}: the score of sample {np.argwhere(np.isnan(scores))[0][0]} is NaN."
        raise ValueError(msg)
    least = np.partition(scores, num_labels - k, axis=1)[:, num_labels - k]
    top = np.empty((len(scores), k), np.int64)
    for row, (own, bound) in enumerate(zip(scores, least)):
        candidates = np.flatnonzero(own >= bound)
        top[row] = candidates[np.argsort(-own[candidates], kind="stable")[:k]]
    return top


def precision_at_k(predictions: Scores, labels: Labels, num_labels: int, k: int = 5) -> np.ndarray:
    r"""Precision at 1, ..., k: the share of the first k predictions that are labels.

    With $y_{il}$ = 1 if l is a label of sample i and $r_1, r_2, \dots$ its predictions, best first,
    $P@k = \frac{1}{N}\sum_i \frac{1}{k}\sum_{j \le k} y_{i r_j}$. The divisor is k also for a
    sample with fewer labels than k.

    Args:
      predictions: `[N, num_labels]` floating scores (of equal scores the lowest id comes first, as
        in `jax.lax.top_k`); or integer ids, best first, `[N, k]` or wider, padded with num_labels.
      labels: `[N, K]` integer ids, padded with num_labels, as `psjax.data.pad_rows` returns them.
      num_labels: number of labels, L.
      k: the largest k.

    Returns:
      `[k]`, float64: `precision_at_k(...)[2]` is P@3.

    Raises:
      ValueError: shapes do not fit, an id is out of range, or a sample has an id twice.
      TypeError: labels are not integers.

    Example:
      >>> precision_at_k([[0.1, 0.9, 0.5]], [[1, 3]], num_labels=3, k=2)
      array([1. , 0.5])
    """
    _, _, hits = _hits("precision_at_k(predictions, labels)", predictions, labels, num_labels, k)
    return _precision(hits)


def _precision(gains: Shaped[np.ndarray, "N k"]):
    return (np.cumsum(gains, axis=1) / np.arange(1, gains.shape[1] + 1)).mean(axis=0)


def ndcg_at_k(predictions: Scores, labels: Labels, num_labels: int, k: int = 5) -> np.ndarray:
    r"""Normalised discounted cumulative gain at 1, ..., k.

    $\mathrm{nDCG}@k = \frac{1}{N}\sum_i \frac{\sum_{j \le k} y_{i r_j} / \log_2(j + 1)}
    {\sum_{j \le \min(k, |y_i|)} 1 / \log_2(j + 1)}$, and 0 for a sample without labels.

    Args:
      predictions: as in `precision_at_k`.
      labels: as in `precision_at_k`.
      num_labels: L.
      k: the largest k.

    Returns:
      `[k]`, float64.

    Raises:
      ValueError: as `precision_at_k`.
      TypeError: as `precision_at_k`.
    """
    call = "ndcg_at_k(predictions, labels)"
    _, labels, hits = _hits(call, predictions, labels, num_labels, k)
    discounts = 1 / np.log2(np.arange(2, k + 2))
    sizes = (labels < num_labels).sum(axis=1, keepdims=True)
    best = np.cumsum((np.arange(k) < sizes) * discounts, axis=1)
    gained = np.cumsum(hits * discounts, axis=1)
    return np.divide(gained, best, out=np.zeros_like(best), where=best > 0).mean(axis=0)


def propensities(
    label_counts: Sequence[int] | Num[AnyArray, " L"],
    num_points: int,
    a: float = 0.55,
    b: float = 1.5,
) -> np.ndarray:
    r"""Estimate the probability that a true label is recorded, from how often it occurs.

    $p_l = 1 / (1 + C e^{-A \log(N_l + B)})$, $C = (\log N - 1)(B + 1)^A$, natural logarithms.

    Args:
      label_counts: `[L]`, $N_l$, the number of points of the **training** set with label l:
        `numpy.bincount(data.label_indices, minlength=data.num_labels)`.
      num_points: number of points of the training set, N.
      a: A. The repository uses 0.5 for its Wikipedia sets, 0.6 for Amazon, 0.55 for others.
      b: B. The repository uses 0.4 for its Wikipedia sets, 2.6 for Amazon, 1.5 for others.

    Returns:
      `[L]`, float64 in (0, 1), for `propensity_scored_precision_at_k`.

    Raises:
      ValueError: counts are not `[L]` within `[0, N]`, or N < 3 (C would not be positive).
    """
    counts = np.asarray(label_counts, np.float64)
    if num_points < 3:
        msg = f"propensities(num_points={num_points}): pass 3 or more."
        raise ValueError(msg)
    if counts.ndim != 1 or not ((counts >= 0) & (counts <= num_points)).all():
        msg = (
            f"propensities(label_counts=...): they have shape {counts.shape} and must be [L], "
            f"within [0, num_points={num_points}]."
        )
        raise ValueError(msg)
    c = (np.log(num_points) - 1) * (b + 1) ** a
    return 1 / (1 + c * (counts + b) ** -a)


def propensity_scored_precision_at_k(
    predictions: Scores,
    labels: Labels,
    propensities: Float[AnyArray, " L"],
    k: int = 5,
) -> np.ndarray:
    r"""Precision at 1, ..., k with each hit worth 1/p_l, relative to the best attainable.

    $\mathrm{PSP}@k = \frac{\sum_i \sum_{j \le k} y_{i r_j} / p_{r_j}}
    {\sum_i \max_{\hat r} \sum_{j \le k} y_{i \hat r_j} / p_{\hat r_j}}$. As in the repository's
    scripts, one sum over all samples is divided by the other. The best predictions are the k labels
    of a sample with the least propensity. The paper's definition has no denominator and can exceed
    1.

    Args:
      predictions: as in `precision_at_k`.
      labels: as in `precision_at_k`.
      propensities: `[L]`, in (0, 1], of the training set, from `propensities`.
      k: the largest k.

    Returns:
      `[k]`, float64 in [0, 1].

    Raises:
      ValueError: as `precision_at_k`; or no sample has a label.
      TypeError: as `precision_at_k`.
    """
    call = "propensity_scored_precision_at_k(predictions, labels, propensities)"
    propensities = np.asarray(propensities, np.float64)
    if propensities.ndim != 1 or not ((propensities > 0) & (propensities <= 1)).all():
        msg = f"{call}: propensities have shape {propensities.shape}; pass [L], in (0, 1]."
        raise ValueError(msg)
    top, labels, hits = _hits(call, predictions, labels, len(propensities), k)
    worth = np.append(1 / propensities, 0)
    best = -np.sort(-worth[labels], axis=1)[:, :k]
    best = np.pad(best, ((0, 0), (0, k - best.shape[1])))
    attainable = _precision(best)
    if not attainable[0]:
        msg = f"{call}: no sample has a label, so there is nothing to attain."
        raise ValueError(msg)
    return _precision(hits * worth[top]) / attainable
