"""Stores of leaves whose class axis is a factor of a product, or a part of a concatenation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import plan as plans

C, F = 5, 4
AXES = {"a": P("2*class"), "b": P("class*3+2*class"), "c": P(None, "class"), "trunk": P()}


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"a": (2 * C, F), "b": (5 * C,), "c": (2, C), "trunk": (F, F)}
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def scores(params, x):
    """`[B, F] -> [B, classes]`, of a model with as many classes as the parameters have."""
    n = params["c"].shape[1]
    h = jnp.tanh(x @ params["trunk"])
    first, second = params["a"].reshape(2, n, F)
    scale, shift = params["b"][: 3 * n].reshape(n, 3), params["b"][3 * n :].reshape(2, n)
    return (
        h @ first.T + jnp.tanh(h @ second.T) * scale.sum(1) + shift[0] * params["c"][1] - shift[1]
    )


def whole_loss(params, x, y):
    return jnp.mean(psjax.losses.psl_with_integer_labels(scores(params, x), y))


def element(params, batch, pairs):
    found = scores(params, batch["x"].reshape(-1, F)).reshape(*batch["x"].shape[:2], -1)
    return psjax.losses.block(found, batch["weight"], pairs)


def samples():
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(12, F))), jnp.asarray(rng.permutation(12) % C, jnp.int32)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("num_workers", [1, 2, 3, 5, 7])
def test_a_store_keeps_every_class_and_gives_the_tree_back(num_workers):
    params = make_params()
    store = plans.Store(AXES, params, num_workers)
    shards = store.shard(params)
    jax.tree.map(np.testing.assert_array_equal, store.whole(shards), params)
    rows = store.rows.ravel()
    for c in range(C):
        own = np.concatenate([np.ravel(shards[k][rows == c]) for k in "abc"])
        a, b = params["a"].reshape(2, C, F)[:, c], params["b"]
        want = [a.ravel(), b[: 3 * C].reshape(C, 3)[c], b[3 * C :].reshape(2, C)[:, c]]
        want = np.concatenate([*want, params["c"][:, c]])
        np.testing.assert_array_equal(np.sort(own), np.sort(want))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["elements", "pairs", "cyclic"])
def test_a_plan_s_step_on_such_leaves_is_the_whole_gradient(kind):
    params, (x, y), W = make_params(), samples(), 3
    plan, store = getattr(plans, kind)(C, W), plans.Store(AXES, params, W)
    rows = plan.batches(np.asarray(y), len(y))
    taken = {"x": psjax.data.take(x, rows.indices[0]), "weight": jnp.asarray(rows.weights[0])}
    step = plans.value_and_grad(element, plan, store, "workers")
    split = jax.tree.map(lambda a: a.reshape(W, -1, *a.shape[1:]), store.shard(params))
    value, grads = jax.vmap(step, axis_name="workers")(split, taken)
    grads = store.whole(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), grads))
    expected, want = jax.value_and_grad(whole_loss)(params, x, y)
    np.testing.assert_allclose(value.sum(), expected, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, want)


@pytest.mark.usefixtures("x64")
def test_by_label_has_the_same_pairs_and_runs_of_labels():
    params, (x, y) = make_params(), samples()
    for plan in (plans.cyclic(C, 1, C), plans.pairs(C, 2), plans.blocks(C, 1, 4)):
        tasks = plan.by_label()
        slots = psjax.data.most_of_a_label(np.asarray(y), C, len(y))
        rows = psjax.data.batches_by_label(np.asarray(y), C, len(y), slots=slots)
        batch = {"x": psjax.data.take(x, rows.indices[0]), "weight": jnp.asarray(rows.weights[0])}
        selection = tasks.selection(AXES, params)
        assert selection.run_axes == ("label",)
        each = len(selection) // plan.num_workers
        assert each % selection.run_length == 0
        pairs = jnp.asarray(tasks.pairs.reshape(-1, *tasks.pairs.shape[2:]))
        fn = psjax.value_and_grad(element, in_axes=(P("label"), P("task")))
        value, grads = fn(params, selection, batch, pairs)
        expected, want = jax.value_and_grad(whole_loss)(params, x, y)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), grads, want)


def test_a_leaf_of_which_a_part_has_no_class_is_refused():
    params = {"own": jnp.zeros(C + 3)}
    with pytest.raises(
        ValueError, match=r"Store\(axis='class'\): .*'own'.*must have the axis once"
    ):
        plans.Store({"own": P("class+3")}, params, 2)
