"""How the gradient that subnets see differs from the whole network's."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from psjax._selection import Selection
from psjax._separable import element_value_and_grad


class GradientBias(NamedTuple):
    """How the mean subnet gradient differs from the whole gradient: trees of one scalar per leaf.

    NaN where the whole gradient is zero, such as for a bias before a normalisation.

    Attributes:
      cosine: cosine of the angle between the two.
      norm_ratio: norm of the mean subnet gradient, divided by the norm of the whole gradient.
      distance: norm of their difference, divided by the norm of the whole gradient.
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
    r"""Compare the mean gradient of the subnets with the gradient of the whole network, per leaf.

    The difference is the bias of independent subnet training. It does not vanish outside
    interpolation (E. Shulgin, P. Richtarik, *Towards a Better Theoretical Understanding of
    Independent Subnetwork Training*, arXiv:2306.16484). The mean is over the draws and, within a
    draw, over the subnets that have an entry; an entry that no subnet has counts as 0.

    A case for comparison: for a linear network with h hidden layers and a loss that is linear in
    the scores, the mean over all draws is the whole gradient times $n^{1 - h}$ in every layer. The
    cosine is then 1.

    Args:
      loss_fn: `loss_fn(params, batch) -> scalar` of the whole network.
      subnet_loss_fn: the same function of a subnet.
      params: parameters of the whole network.
      selections: one `Selection` per draw.
      batch: the samples, the same for all.
    """
    whole = jax.grad(loss_fn)(params, batch)
    zeros = jax.tree.map(jnp.zeros_like, params)
    stacked_grads = element_value_and_grad(subnet_loss_fn)
    total, draws = zeros, 0
    for selection in selections:
        grads = selection.scatter_mean(stacked_grads(params, selection, batch)[1], zeros)
        total, draws = jax.tree.map(jnp.add, total, grads), draws + 1
    if not draws:
        msg = "gradient_bias(selections=...): there is no selection; pass one per draw."
        raise ValueError(msg)
    mean = jax.tree.map(lambda x: x / draws, total)
    norm = lambda x: jnp.linalg.norm(jnp.ravel(x))
    cosine = jax.tree.map(lambda a, b: jnp.vdot(a, b) / (norm(a) * norm(b)), mean, whole)
    ratio = jax.tree.map(lambda a, b: norm(a) / norm(b), mean, whole)
    distance = jax.tree.map(lambda a, b: norm(a - b) / norm(b), mean, whole)
    return GradientBias(cosine, ratio, distance)
