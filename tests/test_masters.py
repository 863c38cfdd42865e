"""Masters and workers: the trajectory of one device, the bytes and the memory of the plan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psjax
from psjax import cost
from psjax import plan as plans
from tests import separable_model as model

W = 8
BATCH = 24


def mesh_of(n, names=("workers",), shape=None):
    types = (AxisType.Auto,) * len(names)
    return jax.make_mesh(shape or (n,), names, axis_types=types, devices=jax.devices()[:n])


def close(a, b, tol=1e-12):
    check = functools.partial(np.testing.assert_allclose, rtol=tol, atol=tol)
    jax.tree.map(lambda x, y: check(np.asarray(x), np.asarray(y)), a, b)


def batches(plan, x, labels, steps, replicas=1):
    """Leaves `[steps, replicas * W, T, l, S, ...]`, weights exact in float64."""
    rows = plan.batches(labels, BATCH, replicas=replicas)
    weight = np.where(rows.weights > 0, 1 / BATCH, 0)
    weight = jnp.asarray(weight[:steps], x.dtype)
    return {"x": psjax.data.take(x, rows.indices[:steps]), "weight": weight}


def by_worker(tree, n=W):
    """`[n * m, ...] -> [n, m, ...]`, scalars repeated; for vmap and pmap."""
    return jax.tree.map(
        lambda x: x.reshape(n, -1, *x.shape[1:]) if x.ndim else jnp.broadcast_to(x, (n,)), tree
    )


def joined(tree, like):
    return jax.tree.map(lambda y, x: y.reshape(x.shape) if x.ndim else y[0], tree, like)


def executor(name, step, state):
    """`step(state, batch) -> state, loss` over the workers, by vmap, pmap or shard_map.

    And the state as it takes it.
    """
    if name.startswith("shard_map"):
        mesh, specs = (
            mesh_of(W),
            jax.tree.map(lambda x: P("workers") if jnp.ndim(x) else P(), state),
        )
        body = lambda state, batch: step(state, jax.tree.map(lambda x: x[0], batch))
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(specs, P("workers")),
            out_specs=(specs, P()),
            check_vma=name == "shard_map",
        )
        return jax.jit(mapped), state
    if name == "pmap":
        return jax.pmap(step, axis_name="workers", devices=jax.devices()[:W]), by_worker(state)
    return jax.jit(jax.vmap(step, axis_name="workers")), by_worker(state)


def adam_step(loss_and_grad, optimizer):
    def step(state, batch):
        shards, opt_state = state
        loss, grads = loss_and_grad(shards, batch)
        updates, opt_state = optimizer.update(grads, opt_state, shards)
        shards = optax.apply_updates(shards, updates)
        return (shards, opt_state), jax.lax.psum(loss, "workers")

    return step


def whole_trajectory(w, optimizer, x, labels, steps):
    @jax.jit
    def step(w, state, x, labels):
        loss, grads = model.whole_value_and_grad(w, x, labels)
        updates, state = optimizer.update(grads, state, w)
        return optax.apply_updates(w, updates), state, loss

    state, losses = optimizer.init(w), []
    for i in range(steps):
        part = slice(i * BATCH, (i + 1) * BATCH)
        w, state, loss = step(w, state, x[part], jnp.asarray(labels[part]))
        losses.append(float(loss))
    return w, state, losses


PLANS = {
    "cyclic": lambda C: plans.cyclic(C, W),
    "cyclic in turns": lambda C: plans.cyclic(C, W, C),
    "elements": lambda C: plans.elements(C, W),
    "blocks": lambda C: plans.blocks(C, W, 4),
    "replicas": lambda C: plans.blocks(C, W, C),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("run", ["vmap", "pmap", "shard_map", "shard_map unchecked"])
@pytest.mark.parametrize("kind", ["cyclic", "elements"])
def test_fifty_steps_are_those_of_one_device_that_holds_everything(kind, run):
    num_classes, steps = 10, 50
    plan, w = PLANS[kind](num_classes), model.init(num_classes)
    x, labels = model.make_data(num_classes, BATCH * steps)
    optimizer = optax.adam(1e-2)
    store = plans.Store(model.AXES, w, W)
    loss_and_grad = plans.value_and_grad(model.element, plan, store, "workers")
    state = store.shard(w), optimizer.init(store.shard(w))
    start = state
    step, state = executor(run, adam_step(loss_and_grad, optimizer), state)
    own, losses = batches(plan, x, labels, steps), []
    for i in range(steps):
        state, loss = step(state, jax.tree.map(lambda x, i=i: x[i], own))
        losses.append(float(jnp.ravel(loss)[0]))
    state = joined(state, start) if run in ("vmap", "pmap") else state
    expected, opt_state, whole_losses = whole_trajectory(w, optimizer, x, labels, steps)
    close(losses, whole_losses, 1e-10)
    close(store.whole(state[0]), expected, 1e-10)
    axes = psjax.ist.state_axes(optimizer, model.AXES, w)
    close(store.whole(state[1], opt_state, axes), opt_state, 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("num_classes", [10, 16])
def test_every_plan_gives_the_whole_gradient_where_the_weights_live(kind, num_classes):
    plan, w = PLANS[kind](num_classes), model.init(num_classes)
    x, labels = model.make_data(num_classes, BATCH)
    store = plans.Store(model.AXES, w, W)
    loss_and_grad = plans.value_and_grad(model.element, plan, store, "workers")
    own = jax.tree.map(lambda x: x[0], batches(plan, x, labels, 1))
    fn = jax.jit(jax.vmap(loss_and_grad, axis_name="workers"))
    values, grads = fn(by_worker(store.shard(w)), own)
    expected, whole = model.whole_value_and_grad(w, x, labels)
    close(values.sum(), expected)
    close(store.whole(joined(grads, store.shard(w))), whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_data_parallelism_inside_a_plan_on_a_mesh_of_two_axes(check_vma):
    """Four workers by two replicas, which have the same weights and disjoint samples."""
    num_classes, n = 10, 4
    plan, w = plans.cyclic(num_classes, n), model.init(num_classes)
    x, labels = model.make_data(num_classes, BATCH)
    store = plans.Store(model.AXES, w, n)
    loss_and_grad = plans.value_and_grad(model.element, plan, store, "workers")
    specs = store.specs(store.shard(w), "workers")
    mesh = mesh_of(8, ("replicas", "workers"), (2, n))

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs, P(("replicas", "workers"))),
        out_specs=(P(), specs),
        check_vma=check_vma,
    )
    def step(shards, batch):
        value, grads = loss_and_grad(shards, jax.tree.map(lambda x: x[0], batch))
        value, grads = jax.lax.psum((value, grads), "replicas")
        return jax.lax.psum(value, "workers"), grads

    own = jax.tree.map(lambda x: x[0], batches(plan, x, labels, 1, replicas=2))
    value, grads = step(store.shard(w), own)
    expected, whole = model.whole_value_and_grad(w, x, labels)
    close(value, expected)
    close(store.whole(grads), whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("run", ["vmap", "pmap", "shard_map", "shard_map unchecked"])
@pytest.mark.parametrize("num_classes", [10, 16])
def test_score_exchange_takes_the_exact_steps_of_the_negative_log_likelihood(num_classes, run):
    """And of any other loss of all scores: here the sum of both, over twenty steps."""
    w, steps = model.init(num_classes), 20
    x, labels = model.make_data(num_classes, BATCH * steps)
    store, optimizer = plans.Store(model.AXES, w, W), optax.adam(1e-2)

    def loss_fn(scores, batch):
        nll = psjax.losses.nll_with_integer_labels(scores, batch["label"])
        return jnp.mean(nll + psjax.losses.psl_with_integer_labels(scores, batch["label"]))

    loss_and_grad = psjax.baselines.score_exchange(
        lambda w, batch: model.scores(w, batch["x"]), loss_fn, store, "workers"
    )
    start = store.shard(w), optimizer.init(store.shard(w))
    step, state = executor(run, adam_step(loss_and_grad, optimizer), start)
    expected, opt_state = w, optimizer.init(w)
    whole = jax.jit(jax.value_and_grad(lambda w, b: loss_fn(model.scores(w, b["x"]), b)))
    for i in range(steps):
        part = slice(i * BATCH, (i + 1) * BATCH)
        batch = {"x": x[part], "label": jnp.asarray(labels[part])}
        repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (W, *x.shape)), batch)
        state, loss = step(state, repeated)
        value, grads = whole(expected, batch)
        close(jnp.ravel(loss)[0], value, 1e-10)
        updates, opt_state = optimizer.update(grads, opt_state, expected)
        expected = optax.apply_updates(expected, updates)
    state = joined(state, start) if run in ("vmap", "pmap") else state
    close(store.whole(state[0]), expected, 1e-10)


def test_score_exchange_sends_the_scores_and_the_common_weights_only():
    num_classes = 16
    w = model.init(num_classes, jnp.float32)
    store = plans.Store(model.AXES, w, W)
    shards = store.shard(w)
    body = psjax.baselines.score_exchange(
        lambda w, batch: model.scores(w, batch["x"]),
        lambda scores, batch: jnp.mean(
            psjax.losses.nll_with_integer_labels(scores, batch["label"])
        ),
        store,
        "workers",
    )
    specs = store.specs(shards, "workers")

    def step(shards, batch):
        value, grads = body(shards, batch)
        return jax.lax.psum(value, "workers"), grads

    fn = jax.shard_map(step, mesh=mesh_of(W), in_specs=(specs, P()), out_specs=(P(), specs))
    x, labels = model.make_data(num_classes, BATCH, jnp.float32)
    program = jax.jit(fn).lower(shards, {"x": x, "label": jnp.asarray(labels)}).compile()
    counts = psjax.structure.count(model.AXES, w)
    work = plans.Workload(model.AXES, w, counts.common, counts.score - counts.common, 0.0, 0.0, 4)
    table = plans.table(work, [], num_workers=W, batch_size=BATCH, bandwidth=1.0, flops=1.0)
    (row,) = [row for row in table.rows if row.name == "score exchange"]
    assert cost.ledger(program).bytes_per_device == row.down + row.up


# ------------------------------------------------------------------------- bytes and memory


def compiled(plan, store, num_classes):
    w = model.init(num_classes, jnp.float32)
    x, labels = model.make_data(num_classes, BATCH, jnp.float32)
    shards = store.shard(w)
    specs = store.specs(shards, "workers")
    body = plans.value_and_grad(model.element, plan, store, "workers")

    def step(shards, batch):
        value, grads = body(shards, jax.tree.map(lambda x: x[0], batch))
        return jax.lax.psum(value, "workers"), grads

    mesh = mesh_of(W)
    own = jax.tree.map(lambda x: x[0], batches(plan, x, labels, 1))
    fn = jax.jit(
        jax.shard_map(step, mesh=mesh, in_specs=(specs, P("workers")), out_specs=(P(), specs))
    )
    return fn.lower(shards, own).compile(), shards


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("num_classes", [10, 16, 64])
def test_a_step_sends_what_the_table_says_to_the_byte(kind, num_classes):
    if kind in ("elements", "cyclic in turns") and num_classes == 64:
        num_classes = 24  # 4032 tasks in turn compile as well, but their tables are long
    plan = PLANS[kind](num_classes)
    like = model.init(num_classes, jnp.float32)
    store = plans.Store(model.AXES, like, W)
    program, _ = compiled(plan, store, num_classes)
    ledger = cost.ledger(program)
    counts = psjax.structure.count(model.AXES, like)
    private = counts.score - counts.common
    work = plans.Workload(model.AXES, like, counts.common, private, 0.0, 0.0, 4)
    (row, *_) = plans.table(
        work, [plan], num_workers=W, batch_size=BATCH, bandwidth=1.0, flops=1.0
    ).rows
    assert ledger.bytes_per_device == row.down + row.up


def test_a_worker_keeps_its_share_and_holds_what_its_task_selects():
    """Residents: of a cyclic plan's 64 classes a worker keeps 8 and holds 4 groups of 8."""
    for num_classes, expected in [(16, 4 / 8), (64, 4 / 8), (10, 0.6)]:
        plan = plans.cyclic(num_classes, W)
        like = jax.eval_shape(lambda n=num_classes: model.init(n, jnp.float32))
        store = plans.Store(model.AXES, like, W)
        shards = jax.eval_shape(store.shard, like)
        kept = sum(x.size // W for x in jax.tree.leaves(shards) if x.ndim) + 1
        n = sum(x.size for x in jax.tree.leaves(like))
        counts = psjax.structure.count(model.AXES, like)
        private = counts.score - counts.common
        rows = -(-num_classes // W)
        assert kept <= rows * private + -(-counts.common // W) + 1
        held = plan.block_size * private + counts.common
        assert plan.block_size / num_classes == pytest.approx(expected)
        assert held <= expected * n + counts.common


@pytest.mark.parametrize("num_classes", [16, 64])
def test_the_memory_of_the_compiled_step_is_the_plans_and_not_the_networks(num_classes):
    """With 3000 weights a class: arguments are the share, and no temporary has n entries."""
    wide = 1000
    axes = {"head": P("class", None, None), "trunk": P()}
    w = {"head": jnp.ones((num_classes, 3, wide)), "trunk": jnp.ones((5, 3))}
    plan, store = plans.cyclic(num_classes, W), plans.Store(axes, w, W)

    def element(w, batch, pairs):
        c = jnp.einsum("lsi,it,ctd->lsc", batch["x"], w["trunk"], w["head"])
        return psjax.losses.block(c, batch["weight"], pairs)

    shards = store.shard(w)
    specs = store.specs(shards, "workers")
    body = plans.value_and_grad(element, plan, store, "workers")

    def step(shards, batch):
        value, grads = body(shards, jax.tree.map(lambda x: x[0], batch))
        return jax.lax.psum(value, "workers"), grads

    fn = jax.jit(
        jax.shard_map(step, mesh=mesh_of(W), in_specs=(specs, P("workers")), out_specs=(P(), specs))
    )
    lead = (W, 1, plan.pairs.shape[2], 2)
    batch = {"x": jnp.ones((*lead, 5)), "weight": jnp.ones(lead)}
    memory = fn.lower(shards, batch).compile().memory_analysis()
    assert memory is not None
    head = 4 * num_classes * 3 * wide
    held = head * plan.block_size // num_classes
    assert memory.argument_size_in_bytes < head / W * 1.1
    assert memory.output_size_in_bytes < head / W * 1.1
    # fetched weights, their gradient and what travels in either direction: at most twice each
    assert memory.temp_size_in_bytes < 4.2 * held


# --------------------------------------------------------------------------------------- bad input


def test_shards_and_plans_that_do_not_fit_are_refused():
    like = model.init(10, jnp.float32)
    store = plans.Store(model.AXES, like, W)
    plan = plans.cyclic(10, W)
    with pytest.raises(ValueError, match="plan is for 4 workers and 10 classes, the store for 8"):
        plans.value_and_grad(model.element, plans.cyclic(10, 4), store, "workers")
    with pytest.raises(ValueError, match="no parameter has this axis"):
        plans.Store(model.AXES, like, W, axis="label")
    with pytest.raises(ValueError, match="num_workers=0"):
        plans.Store(model.AXES, like, 0)
    fn = plans.value_and_grad(model.element, plan, store, "workers")
    scores = psjax.baselines.score_exchange(
        lambda w, x: jnp.ones((3, 10)), lambda scores, x: jnp.mean(scores), store, "workers"
    )
    with pytest.raises(ValueError, match=r"a worker has 2 of the 10 classes: write \[B, 2\]"):
        jax.vmap(scores, axis_name="workers")(by_worker(store.shard(like)), jnp.ones((W, 3)))
    batch = {"x": jnp.ones((W, 1, plan.pairs.shape[2], 2, 5))}
    with pytest.raises(ValueError, match=r"a worker's shards have shapes"):
        jax.vmap(fn, axis_name="workers", in_axes=(None, 0))(like, batch)
    shards = by_worker(store.shard(like))
    with pytest.raises(ValueError, match=r"must begin with \[turns, labels\]"):
        jax.vmap(fn, axis_name="workers")(shards, {"x": jnp.ones((W, 2, 5))})
    half = jax.tree.map(lambda x: x[:4], (shards, batch))
    with pytest.raises(ValueError, match="has 4 workers, the plan 8"):
        jax.vmap(fn, axis_name="workers")(*half)


def test_the_store_and_back_is_the_tree_bit_for_bit():
    for num_classes, workers in [(10, 8), (16, 8), (5, 8), (10, 1), (7, 3)]:
        w = model.init(num_classes)
        store = plans.Store(model.AXES, w, workers)
        back = store.whole(store.shard(w))
        jax.tree.map(np.testing.assert_array_equal, back, w)
