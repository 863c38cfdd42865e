"""The methods, each with its state in global arrays over the mesh axis `workers`.

A method is a `Method`: `init(params) -> state`, the jitted `step(state, batch) -> state, metrics`
(one round), `batch(round)` of which a process makes only its own rows, and `whole(state) ->
params` on the host. `TABLE` names the function that makes each.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from experiments._lib.config import check_choice
from experiments.hosts import plans
from experiments.hosts.plans import WORKERS
from experiments.hosts.problem import Problem

PLANS = {"elements", "pairs", "blocks", "cyclic"}
SUMS = PLANS | {"data-parallel", "score-exchange"}
"""Methods whose workers share one sum, so that any number of them trains the same; of the others
the workers are the subnets, or the replicas."""


@dataclasses.dataclass(frozen=True)
class Method:
    """How a training runs over the workers.

    Attributes:
      mesh: of the axis `workers`.
      specs: where the state's leaves live: `{"params", "opt_state", "round"}`, trees of
        `PartitionSpec`s.
      optimizer: made from the configuration.
      step: jitted `(state, batch) -> state, metrics`; one round. `metrics` is
        `psjax.LocalMetrics`, `loss [workers, J]` and `finite [workers]`, every worker's own.
      batch: `(round) -> batch`, leaves sharded over the workers along their first axis.
      plan: what the processes must agree on, and a person may read.
      shard: from the whole parameters on the host to what is sharded as `specs` says; and from
      unshard: what `whole` gathers back to the parameters. Both are no more than the identity
        unless the method pads.
      saved: from the state to what a checkpoint holds, the same for any number of workers; and
      loaded: back to the state. The identity unless the method pads.
    """

    mesh: Mesh
    specs: dict[str, Any]
    optimizer: Any
    step: Any
    batch: Callable[[int], Any]
    plan: dict[str, Any]
    shard: Callable[[Any], Any] = lambda tree: tree
    unshard: Callable[[Any], Any] = lambda tree: tree
    saved: Callable[[Any], Any] = lambda state: state
    loaded: Callable[[Any], Any] = lambda state: state

    def init(self, params: Any) -> dict[str, Any]:
        """The state of the first round; a process makes only its own shards on its devices."""
        params = jax.tree.map(self._put, self.shard(params), self.specs["params"])
        where = jax.tree.map(self._sharding, self.specs["opt_state"])
        opt_state = jax.jit(self.optimizer.init, out_shardings=where)(params)
        return {
            "params": params,
            "opt_state": opt_state,
            "round": self._put(np.int32(0), self.specs["round"]),
        }

    def whole(self, state: dict[str, Any], keep: bool = True) -> Any:
        """The parameters on the host, leaf by leaf; None in a process that does not keep them."""
        found = []
        for x in jax.tree.leaves(state["params"]):
            x = jax.block_until_ready(_gather(self.mesh)(x))
            if keep:
                found.append(np.asarray(x.addressable_data(0)))
        return self.unshard(jax.tree.structure(state["params"]).unflatten(found)) if keep else None

    def mean_loss(self, metrics: Any) -> float:
        """Over the workers and steps of a round, NaN where a worker did not stay finite."""
        return float(_mean_loss(self.mesh)(metrics).addressable_data(0))

    def _sharding(self, spec):
        return NamedSharding(self.mesh, spec)

    def _put(self, x, spec):
        return jax.make_array_from_callback(x.shape, self._sharding(spec), lambda i: x[i])


@functools.cache
def _gather(mesh):
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))


@functools.cache
def _mean_loss(mesh):
    mean = lambda m: jnp.where(jnp.all(m.finite), jnp.mean(m.loss), jnp.nan)
    return jax.jit(mean, out_shardings=NamedSharding(mesh, P()))


def make(problem: Problem, mesh: Mesh) -> Method:
    """The method that the configuration names.

    Raises:
      ValueError: no such method; a network or a number of workers that it cannot have.
    """
    check(problem.config.method)
    return TABLE[problem.config.method](problem, mesh)


def check(method: str) -> None:
    """Raises ValueError if there is no such method."""
    check_choice("method", method, TABLE)


def workers_mesh(workers: int | None) -> Mesh:
    """A mesh of so many devices, spread evenly over the processes; None: all devices.

    Raises:
      ValueError: fewer workers than processes, or than devices.
    """
    by_process = [[] for _ in range(jax.process_count())]
    for device in jax.devices():
        by_process[device.process_index].append(device)
    if workers is None:
        workers = jax.device_count()
    if workers < len(by_process):
        msg = (
            f"--workers {workers}: there are {len(by_process)} processes, and each needs one; "
            f"write --workers {len(by_process)} or more, or start fewer processes."
        )
        raise ValueError(msg)
    shares = [len(part) for part in np.array_split(np.arange(workers), len(by_process))]
    if any(share > len(own) for share, own in zip(shares, by_process)):
        have = [len(own) for own in by_process]
        msg = (
            f"--workers {workers}: the processes have {have} devices; write {sum(have)} or fewer. "
            "(Without --workers a resumed training has the number of its run folder.)"
        )
        raise ValueError(msg)
    chosen = [own[k] for own, share in zip(by_process, shares) for k in range(share)]
    return jax.make_mesh((workers,), (WORKERS,), (AxisType.Auto,), devices=chosen)


# ---------------------------------------------------------------------------------- the methods


def rows_of(problem: Problem, mesh: Mesh) -> Callable[[int], dict[str, Any]]:
    """`(round) -> {"x": [workers, J, B, ...], "y": [workers, J, B]}`, own rows only."""
    sharding, shape = NamedSharding(mesh, P(WORKERS)), problem.train["x"].shape[1:]

    def batch(round):
        index = problem.samples(round)
        x: Any = lambda i: problem.inputs(problem.train, index[i[0]])
        y: Any = lambda i: problem.train["y"][index[i[0]]]
        return {
            "x": jax.make_array_from_callback((*index.shape, *shape), sharding, x),
            "y": jax.make_array_from_callback(index.shape, sharding, y),
        }

    return batch


def _method(problem, mesh, param_specs, body, check_vma):
    """From a round `(params, opt_state, round, batch) -> params, opt_state, metrics`."""
    optimizer, sizes = problem.optimizer(), getattr(problem.net, "sizes", {})
    divided = any(spec != P() for spec in _leaves(param_specs))
    state_axes = psjax.ist.state_axes(optimizer, problem.axes, problem.like)
    if divided:
        opt_specs = psjax.ist.store_specs(state_axes, sizes, WORKERS)
    else:
        opt_specs = jax.tree.map(lambda _: P(), state_axes, is_leaf=_is_spec)
    specs = {"params": param_specs, "opt_state": opt_specs, "round": P()}
    step = plans.jitted(body, mesh, specs, P(WORKERS), P(WORKERS), check_vma)
    plan = {"method": problem.config.method, "workers": mesh.size, "sharded": divided}
    return Method(mesh, specs, optimizer, step, rows_of(problem, mesh), plan)


def _replicated(make_update):
    """Every worker holds the whole network."""

    def make(problem, mesh):
        update = make_update(problem.loss_fn(problem.net), problem.optimizer(), axis_name=WORKERS)

        def body(params, opt_state, _, batch):
            return update(params, opt_state, psjax.replicas(params, 1), batch)

        specs = jax.tree.map(lambda _: P(), problem.axes, is_leaf=_is_spec)
        return _method(problem, mesh, specs, body, check_vma=False)

    return make


def _subnets(problem, mesh):
    """Each worker holds 1/n of the weights and trains a subnet a round."""
    config, n = problem.config, mesh.size
    if config.model != "mlp":
        msg = f"--method ist --model {config.model}: its layers are not divided; write --model mlp."
        raise ValueError(msg)
    if config.width % n**2:
        msg = (
            f"--method ist --width {config.width}: {n} workers need a multiple of {n * n}; write "
            f"--width {-(-config.width // n**2) * n * n}, or another number of --workers."
        )
        raise ValueError(msg)
    axes, sizes = problem.axes, problem.net.sizes
    loss_fn = problem.loss_fn(problem.net.subnet(n))
    exchange = psjax.ist.exchange(psjax.local_update(loss_fn, problem.optimizer()), WORKERS)

    def body(params, opt_state, round, batch):
        selection = psjax.ist.membership(config.seed, round, axes, sizes, n, stratified=True)
        return exchange(params, opt_state, selection, batch)

    specs = psjax.ist.store_specs(axes, sizes, WORKERS)
    return _method(problem, mesh, specs, body, check_vma=True)


def _by_class(make_step):
    """Weights in shards by class: plans, and score exchange.

    The store's arrays are padded to the number of workers, so a checkpoint holds the whole trees:
    while one is made, every process has them.
    """

    def make(problem, mesh):
        optimizer, store = problem.optimizer(), plans.make_store(problem, mesh)
        loss_and_grad, batch, text, batch_spec = make_step(problem, mesh, store)
        step, specs = plans.step_fn(loss_and_grad, optimizer, store, mesh, batch_spec)
        axes = psjax.ist.state_axes(optimizer, problem.axes, problem.like)
        opt_like = jax.eval_shape(optimizer.init, problem.like)

        def saved(state):
            opt_state = store.whole(state["opt_state"], opt_like, axes)
            return {**state, "params": store.whole(state["params"]), "opt_state": opt_state}

        def loaded(state):
            opt_state = store.shard(state["opt_state"], axes)
            return {**state, "params": store.shard(state["params"]), "opt_state": opt_state}

        on_host = lambda fn: lambda tree: jax.tree.map(np.asarray, fn(tree))
        where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_is_spec)
        return Method(
            mesh,
            specs,
            optimizer,
            step,
            batch,
            {"method": problem.config.method, "workers": mesh.size, "sharded": True, **text},
            on_host(store.shard),
            on_host(store.whole),
            jax.jit(saved, out_shardings=NamedSharding(mesh, P())),
            jax.jit(loaded, out_shardings=where),
        )

    return make


def _is_spec(x):
    return isinstance(x, P)


def _leaves(specs):
    return jax.tree.leaves(specs, is_leaf=_is_spec)


TABLE: dict[str, Callable[[Problem, Mesh], Method]] = {
    "data-parallel": _replicated(psjax.baselines.data_parallel),
    "local-sgd": _replicated(psjax.baselines.local_sgd),
    "ist": _subnets,
    "score-exchange": _by_class(plans.by_scores),
    **dict.fromkeys(sorted(PLANS), _by_class(plans.by_plan)),
}
