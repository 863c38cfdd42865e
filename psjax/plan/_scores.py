"""Score exchange: the weights of classes stay with their owners, and scores are exchanged."""

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
    r"""Value and gradient of any loss of all scores, with the classes spread over the workers.

    Each worker computes the scores of its own classes for the whole batch. The scores, B x C
    numbers, are gathered, so that every worker has the exact loss and its derivatives. The loss may
    be any function of the scores, and the weights of a class are never sent. In contrast to a
    partially-separable plan, every worker needs all samples, and a step contains a round trip.

    Args:
      scores_fn: `scores_fn(params, batch) -> [B, m]`, the model with m = ceil(C / W) classes.
      loss_fn: `loss_fn(scores, batch) -> scalar` of all scores `[B, C]`, a mean over the batch.
      store: the `psjax.plan.Store` of the weights.
      axis_name: name of the mapped axis, of size W.
      codec: as in `psjax.plan.value_and_grad`, for the gradient of the common weights; scores are
        not encoded.

    Returns:
      A function `(shards, batch, key=None) -> (value, grads)` for the inside of your
      `jax.shard_map`, `jax.pmap` or `jax.vmap`, like that of `psjax.plan.value_and_grad`, except
      that every worker gets the same whole `batch`. The loss is the **sum** of the workers' values:
      add them with `jax.lax.psum`.

    Raises:
      ValueError: the codec has error feedback. At the call: the shards do not fit the store, or the
        scores have another shape.
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
                f"the {store.num_classes} classes: pass [B, {m}]."
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
