"""`calibrate`: statistics for every normalisation, before the whole network predicts."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.tree_util import keystr
from jaxtyping import Array, PyTree


def calibrate(model: Any, params: Any, batches: Any, **kwargs: Any) -> Any:
    r"""Compute the `batch_stats` of the whole network: mean and variance for each `SubnetNorm`.

    Call it after training and predict with its result, as in section 5 of arXiv:1910.02120, where
    $\mu$ and $\sigma$ of each neuron are computed over a small subset of the training data. It
    replaces the statistics of `init` and of training: a model would accept these, but they are not
    those of the whole network.

    The statistics of a layer are those of its inputs when all earlier layers use theirs, so there
    are as many passes over the batches as normalisations. A layer whose inputs are whole in every
    subnet (it follows shared leaves and the first divided layer only) has nothing to correct except
    the noise of running averages. A later layer, and normalised scores, see all neurons in the
    whole network but only a share of them in a subnet.

    Args:
      model: a module that predicts if it is called without `train=True`.
      params: parameters of the whole network.
      batches: samples `[K, B, ...]`, K batches of B, or a tuple of such arrays as the model's
        positional arguments. Memory is needed for the activations of one batch at a time; the
        statistics are pooled over all K * B samples.
      **kwargs: further arguments of the model's call.

    Returns:
      The collection `batch_stats`. Nothing is compiled here; call it inside your own `jax.jit`.

    Raises:
      ValueError: the model has no `SubnetNorm`, or there is no batch.
    """
    batches = batches if isinstance(batches, tuple) else (batches,)
    for x in batches:
        if jnp.ndim(x) < 2 or not x.shape[0]:
            msg = f"calibrate(batches=...): got shape {jnp.shape(x)}; pass [K, B, ...], K >= 1."
            raise ValueError(msg)
    init = lambda *args: nn.unbox(model.init(jax.random.key(0), *args, **kwargs))
    shapes = jax.eval_shape(init, *(x[0] for x in batches))
    if not shapes.get("batch_stats"):
        msg = f"calibrate({type(model).__name__}): it has no psjax.nn.SubnetNorm to calibrate."
        raise ValueError(msg)
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["batch_stats"])

    def moments(args: tuple[Any, ...]):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, *args, mutable=["moments"], **kwargs)[1].get("moments", {})

    def pool(mean: Array, var: Array, count: Array):
        weight = (count / jnp.sum(count))[:, None]
        pooled = jnp.sum(weight * mean, axis=0)
        return pooled, jnp.sum(weight * (var + (mean - pooled) ** 2), axis=0)

    is_norm = lambda node: isinstance(node, Mapping) and "mean" in node
    num_norms = len(jax.tree.leaves(stats, is_leaf=is_norm))
    for _ in range(num_norms):  # each pass settles at least one more layer
        found = jax.lax.map(moments, batches)
        if _norm_paths(found, is_norm) != _norm_paths(stats, is_norm):
            odd = sorted(_norm_paths(found, is_norm) ^ _norm_paths(stats, is_norm))
            msg = (
                f"calibrate({type(model).__name__}): 'batch_stats' has {', '.join(odd)}, which no "
                "psjax.nn.SubnetNorm computes; use SubnetNorm in the place of BatchNorm."
            )
            raise ValueError(msg)
        stats = jax.tree.map(
            lambda m: dict(zip(("mean", "var"), pool(m["mean"], m["var"], m["count"]))),
            found,
            is_leaf=is_norm,
        )
    return stats


def _norm_paths(tree: PyTree, is_norm: Callable[[Any], bool]):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_norm)
    return {keystr(path) for path, _ in leaves}
