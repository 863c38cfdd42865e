"""How the gradient that subnets see differs from the whole network's."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psjax._selection import Selection
from psjax._separable import element_value_and_grad


class GradientBias(NamedTuple):
    """How the mean subnet gradient differs from the whole gradient; trees of scalars, a leaf each.

    NaN where the whole gradient is zero, as of a bias before a normalisation.

    Attributes:
      cosine: of the angle between them.
      norm_ratio: norm of the mean subnet gradient over that of the whole gradient.
      distance: norm of the difference over that of the whole gradient.
    """

    cosine: Any
    norm_ratio: Any
    distance: Any


def gradient_bias(
    loss_fn: Callable[..., Any],
    subnet_loss_fn: Callable[..., Any],
    params: Any,
    selections: Iterable[Selection],
    batch: Any,
) -> GradientBias:
    r"""The method's bias: the subnets' mean gradient against the whole network's, layer by layer.

    E. Shulgin, P. Richtarik, *Towards a Better Theoretical Understanding of Independent Subnetwork
    Training*, arXiv:2306.16484: outside interpolation it does not vanish. The mean is over the
    draws, and over the holders of an entry within a draw; where nobody holds an entry it counts as
    0. In a linear network with h hidden layers, under a loss linear in the scores, the mean of all
    draws is the whole gradient times $n^{1 - h}$ in every layer: cosine 1, and the norm ratio and
    distance that follow.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar` of the whole network.
      subnet_loss_fn: the same of a subnet.
      params: of the whole network.
      selections: one `Selection` a draw.
      batch: the same samples for all.
    """
    whole = jax.grad(loss_fn)(params, batch)
    zeros = jax.tree.map(jnp.zeros_like, params)
    stacked_grads = element_value_and_grad(subnet_loss_fn)
    total, draws = zeros, 0
    for selection in selections:
        grads = selection.scatter_mean(stacked_grads(params, selection, batch)[1], zeros)
        total, draws = jax.tree.map(jnp.add, total, grads), draws + 1
    if not draws:
        msg = "gradient_bias(selections=...): no selection; give one for every draw."
        raise ValueError(msg)
    mean = jax.tree.map(lambda x: x / draws, total)
    norm = lambda x: jnp.linalg.norm(jnp.ravel(x))
    cosine = jax.tree.map(lambda a, b: jnp.vdot(a, b) / (norm(a) * norm(b)), mean, whole)
    ratio = jax.tree.map(lambda a, b: norm(a) / norm(b), mean, whole)
    distance = jax.tree.map(lambda a, b: norm(a - b) / norm(b), mean, whole)
    return GradientBias(cosine, ratio, distance)
