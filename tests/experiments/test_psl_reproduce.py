"""Figures 6 and 7 of the PSL paper: the authors' 16 trainings, run and resumed, and their table."""

import csv
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from experiments._lib.tables import plus_minus, read_rows, series, std, write_rows
from experiments.psl import figures, reproduce, training


@pytest.mark.parametrize("name", reproduce.SETTINGS)
def test_a_setting_is_the_authors_form(name):
    pair, dataset, batch_size = name.split("-")
    network, loss = pair.split("_")
    assert reproduce.config_of(name, seeds=10, first_seed=4) == training.Config(
        dataset=dataset.lower(),
        model=network.lower(),
        preset="mnist-53780" if (network, dataset) == ("PSNet", "MNIST") else None,
        loss={"NLL": "nll", "PSL": "psl-squared"}[loss],
        compute="fused",
        devices="one",
        batch_size=int(batch_size),
        epochs=50,
        seeds=10,
        first_seed=4,
        optimizer="adam",
        learning_rate=1e-3,
        b2=0.999,
        clip=None,
        margin_bound=None,
        order="dataset",
    )


def test_the_settings_are_those_of_the_authors_curves():
    assert len(reproduce.SETTINGS) == 16
    curves = figures.load_authors(figures.AUTHORS)
    assert curves.keys() == reproduce.SETTINGS.keys()
    assert all(max(curve) == reproduce.EPOCHS for curve in curves.values())


def test_an_unknown_setting_is_named():
    with pytest.raises(SystemExit, match="--only LeNet-PSL: no such setting; write some of LeNet_"):
        reproduce.main(reproduce.Args(only=("LeNet_PSL-MNIST-20", "LeNet-PSL")))


def test_a_setting_continues_where_it_was_and_one_that_is_done_trains_no_more(
    monkeypatch, tmp_path
):
    trained = []

    def epoch(state, number, data):
        trained.append(number + 1)
        if trained == [1, 2, 3]:
            raise KeyboardInterrupt
        new = {"params": state["params"] + 1}
        values = np.asarray(new["params"])[:, None]
        return new, {"loss": 1 / values, "max_margin": values, "grad_norm": values}

    def build(config, data_dir):
        """Weights that count the epochs, in place of a training."""
        assert config.dataset == "mnist"
        batches: Any = lambda number: number
        state = {"params": jnp.zeros(config.seeds)}
        accuracy = lambda params, data: params / 10
        return training.Program(None, state, epoch, accuracy, batches, {}, {})

    monkeypatch.setattr(training, "build", build)
    monkeypatch.setattr(reproduce, "EPOCHS", 4)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    args = reproduce.Args(
        only=("PSNet_PSL-MNIST-100",),
        seeds=2,
        first_seed=3,
        epochs=4,
        out=tmp_path / "runs",
        commit_results=True,
    )
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(args)
    path = tmp_path / "results" / "PSNet_PSL-MNIST-100-seeds3-4.csv"
    assert not path.exists()
    reproduce.main(args)
    assert trained == [1, 2, 3, 3, 4]
    found = [(row["epoch"], row["seed"], row["test_accuracy"]) for row in read_rows(path)]
    assert found == [(e, s, e / 10) for e in (1, 2, 3, 4) for s in (3, 4)]
    before = path.read_text()
    path.unlink()
    reproduce.main(args)
    assert trained == [1, 2, 3, 3, 4]
    assert path.read_text() == before
    reproduce.main(dataclasses.replace(args, epochs=5))
    assert trained[5:] == [5]
    assert path.read_text() == before  # the results are those of the paper's epochs


# ------------------------------------------------------------------------------------------- tables


def rows_of(*curves, first_seed=0):
    return [
        {"epoch": e, "seed": s, "test_accuracy": accuracy}
        for s, curve in enumerate(curves, first_seed)
        for e, accuracy in enumerate(curve, 1)
    ]


def test_a_series_has_the_epochs_of_every_seed_and_a_row_once():
    rows = rows_of([0.1, 0.2, 0.3], [0.4, 0.5]) + rows_of([0.9])
    epochs, values = series(rows, "test_accuracy")
    np.testing.assert_array_equal(epochs, [1, 2])
    np.testing.assert_array_equal(values, [[0.1, 0.2], [0.4, 0.5]])


def test_the_deviation_is_that_of_a_sample():
    np.testing.assert_allclose(std(np.array([[1.0, 5.0], [3.0, 5.0]])), [math.sqrt(2), 0])
    assert np.isnan(std(np.array([1.0])))
    assert plus_minus(1.234, math.nan) == "1.23"
    assert plus_minus(1.234, 0.56, 1) == "1.2 ± 0.6"


@pytest.fixture
def results(tmp_path):
    """Two files of seeds of one setting, one seed of another, and the authors' epoch 2."""
    for name, rows in {
        "LeNet_PSL-CIFAR10-20-seeds0-0": rows_of([0.2, 0.90]),
        "LeNet_PSL-CIFAR10-20-seeds1-1": rows_of([0.1, 0.94], first_seed=1),
        "PSNet_NLL-MNIST-100-seeds0-0": rows_of([0.8, 0.97]),
        "PSNet_PSL-MNIST-100-seeds0-0": rows_of([0.9]),
        "drops-lenet-cifar10-20-psl": rows_of([0.5]),
    }.items():
        write_rows(tmp_path / f"{name}.csv", rows)
    authors = tmp_path / "authors_curves.csv"
    with open(authors, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("pair", "dataset", "batch_size", "epoch", "mean_test_accuracy", "std"))
        writer.writerow(("LeNet_PSL", "CIFAR10", 20, 2, 0.85, 0.01))
        writer.writerow(("PSNet_NLL", "MNIST", 100, 2, 0.98, 0.02))
        writer.writerow(("PSNet_PSL", "MNIST", 100, 2, 0.98, 0.02))
    return tmp_path


def test_a_difference_is_told_in_standard_errors(results):
    """Ours 90 and 94: s = √8, 2 seeds. The authors' 85, s = 1, 10 seeds. 7 / √(8/2 + 1/10)."""
    text = figures.table(results, results / "authors_curves.csv")
    lines = text.splitlines()
    assert lines[2:5] == [
        "| PSNet-NLL, MNIST, 100 | 2 | 97.00 (1) | 98.00 ± 2.00 (10) | -1.00 | one seed |",
        "| PSNet-PSL, MNIST, 100 | 1 | 90.00 (1) | not there | not there | not there |",
        "| LeNet-PSL, CIFAR10, 20 | 2 | 92.00 ± 2.83 (2) | 85.00 ± 1.00 (10) | +7.00 | +3.5 |",
    ]
    assert f"{7 / math.sqrt(8 / 2 + 1 / 10):+.1f}" == "+3.5"
    assert "Not measured here yet: LeNet-NLL-MNIST-20, " in text
    assert (results / "table.md").read_text() == text


def test_figures_are_drawn_of_what_was_measured(results, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "RESULTS", results)
    reproduce.main(reproduce.Args(plot=True, commit_results=True))
    assert "| PSNet-NLL, MNIST, 100 |" in capsys.readouterr().out
    for name in ("figure6_mnist.png", "figure7_cifar10.png"):
        assert 1000 < (results / name).stat().st_size < 200_000
