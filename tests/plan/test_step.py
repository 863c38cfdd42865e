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
    weight = np.where(rows.weights > 0, 1 / BATCH, 0)[:steps]
    padded = np.pad(x, [(0, 1), (0, 0)])  # the empty slot
    return {"x": padded[rows.indices[:steps]], "weight": weight.astype(x.dtype)}


def by_worker(tree, n=W):
    """`[n * m, ...] -> [n, m, ...]`, scalars repeated; for vmap and pmap."""
    divide = lambda x: x.reshape(n, -1, *x.shape[1:]) if x.ndim else np.broadcast_to(x, (n,))
    return jax.tree.map(lambda x: divide(np.asarray(x)), tree)


def joined(tree, like):
    join = lambda y, x: y.reshape(x.shape) if x.ndim else y[0]
    return jax.tree.map(lambda y, x: join(np.asarray(y), x), tree, like)


def train(run, loss_and_grad, store, w, batches):
    """Weights and state after steps of Adam on leaves `[steps, W, ...]`, and the losses.

    By vmap, pmap or shard_map, with the weights in shards.
    """
    optimizer = optax.adam(1e-2)
    shards = jax.jit(store.shard)(w)
    start = shards, optimizer.init(shards)
    batches = jax.tree.map(lambda x: np.moveaxis(x, 1, 0), batches)

    def step(state, batch):
        shards, opt_state = state
        loss, grads = loss_and_grad(shards, batch)
        updates, opt_state = optimizer.update(grads, opt_state, shards)
        shards = optax.apply_updates(shards, updates)
        return (shards, opt_state), jax.lax.psum(loss, "workers")

    steps = lambda state, batches: jax.lax.scan(step, state, batches)
    if run.startswith("shard_map"):
        specs = store.specs(start, "workers")
        mapped = jax.shard_map(
            lambda state, batches: steps(state, jax.tree.map(lambda x: x[0], batches)),
            mesh=mesh_of(W),
            in_specs=(specs, P("workers")),
            out_specs=(specs, P()),
            check_vma=run == "shard_map",
        )
        state, losses = jax.jit(mapped)(start, batches)
    else:
        devices = jax.devices()[:W]
        mapped = {
            "vmap": lambda: jax.jit(jax.vmap(steps, axis_name="workers")),
            "pmap": lambda: jax.pmap(steps, axis_name="workers", devices=devices),
        }[run]()
        state, losses = mapped(by_worker(start), batches)
        state, losses = joined(state, start), losses[0]
    like = jax.eval_shape(optimizer.init, w)
    axes = psjax.ist.state_axes(optimizer, model.AXES, w)
    whole = jax.jit(lambda w, state: (store.whole(w), store.whole(state, like, axes)))
    return *whole(*state), losses


def psl(scores, labels):
    return jnp.mean(psjax.losses.psl_with_integer_labels(scores, labels))


def psl_and_nll(scores, labels):
    nll = psjax.losses.nll_with_integer_labels(scores, labels)
    return psl(scores, labels) + jnp.mean(nll)


@functools.cache  # in double precision, as all that ask
def one_device(loss_fn, num_classes, steps):
    """The same on one device that holds everything."""
    w, optimizer = model.init(num_classes), optax.adam(1e-2)
    x, labels = model.make_data(num_classes, BATCH * steps)
    batches = x.reshape(steps, BATCH, -1), jnp.asarray(labels).reshape(steps, BATCH)

    def step(carry, batch):
        w, state = carry
        value, grads = jax.value_and_grad(lambda w: loss_fn(model.scores(w, batch[0]), batch[1]))(w)
        updates, state = optimizer.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), value

    steps = jax.jit(lambda *args: jax.lax.scan(step, *args))
    (w, state), losses = steps((w, optimizer.init(w)), batches)
    return w, state, losses


@functools.cache
def whole_value_and_grad(num_classes):
    """Of one batch; in double precision."""
    x, labels = model.make_data(num_classes, BATCH)
    return jax.jit(model.whole_value_and_grad)(model.init(num_classes), x, jnp.asarray(labels))


