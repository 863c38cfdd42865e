"""Partially-separable plans and score exchange as methods: weights in shards by class."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from experiments.hosts.problem import Problem
from experiments.psl import training as psl

WORKERS = "workers"


def make_plan(problem: Problem, workers: int) -> psjax.plan.Plan:
    """The plan that `--method` names, of so many workers."""
    kind, num_classes = problem.config.method, problem.num_classes
    if kind == "blocks":
        return psjax.plan.blocks(num_classes, workers, problem.config.block_size)
    return getattr(psjax.plan, kind)(num_classes, workers)


def by_plan(problem: Problem, mesh: Mesh, store: psjax.plan.Store):
    """`loss_and_grad`, `batch` and a description: each worker its task, with its own samples."""
    config, plan = problem.config, make_plan(problem, mesh.size)
    if config.loss in ("nll", "one-vs-all"):
        msg = (
            f"--method {config.method} --loss {config.loss}: it has no pair elements; write --loss "
            "psl, psl-squared, one-vs-each or squared-hinge, or --method score-exchange."
        )
        raise ValueError(msg)
    margin_fn = psjax.losses.margin_function(config.loss)
    small = problem.net.clone(num_classes=plan.block_size)

    def element(params, batch, pairs):
        x = batch["x"]
        scores = small.apply({"params": params}, x.reshape(-1, *x.shape[2:]))
        scores = jnp.reshape(jnp.asarray(scores), (*x.shape[:2], -1))
        return psjax.losses.block(scores, batch["weight"], pairs, margin_fn)

    mapped = psjax.plan.value_and_grad(element, plan, store, WORKERS)
    own = lambda shards, batch: mapped(shards, jax.tree.map(lambda x: x[0], batch))
    text = {"kind": plan.kind, "base": plan.base, "classes": plan.classes.tolist()}
    return own, _plan_batch(problem, mesh, plan), text, P(WORKERS)


def by_scores(problem: Problem, mesh: Mesh, store: psjax.plan.Store):
    """The same for score exchange: every worker all samples, its own classes' weights."""
    small = problem.net.clone(num_classes=store.rows.shape[1])
    per_sample = psl.sample_loss(problem.config.loss)
    loss_and_grad = psjax.baselines.score_exchange(
        lambda params, batch: small.apply({"params": params}, batch["x"]),
        lambda scores, batch: jnp.mean(per_sample(scores, batch["y"])),
        store,
        WORKERS,
    )
    everywhere = NamedSharding(mesh, P())

    def batch(round):
        index = problem.samples(round).reshape(-1)
        x, y = problem.inputs(problem.train, index), problem.train["y"][index]
        put = lambda a: jax.make_array_from_callback(a.shape, everywhere, lambda i: a[i])
        return {"x": put(x), "y": put(y)}

    return loss_and_grad, batch, {"kind": "scores"}, P()


def make_store(problem: Problem, mesh: Mesh) -> psjax.plan.Store:
    """Where the weights live."""
    if problem.config.model != "psnet":
        msg = (
            f"--method {problem.config.method} --model {problem.config.model}: its scores are not "
            "an axis of the weights; write --model psnet."
        )
        raise ValueError(msg)
    if problem.config.steps != 1:
        msg = f"--method {problem.config.method} --local-steps {problem.config.steps}: write 1."
        raise ValueError(msg)
    return psjax.plan.Store(problem.axes, problem.like, mesh.size)


def step_fn(loss_and_grad, optimizer, store, mesh, batch_spec):
    """The jitted step, and the `PartitionSpec`s of the state."""
    shards = jax.eval_shape(store.shard, store.like)
    specs = {
        "params": store.specs(shards, WORKERS),
        "opt_state": store.specs(jax.eval_shape(optimizer.init, shards), WORKERS),
        "round": P(),
    }

    def body(params, opt_state, _, batch):
        value, grads = loss_and_grad(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        value = jax.lax.psum(value, WORKERS)
        metrics = psjax.LocalMetrics(value[None, None], jnp.isfinite(value)[None])
        return optax.apply_updates(params, updates), opt_state, metrics

    return jitted(body, mesh, specs, batch_spec, P(), check_vma=True), specs


def jitted(body, mesh: Mesh, specs, batch_spec: P, metrics_spec: P, check_vma: bool):
    """The jitted `(state, batch) -> state, metrics` over the workers.

    Args:
      body: a round, `(params, opt_state, round, batch) -> params, opt_state, metrics`.
      mesh: of the axis `workers`.
      specs: of the state.
      batch_spec: of the batch's leaves.
      metrics_spec: of the metrics' leaves.
      check_vma: as in `jax.shard_map`.
    """

    def one(state, batch):
        params, opt_state, metrics = body(
            state["params"], state["opt_state"], state["round"], batch
        )
        state = {"params": params, "opt_state": opt_state, "round": state["round"] + 1}
        return state, metrics

    in_specs, out_specs = (specs, batch_spec), (specs, metrics_spec)
    mapped = jax.shard_map(
        one, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma
    )
    return jax.jit(mapped, donate_argnums=0)


def _plan_batch(problem, mesh, plan):
    """`(round) -> {"x": [W, T, l, S, ...], "weight": [W, T, l, S]}`, own rows only."""
    labels, size = problem.train["y"], problem.config.batch_size
    counts = lambda index: np.bincount(labels[index.ravel()]).max()
    room = int(max(counts(problem.samples(r)) for r in range(problem.config.rounds)))
    sharding, shape = NamedSharding(mesh, P(WORKERS)), problem.train["x"].shape[1:]

    def batch(round):
        order = problem.samples(round).reshape(-1)
        rows = plan.batches(labels, size, order, room)
        index, weight = rows.indices[0], rows.weights[0].astype(problem.config.dtype)
        if problem.config.float64:
            weight = np.where(weight > 0, 1 / size, 0.0)  # 1/L to float32 would show
        filled = np.minimum(index, len(labels) - 1)  # an empty slot has weight 0
        images = lambda where: problem.inputs(problem.train, filled[where[0]])
        return {
            "x": jax.make_array_from_callback((*index.shape, *shape), sharding, images),
            "weight": jax.make_array_from_callback(weight.shape, sharding, lambda i: weight[i]),
        }

    return batch
