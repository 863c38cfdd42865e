"""The table of axes found in the registry's models."""

import csv
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.axes import table
from experiments.axes.missed import missed as find_missed

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


def missed(apply, shapes):
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=n), jnp.float32) for k, n in shapes.items()}
    return find_missed(apply, params, (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),))


def test_rows_that_are_reversed_twice_are_missed():
    shapes = {"in": (3, 7), "out": (7, 2)}
    twice = lambda p, x: (x @ p["in"])[:, ::-1][:, ::-1] @ p["out"]
    once = lambda p, x: (x @ p["in"])[:, ::-1] @ p["out"]
    assert missed(twice, shapes) == ["['in'] 1, ['out'] 0 (size 7)"]
    assert missed(once, shapes) == []


def test_blocks_are_missed_where_only_their_inside_is_told_apart():
    shapes = {"in": (3, 6), "out": (6, 2)}
    scale = np.tile(np.float32([1, 2]), 3)
    apply = lambda p, x: jnp.tanh(x @ p["in"] * scale) @ p["out"]
    assert missed(apply, shapes) == ["['in'] 1, ['out'] 0 (size 6, 3 blocks)"]


def test_what_the_results_do_not_depend_on_is_not_missed():
    shapes = {"in": (3, 7), "row": (5,), "out": (7, 2)}

    def apply(p, x):
        y = x @ p["in"] + (p["row"] * np.float32([1, 2, 3, 4, 5]))[:, None]
        return (y - y.mean(1, keepdims=True)) @ p["out"]

    assert missed(apply, shapes) == []
