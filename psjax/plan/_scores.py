"""Score exchange: class groups stay where they are, the workers exchange scores."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psjax._placement import vary
from psjax._types import Batch, Params
from psjax.codec._reduce import check_codec, wire_of
from psjax.plan._store import Store


def score_exchange(
    scores_fn: Callable[..., Any],
    loss_fn: Callable[..., Any],
    store: Store,
    axis_name: str,
    codec: Any = None,
) -> Callable[..., tuple[jax.Array, Any]]:
    r"""Value and gradient of any loss of all scores, the class groups spread over the workers.

    Each worker computes the scores of its own classes for the whole batch; the scores, B x C
    numbers, are gathered, so that everybody has the loss and its derivative with respect to every
    score, exactly, whatever the loss. The weights of a class never move. What it needs and a
    partially-separable plan does not: every worker all samples, and a round trip inside the step.

    Args:
      scores_fn: `scores_fn(params, batch) -> [B, m]`, of the model with m = ceil(C / W) classes.
      loss_fn: `loss_fn(scores, batch) -> scalar`, of all scores `[B, C]`; the whole batch's mean.
      store: the `psjax.plan.Store` of the weights.
      axis_name: name of the mapped axis, of size W.
      codec: as in `psjax.plan.value_and_grad`, for the gradient of the common weights; scores are
        not encoded.

    Returns:
      A function `(shards, batch, key=None) -> (value, grads)` for the inside of your
      `jax.shard_map`, `jax.pmap` or `jax.vmap`, like that of `psjax.plan.value_and_grad`, but that
      every worker gets the same whole `batch`. The values of the workers **add** to the loss:
      `jax.lax.psum` them.

    Raises:
      ValueError: error feedback; at the call, shards that are not the store's, or scores of another
        shape.
    """
    check_codec("score_exchange", codec)

    def fn(shards: Params, batch: Batch, key: Any = None):
        store.check("score_exchange", shards)
        me = jax.lax.axis_index(axis_name)
        W, m = store.rows.shape
        leaves, treedef = jax.tree.flatten(shards)
        common = store.fetch_common(shards, axis_name)
        operands: list[Any] = list(common)
        for i in store.class_leaves:
            operands[i] = store.of_classes(i, leaves[i], m)
        operands = vary(operands, (me, batch))
        own, vjp = jax.vjp(lambda xs: scores_fn(treedef.unflatten(xs), batch), operands)
        if own.ndim != 2 or own.shape[1] != m:
            msg = (
                f"score_exchange(scores_fn): got scores of shape {own.shape}; a worker has {m} of "
                f"the {store.num_classes} classes: write [B, {m}]."
            )
            raise ValueError(msg)
        everyone = jax.lax.all_gather(own, axis_name)  # [W, B, m]
        places = np.argsort(store.rows.ravel(), kind="stable")[: store.num_classes]

        def whole(everyone: Any):
            scores = jnp.moveaxis(everyone, 0, 1).reshape(own.shape[0], W * m)[:, places]
            return loss_fn(scores, batch)

        value, back = jax.value_and_grad(whole)(everyone)
        (grads,) = vjp(jax.lax.dynamic_index_in_dim(back, me, 0, keepdims=False))
        out = store.return_common(
            [None if x is None else g for x, g in zip(common, grads)],
            axis_name,
            wire_of(codec, axis_name, key),
        )
        for i in store.class_leaves:
            out[i] = store.by_class(i, grads[i], m)
        return jnp.where(me == 0, value, 0), treedef.unflatten(out)

    return fn
