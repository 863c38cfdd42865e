r"""A step of a plan: fetch the weights of a task, evaluate it, return gradients to the owners."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from psjax._placement import vary
from psjax._types import AxisName, Batch, Params
from psjax.codec._reduce import check_codec, wire_of
from psjax.plan._pack import pack, unpack
from psjax.plan._plan import Plan
from psjax.plan._routes import Routes
from psjax.plan._store import Store


def value_and_grad(
    element_fn: Callable[..., Any], plan: Any, store: Store, axis_name: str, codec: Any = None
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient of a partially-separable loss by a plan, with the weights in shards.

    In every turn, a worker fetches the classes of its task from their owners, evaluates the task,
    and returns the gradients. The owners add them: $\sum_e U_e^\top g_e$.

    The common weights are fetched by one all-gather per step, and their gradients returned by one
    all-to-all. Classes are fetched by `ppermute`, one per distance between owner and worker, or by
    one `all_to_all` if that sends no more. `Table` says how much is sent.

    Args:
      element_fn: `element_fn(params, batch, pairs)` returns a scalar. `params` is the tree of a
        model with s classes, `batch` has leaves `[l, S, ...]`, and `pairs` is bool `[l, s]` for
        (label, other), as `psjax.losses.block` takes it. Elements are added.
      plan: a `Plan`.
      store: a `Store` for the same numbers of workers and classes.
      axis_name: name of the mapped axis, of size W.
      codec: a `psjax.codec.Codec` in which gradients return, such as `psjax.codec.int8()`; the
        weights that a task fetches are not encoded. None: gradients as they are.

    Returns:
      A function `(shards, batch, key=None) -> (value, grads)` for the inside of your
      `jax.shard_map`, `jax.pmap` or `jax.vmap`: `shards` are this worker's rows of the store's
      arrays, `batch` its part `[T, l, S, ...]` of `Plan.batches`, and `grads` the whole gradient of
      its rows. `value` is the sum over **this worker's** tasks: `jax.lax.psum` it. The key is for a
      codec's stochastic rounding, another one in every step; None rounds to the nearest.

    Raises:
      ValueError: plan and store differ in the number of workers or classes, or the codec has error
        feedback. At the call: the mapped axis has another size, or the batches do not begin with
        `[T, l]`.
    """
    if (plan.num_workers, plan.num_classes) != (store.num_workers, store.num_classes):
        msg = (
            f"value_and_grad(plan, store): the plan is for {plan.num_workers} workers and "
            f"{plan.num_classes} classes, the store for {store.num_workers} and "
            f"{store.num_classes}; make both for the same."
        )
        raise ValueError(msg)
    check_codec("plan.value_and_grad", codec)
    routes = Routes(plan, store)

    def fn(shards: Params, batch: Batch, key: Any = None):
        wire = wire_of(codec, axis_name, key)
        _check_call(plan, store, shards, batch, axis_name)
        me = jax.lax.axis_index(axis_name)
        leaves, treedef = jax.tree.flatten(shards)
        places = store.class_leaves
        shards_like = [leaves[i] for i in places]
        task_like = [
            jax.ShapeDtypeStruct((plan.block_size, *x.shape[1:]), x.dtype) for x in shards_like
        ]
        own, common = pack(shards_like), store.fetch_common(shards, axis_name)
        value = jnp.zeros((), jnp.result_type(*(x.dtype for x in leaves)))
        init = jax.tree.map(jnp.zeros_like, (value, own, common))
        own, common, init = vary((own, common, init), (me, batch))

        def turn(carry: PyTree, xs: PyTree):
            value, totals, common_totals = carry
            tables, pairs, batch, turn_wire = xs
            held = [routes.fetch(tables, x, axis_name) for x in own]
            operands = list(common)
            for i, x in zip(places, unpack(held, task_like)):
                operands[i] = store.of_classes(i, x, plan.block_size)
            loss, grads = jax.value_and_grad(
                lambda operands: element_fn(treedef.unflatten(operands), batch, pairs)
            )(operands)
            back = pack([store.by_class(i, grads[i], plan.block_size) for i in places])
            give = lambda g, x: routes.give_back(tables, g, x, axis_name, turn_wire)
            totals = [give(g, x) for g, x in zip(back, totals)]
            common_totals = [
                None if total is None else total + g for total, g in zip(common_totals, grads)
            ]
            return (value + loss, totals, common_totals), None

        tables = jax.tree.map(lambda x: jnp.take(jnp.asarray(x), me, axis=1), routes.tables)
        wires = None if wire is None else wire.split(plan.num_turns)
        xs = (tables, jnp.asarray(plan.pairs)[me], batch, wires)
        if plan.num_turns == 1:
            carry, _ = turn(init, jax.tree.map(lambda x: x[0], xs))
        else:
            carry, _ = jax.lax.scan(turn, init, xs)
        value, totals, common_totals = carry
        grads = store.return_common(common_totals, axis_name, wire)
        for i, g in zip(places, unpack(totals, shards_like)):
            grads[i] = g
        return value, treedef.unflatten(grads)

    return fn


def _check_call(plan: Plan, store: Store, shards: Params, batch: Batch, axis_name: AxisName | None):
    size = jax.lax.axis_size(axis_name)
    if size != store.num_workers:
        msg = (
            f"plan.value_and_grad: the axis {axis_name!r} has {size} workers, the plan "
            f"{store.num_workers}."
        )
        raise ValueError(msg)
    store.check("plan.value_and_grad", shards)
    lead = plan.pairs.shape[1:3]
    for path, x in jax.tree_util.tree_leaves_with_path(batch):
        if x.shape[:2] != lead:
            msg = (
                f"plan.value_and_grad: batch{jax.tree_util.keystr(path)} has shape {x.shape}; it "
                f"must begin with [turns, labels] = {list(lead)}: this worker's part of "
                "Plan.batches."
            )
            raise ValueError(msg)
