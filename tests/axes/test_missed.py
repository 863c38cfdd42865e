"""Fixed dimensions that can be permuted after all are found by trying."""

import jax.numpy as jnp
import numpy as np

from tests.axes import missed as search


def missed(apply, shapes):
    rng = np.random.default_rng(0)
    params = {k: jnp.asarray(rng.normal(size=n), jnp.float32) for k, n in shapes.items()}
    return search.missed(apply, params, (jnp.asarray(rng.normal(size=(5, 3)), jnp.float32),))


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
