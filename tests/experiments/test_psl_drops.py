"""Drops of accuracy: what is counted as one, and what is counted of a variant."""

import dataclasses
import math

import numpy as np
import pytest

from experiments._lib.tables import read_rows, write_rows
from experiments.psl import drop_counts, drop_steps, drops, reproduce, run, training


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0.5, 0.6, 0.601, 0.602, 0.552, 0.553], [(4, 5.0)]),
        ([0.9] * 6 + [0.6, 0.4, 0.9, 0.9, 0.9, 0.88], [(6, 50.0), (11, 2.0)]),  # falls in a row
        ([0.9, 0.9, 0.9, 0.6, 0.9, 0.5, 0.9, 0.9, 0.9, 0.9], [(3, 30.0), (5, 40.0)]),
        ([0.9, 0.9, 0.9, 0.895], []),  # less than a point
        ([0.70, 0.72, 0.70, 0.72, 0.70, 0.72, 0.64, 0.66], []),  # 8 points, the noise is 2
        ([0.70, 0.72, 0.70, 0.72, 0.70, 0.72, 0.60, 0.62], [(6, 12.0)]),
        ([0.1, 0.5, 0.9], []),
        ([0.9], []),
        ([], []),
    ],
)
def test_a_drop_is_deeper_than_a_point_and_than_five_times_the_noise(accuracy, expected):
    found = drop_counts.find_drops(np.array(accuracy))
    assert [i for i, _ in found] == [i for i, _ in expected]
    np.testing.assert_allclose([d for _, d in found], [d for _, d in expected])


def rows_of(curves, spikes=()):
    """Rows of seeds 0, 1, ... with these accuracies; a spike in some (seed, epoch)."""
    return [
        {
            "epoch": e,
            "seed": s,
            "test_accuracy": accuracy,
            "median_grad_norm": 2.0,
            "max_grad_norm": 202.0 if (s, e) in spikes else 98.0,
        }
        for s, curve in enumerate(curves)
        for e, accuracy in enumerate(curve, 1)
    ]


CURVES = [
    [0.60, 0.60, 0.60, 0.40, 0.61, 0.61, 0.61, 0.61, 0.61],  # a large drop in epoch 4
    [0.70, 0.67, 0.67, 0.67, 0.67, 0.67, 0.67, 0.67, 0.65],  # small ones in epochs 2 and 9
]


def test_drops_and_spikes_are_counted_by_seed():
    summary = drop_counts.summarise(rows_of(CURVES, spikes={(0, 4), (1, 3), (1, 9)}))
    assert summary.epochs == 9
    np.testing.assert_allclose(summary.per_100, [12.5, 25])  # of 8 changes
    np.testing.assert_allclose(summary.large_per_100, [12.5, 0])
    np.testing.assert_allclose(summary.last, [61, 65])
    np.testing.assert_allclose(summary.best, [61, 70])
    assert (summary.drops, summary.drops_with_spike, summary.spikes) == (3, 2, 3)
    assert drop_counts.summarise(rows_of([[0.5]])).drops == 0


def test_the_table_has_mean_and_deviation_over_seeds(tmp_path):
    write_rows(tmp_path / "drops-lenet-cifar10-20-psl.csv", rows_of(CURVES, {(0, 4)}))
    write_rows(tmp_path / "drops-lenet-cifar10-20-unheard-of.csv", rows_of(CURVES))
    text = drops.table(tmp_path)
    cells = "PSL | 2 × 9 | 18.8 ± 8.8 | 6.2 ± 8.8 | 63.00 ± 2.83 | 65.50 ± 6.36 | 1 of 3 | 1 of 18"
    assert f"| {cells} |" in text
    assert "## LeNet, CIFAR10, batches of 20" in text
    assert "unheard" not in text
    assert (tmp_path / "drops.md").read_text() == text


@pytest.mark.parametrize("variant", [v for v in drops.VARIANTS if v != "clip"])
def test_a_variant_is_the_authors_training_but_for_its_own_options(variant):
    config = drops.config_of(drops.Args(), variant)
    authors = reproduce.config_of("LeNet_PSL-CIFAR10-20", seeds=3)
    assert config == dataclasses.replace(authors, **drops.VARIANTS[variant][1])


def test_gradients_are_clipped_at_ten_times_the_median_of_a_first_epoch(monkeypatch, tmp_path):
    def first_epoch(config, folder, **_):
        assert (config.epochs, config.seeds, config.clip) == (1, 1, None)
        return [{"median_grad_norm": 0.12345}]

    monkeypatch.setattr(run, "train", first_epoch)
    args = drops.Args(out=tmp_path)
    assert drops.config_of(args, "clip").clip == 1.2


