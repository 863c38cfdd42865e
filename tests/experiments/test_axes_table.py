"""The table of axes found in the registry's models."""

import csv
import pathlib
import subprocess
import sys

import pytest

from experiments.axes import table

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_two_models_are_measured_and_written(tmp_path):
    # A process of its own: the command empties JAX's caches.
    command = [sys.executable, "-m", "experiments.axes", "--out", str(tmp_path)]
    subprocess.run([*command, "--models", "mlp-relu", "autoencoder-tied"], check=True, cwd=ROOT)
    with (tmp_path / "models.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["model"] for row in rows] == ["mlp-relu", "autoencoder-tied"]
    kinds = ("hidden", "normalised", "output", "input")
    assert [[int(row[kind]) for kind in kinds] for row in rows] == [[2, 0, 1, 1], [2, 0, 0, 1]]
    assert all(row["wrong"] == row["missed"] == row["unknown"] == "" for row in rows)
    assert all(float(row["infer_ms"]) > 0 < float(row["trace_ms"]) for row in rows)
    text = (tmp_path / "models.md").read_text()
    assert "`python -m experiments.axes --models mlp-relu autoencoder-tied`, jax " in text
    assert "2 models, 7 axes: 4 hidden, 1 output, 2 input, 0 normalised." in text
    assert "| mlp-relu | 2 | 0 | 1 | 1 | 0 | 0 |  |" in text


def test_an_unknown_model_is_refused_with_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="--models mlp-rely.* Did you mean 'mlp-relu'"):
        table.main(table.Args(models=("mlp-rely",), out=tmp_path))
