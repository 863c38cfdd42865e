"""Small cases worked by hand, a loop over samples, and what each metric reduces to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psjax import metrics

# Three samples, five labels (0 to 4), 5 for an empty place.
LABELS = np.array([[1, 3, 5], [0, 5, 5], [2, 3, 4]])
TOP = np.array([[3, 0, 1], [1, 2, 0], [2, 3, 4]])
# Hits at the places 1, 2, 3:   1 0 1     0 0 1     1 1 1


def test_precision_by_hand():
    # At 1: (1 + 0 + 1) / 3. At 2: (1/2 + 0 + 2/2) / 3. At 3: (2/3 + 1/3 + 3/3) / 3.
    want = [2 / 3, 1.5 / 3, 2 / 3]
    np.testing.assert_allclose(metrics.precision_at_k(TOP, LABELS, 5, 3), want)


def test_ndcg_by_hand():
    # Discounts: 1, d = 1 / log2(3), 1 / log2(4) = 1/2.
    d = 1 / math.log2(3)
    want = [
        (1 / 1 + 0 / 1 + 1 / 1) / 3,  # best: 1 for every sample, all have a label
        (1 / (1 + d) + 0 / 1 + (1 + d) / (1 + d)) / 3,  # the second sample has only one label
        (1.5 / (1 + d) + 0.5 / 1 + 1) / 3,  # the first has two: its best stays 1 + d
    ]
    np.testing.assert_allclose(metrics.ndcg_at_k(TOP, LABELS, 5, 3), want)


def test_propensity_scored_precision_by_hand():
    # Worth 1/p of labels 0 to 4: 2, 4, 1, 5, 8.
    p = 1 / np.array([2.0, 4, 1, 5, 8])
    # Got at 1: 5 + 0 + 1 = 6; at 2: 5 + 0 + 6 = 11; at 3: 9 + 2 + 14 = 25.
    # Best, the worthiest labels first. At 1: 5 + 2 + 8 = 15; at 2: 9 + 2 + 13 = 24; at 3: 25.
    want = [6 / 15, 11 / 24, 25 / 25]
    got = metrics.propensity_scored_precision_at_k(TOP, LABELS, p, 3)
    np.testing.assert_allclose(got, want)


def test_propensities_by_hand():
    # N = 100, N_l = 10, A = 1, B = 3: C = (log 100 - 1) 4, p = 1 / (1 + C / 13).
    want = 1 / (1 + (math.log(100) - 1) * 4 / 13)
    np.testing.assert_allclose(metrics.propensities([10], 100, a=1, b=3), [want])
    # The formula as printed, with the usual constants and Amazon's.
    for a, b in ((0.55, 1.5), (0.6, 2.6)):
        c = (math.log(1000) - 1) * (b + 1) ** a
        want = [1 / (1 + c * math.exp(-a * math.log(n + b))) for n in (0, 1, 1000)]
        np.testing.assert_allclose(metrics.propensities([0, 1, 1000], 1000, a, b), want)
    # A label seen once has p = 1 / log N, whatever A and B: C (1 + B)^-A = log N - 1.
    np.testing.assert_allclose(metrics.propensities([1], 1000), 1 / math.log(1000))


def test_a_sample_without_labels_counts_as_zero():
    none = np.full((1, 3), 5)
    top, labels = np.concatenate([TOP, [[0, 1, 2]]]), np.concatenate([LABELS, none])
    for metric in (metrics.precision_at_k, metrics.ndcg_at_k):
        np.testing.assert_allclose(metric(top, labels, 5, 3), metric(TOP, LABELS, 5, 3) * 3 / 4)
    p = np.linspace(0.1, 0.9, 5)
    got = metrics.propensity_scored_precision_at_k(top, labels, p, 3)  # adds 0 to both sums
    want = metrics.propensity_scored_precision_at_k(TOP, LABELS, p, 3)
    np.testing.assert_allclose(got, want)


def test_an_empty_prediction_is_a_miss_even_where_the_labels_are_padded():
    top = np.array([[1, 5, 5]])
    np.testing.assert_allclose(metrics.precision_at_k(top, [[1, 5, 5]], 5, 3), [1, 1 / 2, 1 / 3])
    p = np.full(5, 0.5)
    got = metrics.propensity_scored_precision_at_k(top, [[1, 5, 5]], p, 3)
    np.testing.assert_allclose(got, 1)


def slow(top, labels, k, worth):
    """P, nDCG and PSP at k by loops over sets."""
    precision = ndcg = got = best = 0.0
    for own, true in zip(top, labels):
        true = {int(y) for y in true if y < len(worth)}
        hits = [int(r) in true for r in own[:k]]
        precision += sum(hits) / k / len(top)
        ideal = sum(1 / math.log2(j + 2) for j in range(min(k, len(true))))
        dcg = sum(1 / math.log2(j + 2) for j in range(k) if hits[j])
        ndcg += dcg / ideal / len(top) if true else 0
        got += sum(worth[r] for r, hit in zip(own, hits) if hit)
        best += sum(sorted((worth[y] for y in true), reverse=True)[:k])
    return precision, ndcg, got / best


@pytest.mark.parametrize("seed", range(5))
def test_scores_ids_and_the_loop_agree(seed):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(30, 12))
    labels = np.stack([rng.permutation(12)[:4] for _ in range(30)])
    labels[rng.uniform(size=(30, 4)) < 0.4] = 12
    p = rng.uniform(0.05, 1, 12)
    top = np.argsort(-scores, axis=1)
    want = np.transpose([slow(top, labels, k, 1 / p) for k in range(1, 7)])
    for predictions in (scores, top, scores.astype(np.float32), top[:, :6]):
        got = (
            metrics.precision_at_k(predictions, labels, 12, 6),
            metrics.ndcg_at_k(predictions, labels, 12, 6),
            metrics.propensity_scored_precision_at_k(predictions, labels, p, 6),
        )
        np.testing.assert_allclose(got, want)


def test_equal_propensities_and_enough_labels_are_precision():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(30, 12))
    labels = np.stack([rng.permutation(12)[:4] for _ in range(30)])
    got = metrics.propensity_scored_precision_at_k(scores, labels, np.full(12, 0.3), 4)
    np.testing.assert_allclose(got, metrics.precision_at_k(scores, labels, 12, 4))


def test_ties_are_broken_as_jax_does():
    scores = np.random.default_rng(0).integers(0, 3, (40, 9)).astype(np.float32)
    labels = np.arange(40)[:, None] % 9
    _, top = jax.lax.top_k(jnp.asarray(scores), 5)
    np.testing.assert_array_equal(
        metrics.precision_at_k(scores, labels, 9), metrics.precision_at_k(top, labels, 9)
    )


def test_bad_input_is_named(any_type):
    precision = metrics.precision_at_k
    with pytest.raises(ValueError, match=r"shape \(3, 3\) and labels \(2, 3\)"):
        precision(TOP, LABELS[:2], 5, 3)
    with pytest.raises(ValueError, match="no samples"):
        precision(TOP[:0], LABELS[:0], 5, 3)
    with pytest.raises(TypeError, match="labels are float64"):
        precision(TOP, LABELS * 1.0, 5, 3)
    with pytest.raises(ValueError, match="k=4; pass an integer from 1 to 3"):
        precision(TOP, LABELS, 5, 4)
    with pytest.raises(ValueError, match=r"prediction 3 of sample 0 is outside \[0, 2\)"):
        precision(TOP, np.zeros((3, 1), int), 2, 3)
    with pytest.raises(ValueError, match=r"label -1 of sample 1 is outside \[0, 5\); pass 5 for"):
        precision(TOP, np.where(LABELS == 0, -1, LABELS), 5, 3)
    with pytest.raises(ValueError, match="prediction 1 of sample 0 is repeated"):
        precision([[1, 1]], [[1]], 5, 2)
    with pytest.raises(ValueError, match="label 1 of sample 0 is repeated"):
        precision([[1, 0]], [[1, 1]], 5, 2)
    with pytest.raises(ValueError, match=r"float64\[3, 3\]; pass floating scores of all 5 labels"):
        precision(TOP * 1.0, LABELS, 5, 3)
    with pytest.raises(ValueError, match="score of sample 0 is NaN"):
        precision([[math.nan, 0.0]], [[1]], 2, 1)
    with pytest.raises(ValueError, match="nothing to attain"):
        metrics.propensity_scored_precision_at_k(TOP, np.full((3, 1), 5), np.full(5, 0.5), 3)
    with pytest.raises(ValueError, match=r"pass \[L\], in \(0, 1\]"):
        metrics.propensity_scored_precision_at_k(TOP, LABELS, np.zeros(5), 3)
    with pytest.raises(ValueError, match="num_points=2"):
        metrics.propensities([1], 2)
    with pytest.raises(ValueError, match=r"within \[0, num_points=5\]"):
        metrics.propensities([6], 5)