def test_of_a_seed_the_longest_run_is_taken_and_only_what_is_missing_is_trained(
    monkeypatch, tmp_path
):
    args = drops.Args(dataset="digits", out=tmp_path, results=tmp_path, seeds=4, epochs=5)
    write_rows(tmp_path / "drops-lenet-digits-20-psl.csv", rows_of([[0.1], [0.2] * 5]))
    folder = tmp_path / "lenet-digits-20-psl-seeds0-0"
    folder.mkdir()
    write_rows(folder / "metrics.csv", rows_of([[0.3] * 5]))
    rows = drops.collect(args, "psl")
    assert [(row["epoch"], row["seed"]) for row in rows] == [
        (e, s) for e in range(1, 6) for s in (0, 1)
    ]
    assert {row["test_accuracy"] for row in rows if row["seed"] == 0} == {0.3}
    assert read_rows(tmp_path / "drops-lenet-digits-20-psl.csv") == rows
    asked = []
    monkeypatch.setattr(run, "train", lambda config, folder, **_: asked.append((config, folder)))
    drops.train(args, "psl")
    [(config, folder)] = asked
    assert (config.first_seed, config.seeds, config.loss) == (2, 2, "psl")
    assert folder.name == "lenet-digits-20-psl-seeds2-3"
    drops.train(dataclasses.replace(args, seeds=2), "psl")
    assert len(asked) == 1


def test_a_trace_names_the_gradient_before_the_fall_and_what_it_did():
    accuracy = [0.60, math.nan, 0.61, math.nan, 0.31, 0.30]
    rows = [
        {"at_epoch": 3.1 + 0.2 * i, "accuracy": a, "gradient": 2.0, "largest_gradient": 4.0}
        | {"steps": 9.0, "largest_worst": 2.5}
        | {"root_v": 0.5, "largest_root_v": 0.5, "moved": 0.1, "largest_moved": 0.2}
        for i, a in enumerate(accuracy)
    ]
    rows[0]["largest_gradient"] = 9000.0  # long before the fall
    rows[3] |= {"largest_gradient": 5000.0, "largest_moved": 31.0, "largest_root_v": 20.0}
    rows[3]["largest_worst"] = 8.6
    assert drop_steps.outlier(rows) == (3, 2500.0)
    text = drop_steps.trace_summary(rows)
    assert "In epoch 4 the largest gradient of a step was 2.5e+03 times the usual norm" in text
    assert "NLL of its worst sample 8.6 where the worst of 9 steps usually had 2.5" in text
    assert "moved by 31 learning rates" in text
    assert "before 0.1" in text
    assert "grew 40 times" in text


def test_wrong_names_say_what_to_write(tmp_path):
    with pytest.raises(SystemExit, match="variant pls: there is none; write some of psl-squared, "):
        drops.main(drops.Args(variants=("pls",), out=tmp_path, results=tmp_path))
    with pytest.raises(ValueError, match="drops_trace-x.csv: write drops_trace-<model>"):
        drop_steps.trace_title(tmp_path / "drops_trace-x.csv")


def test_recording_every_step_changes_no_training(tmp_path):
    how = {"loss": "psl-squared", "compute": "fused", "batch_size": 240, "learning_rate": 1e-3}
    config = training.Config(**how, epochs=2, first_seed=3)
    plain = run.train(config, tmp_path / "run", report=lambda line: None)
    recorded = drop_steps.kicks(config)
    for a, b in zip(plain, recorded, strict=True):
        for name in ("epoch", "seed", "test_accuracy"):
            assert a[name] == b[name]
        for name in ("max_grad_norm", "median_grad_norm"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4)  # sums in another order
        # max_j 2 (c_j - c_y) <= NLL of doubled scores = log sum_j exp(2 (c_j - c_y)) <= it + log C
        margin = max(2 * a["max_margin"], 0)
        assert margin - 1e-4 <= b["worst_nll"] <= margin + math.log(10) + 1e-4
        assert 0 < b["median_step"] <= b["kick"]
    # Adam's first step is a learning rate in every coordinate that has a gradient.
    np.testing.assert_allclose(recorded[0]["kick"], 1, rtol=0.05)


def test_recorded_steps_are_a_row_of_the_table(tmp_path):
    names = ("epoch", "seed", "test_accuracy", "max_grad_norm", "median_grad_norm", "worst_nll")
    accuracies, peaks = (0.9, 0.9, 0.5, 0.5, 0.5), (4.0, 60.0, 80.0, 4.0, 4.0)
    kicks = (0.5, 3.0, 5.0, 0.5, 0.5)
    rows = [
        dict(zip((*names, "kick", "median_step"), (e, 0, accuracy, peak, 1.0, 9.5, kick, 0.25)))
        for e, (accuracy, peak, kick) in enumerate(zip(accuracies, peaks, kicks), 1)
    ]
    write_rows(tmp_path / "drops_kicks-lenet-mnist-20-nll-0.csv", rows)
    [line] = drop_steps.kicks_table(tmp_path).splitlines()[2:]
    cells = "LeNet, MNIST, batches of 20 | NLL | 0, 5 | 1 | 2 | 70 | 9.5 | 0.5 | 4 | 5 | 0.25"
    assert line == f"| {cells} |"