PLANS = {
    "cyclic": lambda C: plans.cyclic(C, W),
    "cyclic in turns": lambda C: plans.cyclic(C, W, C),
    "elements": lambda C: plans.elements(C, W),
    "blocks": lambda C: plans.blocks(C, W, 4),
    "all classes": lambda C: plans.blocks(C, W, C),
    "merged": lambda C: plans.elements(C, W).merge_by_label(),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("run", ["vmap", "pmap", "shard_map", "shard_map unchecked"])
@pytest.mark.parametrize("kind", ["cyclic", "elements"])
def test_fifty_steps_are_those_of_one_device_that_holds_everything(kind, run):
    num_classes, steps = 10, 50
    plan, w = PLANS[kind](num_classes), model.init(num_classes)
    x, labels = model.make_data(num_classes, BATCH * steps)
    store = plans.Store(model.AXES, w, W)
    loss_and_grad = plans.value_and_grad(model.element, plan, store, "workers")
    found = train(run, loss_and_grad, store, w, batches(plan, x, labels, steps))
    close(found, one_device(psl, num_classes, steps), 1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("kind", "num_classes"),
    [
        *((kind, 10) for kind in PLANS),
        ("cyclic", 16),
        ("elements", 16),
        ("elements", 3),
        ("merged", 16),
        ("cyclic", 5),
    ],
)
def test_every_plan_gives_the_whole_gradient_where_the_weights_live(kind, num_classes):
    """Also of fewer classes than workers: shards without a class, tasks that share the samples."""
    plan, w = PLANS[kind](num_classes), model.init(num_classes)
    x, labels = model.make_data(num_classes, BATCH)
    store = plans.Store(model.AXES, w, W)
    loss_and_grad = plans.value_and_grad(model.element, plan, store, "workers")
    own = jax.tree.map(lambda x: x[0], batches(plan, x, labels, 1))
    shards = jax.jit(store.shard)(w)
    values, grads = jax.jit(jax.vmap(loss_and_grad, axis_name="workers"))(by_worker(shards), own)
    expected, whole = whole_value_and_grad(num_classes)
    close(values.sum(), expected)
    close(jax.jit(store.whole)(joined(grads, shards)), whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("check_vma", [True, False])
def test_data_parallelism_inside_a_plan_on_a_mesh_of_two_axes(check_vma):
    """Four workers by two replicas, which have the same weights and disjoint samples."""
    num_classes, n = 10, 4
    plan, w = plans.cyclic(num_classes, n), model.init(num_classes)
    x, labels = model.make_data(num_classes, BATCH)
    store = plans.Store(model.AXES, w, n)
    loss_and_grad = plans.value_and_grad(model.element, plan, store, "workers")
    specs = store.specs(jax.eval_shape(store.shard, w), "workers")
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
    value, grads = step(jax.jit(store.shard)(w), own)
    expected, whole = whole_value_and_grad(num_classes)
    close(value, expected)
    close(jax.jit(store.whole)(grads), whole)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("num_classes", "run"),
    [(10, "vmap"), (10, "pmap"), (10, "shard_map"), (10, "shard_map unchecked"), (16, "vmap")],
)
def test_score_exchange_takes_the_exact_steps_of_the_negative_log_likelihood(num_classes, run):
    """And of any other loss of all scores: here the sum of both, over twenty steps."""
    w, steps = model.init(num_classes), 20
    x, labels = model.make_data(num_classes, BATCH * steps)
    store = plans.Store(model.AXES, w, W)
    loss_and_grad = psjax.baselines.score_exchange(
        lambda w, batch: model.scores(w, batch["x"]),
        lambda scores, batch: psl_and_nll(scores, batch["label"]),
        store,
        "workers",
    )
    everywhere = lambda x: np.broadcast_to(
        np.reshape(x, (steps, 1, BATCH, *x.shape[1:])), (steps, W, BATCH, *x.shape[1:])
    )
    batch = {"x": everywhere(x), "label": everywhere(labels)}
    found = train(run, loss_and_grad, store, w, batch)
    close(found, one_device(psl_and_nll, num_classes, steps), 1e-10)


def test_score_exchange_sends_the_scores_and_the_common_weights_only():
    num_classes = 16
    w = model.init(num_classes, jnp.float32)
    store = plans.Store(model.AXES, w, W)
    shards = jax.eval_shape(store.shard, w)
    body = psjax.baselines.score_exchange(
        lambda w, batch: model.scores(w, batch["x"]),
        lambda scores, batch: psl_and_nll(scores, batch["label"]),
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


def compiled(element, plan, store, batch):
    """The program of one step, and its arguments."""
    shards = jax.eval_shape(store.shard, store.like)
    specs = store.specs(shards, "workers")
    body = plans.value_and_grad(element, plan, store, "workers")

    def step(shards, batch):
        value, grads = body(shards, jax.tree.map(lambda x: x[0], batch))
        return jax.lax.psum(value, "workers"), grads

    mapped = jax.shard_map(
        step, mesh=mesh_of(W), in_specs=(specs, P("workers")), out_specs=(P(), specs)
    )
    return jax.jit(mapped).lower(shards, batch).compile()


@pytest.mark.parametrize(
    ("kind", "num_classes"),
    [
        *((kind, num_classes) for kind in PLANS for num_classes in (10, 16)),
        *((kind, 64) for kind in ("cyclic", "blocks", "all classes")),
        *((kind, 24) for kind in ("cyclic in turns", "elements")),  # of 64: long tables
    ],
)
def test_a_step_sends_what_the_table_says_to_the_byte(kind, num_classes):
    plan = PLANS[kind](num_classes)
    like = jax.eval_shape(lambda: model.init(num_classes, jnp.float32))
    store = plans.Store(model.AXES, like, W)
    data = model.make_data(num_classes, BATCH, jnp.float32)
    batch = jax.tree.map(lambda x: x[0], batches(plan, *data, 1))
    ledger = cost.ledger(compiled(model.element, plan, store, batch))
    counts = psjax.structure.count(model.AXES, like)
    private = counts.score - counts.common
    work = plans.Workload(model.AXES, like, counts.common, private, 0.0, 0.0, 4)
    (row, *_) = plans.table(
        work, [plan], num_workers=W, batch_size=BATCH, bandwidth=1.0, flops=1.0
    ).rows
    assert ledger.bytes_per_device == row.down + row.up


def test_data_parallel_and_subnets_send_what_the_table_says_to_the_byte():
    n, num_classes, local_steps = 4, 3, 2
    optimizer = optax.sgd(0.1, momentum=0.9)
    net = psjax.models.PSNet(num_classes, (), 2, (16,), (2,), (1,))
    work = plans.workload(net, num_classes, jax.ShapeDtypeStruct((1, 2, 2, 1), jnp.float32))
    state = jax.eval_shape(optimizer.init, work.like)
    costs = plans.table(
        work,
        [],
        num_workers=n,
        batch_size=BATCH,
        bandwidth=1.0,
        flops=1.0,
        moments=1,
        local_steps=local_steps,
    )
    subnets = lambda: psjax.ist.membership(0, 0, work.axes, sizes, n, stratified=True)

    def sent(body, specs, selection, steps):
        x = jax.ShapeDtypeStruct((n, steps, 6, 2, 2, 1), jnp.float32)
        batch = {"x": x, "label": jax.ShapeDtypeStruct(x.shape[:3], jnp.int32)}
        mapped = jax.shard_map(
            body,
            mesh=mesh_of(n),
            in_specs=(*specs, P(), P("workers")),
            out_specs=(*specs, P("workers")),
        )
        program = jax.jit(mapped).lower(work.like, state, selection, batch).compile()
        return cost.ledger(program).bytes_per_device

    loss_of = lambda net: lambda w, batch: psl(net.apply({"params": w}, batch["x"]), batch["label"])
    update = psjax.baselines.data_parallel(loss_of(net), optimizer, axis_name="workers")
    row = {row.name: row for row in costs.rows}["data parallel"]
    everything = psjax.replicas(work.like, 1)
    assert sent(update, (P(), P()), everything, 1) == row.down + row.up

    sizes, axes = {"hidden_0": 16}, psjax.ist.state_axes(optimizer, work.axes, work.like)
    specs = [psjax.ist.store_specs(tree, sizes, "workers") for tree in (work.axes, axes)]
    update = psjax.local_update(loss_of(net.clone(hidden=(4,))), optimizer)
    exchange = psjax.ist.exchange(update, "workers")
    row = {row.name: row for row in costs.rows}["independent subnets, J = 2"]
    round = sent(exchange, specs, jax.eval_shape(subnets), local_steps)
    assert round == local_steps * (row.down + row.up)


def test_a_worker_keeps_its_share_and_holds_what_its_task_selects():
    """Residents: of a cyclic plan's 64 classes a worker keeps 8 and holds 4 groups of 8."""
    for num_classes, expected in [(16, 4 / 8), (64, 4 / 8), (10, 0.6)]:
        plan = plans.cyclic(num_classes, W)
        like = jax.eval_shape(lambda n=num_classes: model.init(n, jnp.float32))
        store = plans.Store(model.AXES, like, W)
        shards = jax.eval_shape(store.shard, like)
        kept = sum(x.size // W for x in jax.tree.leaves(shards) if x.ndim) + 1
        counts = psjax.structure.count(model.AXES, like)
        private = counts.score - counts.common
        rows = -(-num_classes // W)
        assert kept <= rows * private + -(-counts.common // W) + 1
        assert plan.block_size / num_classes == pytest.approx(expected)


@pytest.mark.parametrize("num_classes", [16, 64])
def test_the_memory_of_the_compiled_step_is_a_tasks_and_not_the_networks(num_classes):
    """With 3000 weights a class, a group for each class, and so several turns of few classes.

    Arguments and results are the share; what is fetched, its gradient and what travels in either
    direction are there for the classes of one task, not of all turns.
    """
    wide, axes = 1000, {"head": P("class", None, None), "trunk": P()}
    like = {
        "head": jax.ShapeDtypeStruct((num_classes, 3, wide), jnp.float32),
        "trunk": jax.ShapeDtypeStruct((5, 3), jnp.float32),
    }
    plan, store = plans.cyclic(num_classes, W, num_classes), plans.Store(axes, like, W)
    assert plan.num_turns == num_classes // W

    def element(w, batch, pairs):
        c = jnp.einsum("lsi,it,ctd->lsc", batch["x"], w["trunk"], w["head"])
        return psjax.losses.block(c, batch["weight"], pairs)

    lead = (W, plan.num_turns, plan.pairs.shape[2], 2)
    batch = {"x": np.ones((*lead, 5), np.float32), "weight": np.ones(lead, np.float32)}
    memory = compiled(element, plan, store, batch).memory_analysis()
    assert memory is not None
    head = 4 * num_classes * 3 * wide
    assert memory.argument_size_in_bytes < head / W * 1.1
    assert memory.output_size_in_bytes < head / W * 1.1
    held = head * plan.block_size / num_classes  # of 64 classes 9 / 64 of the head
    assert memory.temp_size_in_bytes < 3.5 * held


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
    shards = by_worker(jax.jit(store.shard)(like))
    fn = plans.value_and_grad(model.element, plan, store, "workers")
    scores = psjax.baselines.score_exchange(
        lambda w, x: jnp.ones((3, 10)), lambda scores, x: jnp.mean(scores), store, "workers"
    )
    with pytest.raises(ValueError, match=r"a worker has 2 of the 10 classes: pass \[B, 2\]"):
        jax.vmap(scores, axis_name="workers")(shards, jnp.ones((W, 3)))
    batch = {"x": jnp.ones((W, 1, plan.pairs.shape[2], 2, 5))}
    with pytest.raises(ValueError, match=r"a worker's shards have shapes"):
        jax.vmap(fn, axis_name="workers", in_axes=(None, 0))(like, batch)
    with pytest.raises(ValueError, match=r"must begin with \[turns, labels\]"):
        jax.vmap(fn, axis_name="workers")(shards, {"x": jnp.ones((W, 2, 5))})
    half = jax.tree.map(lambda x: x[:4], (shards, batch))
    with pytest.raises(ValueError, match="has 4 workers, the plan 8"):
        jax.vmap(fn, axis_name="workers")(*half)


def test_the_store_and_back_is_the_tree_bit_for_bit():
    for num_classes, workers in [(10, 8), (16, 8), (5, 8), (10, 1), (7, 3)]:
        w = model.init(num_classes)
        store = plans.Store(model.AXES, w, workers)
        back = jax.jit(lambda w, store=store: store.whole(store.shard(w)))(w)
        jax.tree.map(np.testing.assert_array_equal, back, w)


def test_the_axes_of_a_store_may_be_a_function_of_the_parameters():
    w = jax.eval_shape(lambda: model.init(10))
    store = plans.Store(lambda params: {name: model.AXES[name] for name in params}, w, W)
    assert store.axes == model.AXES
    shards = jax.eval_shape(store.shard, w)
    assert shards == jax.eval_shape(plans.Store(model.AXES, w, W).shard, w)
    assert shards["deep"].shape == (16, model.WIDTH)
