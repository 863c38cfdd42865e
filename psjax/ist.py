r"""Independent subnet training: membership by round, calibration, diagnostics.

B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent
Subnet Training*, arXiv:1910.02120. A round is `psjax.local_update` over `membership(...)`::

    net = psjax.models.MLP(num_classes=10, hidden=(512, 512))
    small = net.subnet(4)

    def loss_fn(params, batch):
        scores = small.apply({"params": params}, batch["x"], train=True)
        return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()

    update = psjax.local_update(loss_fn, optimizer)
    for round in range(rounds):
        selection = psjax.ist.membership(seed, round, axes, net.sizes, num_subnets=4)
        params, opt_state, metrics = update(params, opt_state, selection, batches)  # [4, J, ...]
    statistics = psjax.ist.calibrate(net, params, sample)
    scores = net.apply({"params": params, "batch_stats": statistics}, x)
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.tree_util import keystr

from psjax._check_subnets import check_subnets as check_subnets
from psjax._partition import random_partition
from psjax._selection import Selection
from psjax._separable import element_value_and_grad
from psjax._store import exchange as exchange
from psjax._store import state_axes as state_axes
from psjax._store import store_specs as store_specs


def membership(
    seed: Any,
    round: Any,
    axes: Any,
    sizes: Mapping[str, int],
    num_subnets: int,
    stratified: bool = False,
) -> Selection:
    """The subnets of one round, from `(seed, round)` alone: every worker derives the same.

    Section 4.4: no index travels, for all workers share the generator.

    Args:
      seed: integer, or an integer array; may be traced.
      round: number of the round; the same number gives the same subnets.
      axes: tree of `PartitionSpec`s, as in `psjax.select`.
      sizes: `{axis name: neurons}` of the axes to divide, such as `psjax.models.MLP.sizes`.
      num_subnets: n.
      stratified: see `psjax.random_partition`.
    """
    key = jax.random.fold_in(jax.random.key(seed), round)
    return random_partition(key, axes, sizes, num_elements=num_subnets, stratified=stratified)


def calibrate(model: Any, params: Any, batches: Any, **kwargs: Any) -> Any:
    r"""Mean and variance of every `psjax.nn.SubnetNorm`'s input in the whole network.

    Section 5: before deployment $\mu$ and $\sigma$ of each neuron are computed over a small subset
    of the training data with the whole network. Layer by layer: the statistics of a layer are those
    of its inputs once all layers before it use theirs, so that there are as many passes over the
    batches as layers of normalisation. What follows only shared leaves and the first divided layer
    has whole inputs in a subnet too: with one hidden layer, and scores that are not normalised,
    there is nothing to correct but the noise of running averages. Normalised scores, like a second
    layer, have all neurons for inputs, of which a subnet has a share.

    It replaces the statistics of `init` and those of training, which a model takes for its own.

    Args:
      model: a module whose call without `train=True` predicts.
      params: of the whole network.
      batches: samples `[K, B, ...]`, K batches of B, or a tuple of such arrays, the model's
        positional arguments. Activations are those of one batch at a time; the statistics are
        pooled, those of the K * B samples.
      **kwargs: further arguments of the model's call.

    Returns:
      The collection `batch_stats`. Nothing is compiled here; call it inside a `jax.jit` of yours.

    Raises:
      ValueError: a model without `SubnetNorm`, or no batch.
    """
    batches = batches if isinstance(batches, tuple) else (batches,)
    for x in batches:
        if jnp.ndim(x) < 2 or not x.shape[0]:
            msg = f"calibrate(batches=...): got shape {jnp.shape(x)}; write [K, B, ...], K >= 1."
            raise ValueError(msg)
    init = lambda *args: nn.unbox(model.init(jax.random.key(0), *args, **kwargs))
    shapes = jax.eval_shape(init, *(x[0] for x in batches))
    if not shapes.get("batch_stats"):
        msg = f"calibrate({type(model).__name__}): it has no psjax.nn.SubnetNorm to calibrate."
        raise ValueError(msg)
    stats = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes["batch_stats"])

    def moments(args):
        variables = {"params": params, "batch_stats": stats}
        return model.apply(variables, *args, mutable=["moments"], **kwargs)[1].get("moments", {})

    def pool(mean, var, count):
        weight = (count / jnp.sum(count))[:, None]
        pooled = jnp.sum(weight * mean, axis=0)
        return pooled, jnp.sum(weight * (var + (mean - pooled) ** 2), axis=0)

    is_norm = lambda node: isinstance(node, Mapping) and "mean" in node
    num_norms = len(jax.tree.leaves(stats, is_leaf=is_norm))
    for _ in range(num_norms):  # each pass settles at least one layer more
        found = jax.lax.map(moments, batches)
        if _norm_paths(found, is_norm) != _norm_paths(stats, is_norm):
            odd = sorted(_norm_paths(found, is_norm) ^ _norm_paths(stats, is_norm))
            msg = (
                f"calibrate({type(model).__name__}): 'batch_stats' has {', '.join(odd)}, which no "
                "psjax.nn.SubnetNorm computes; write SubnetNorm in the place of BatchNorm."
            )
            raise ValueError(msg)
        stats = jax.tree.map(
            lambda m: dict(zip(("mean", "var"), pool(m["mean"], m["var"], m["count"]))),
            found,
            is_leaf=is_norm,
        )
    return stats


def _norm_paths(tree, is_norm):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_norm)
    return {keystr(path) for path, _ in leaves}


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


class ScaleByAdamState(NamedTuple):
    """Moments, and the steps that each entry has taken."""

    count: Any
    mu: Any
    nu: Any


def scale_by_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""`optax.scale_by_adam` with a count per entry, int32 of the shape of the parameters.

    An entry between two divided layers is held by a subnet in one round of n. Its moments are zero
    when it is held first, and with one count for all they are then corrected for steps that it did
    not take: late in a training its k-th step, along a constant gradient, is
    $(1 - b_1^k) / \sqrt{1 - b_2^k}$ learning rates long instead of 1: 3.2 at once, 6.5 after ten
    steps, 6.6 at most with Adam's usual decays. With a count per entry the steps are those of Adam
    on what the entry has seen; it costs one more integer a weight, which travels too.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.

    Example:
      >>> import optax, psjax
      >>> optimizer = optax.chain(psjax.ist.scale_by_adam(), optax.scale_by_learning_rate(1e-3))
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        count = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.int32), params)
        return ScaleByAdamState(count, zeros, zeros)

    def update(updates, state, params=None):
        del params
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state.nu, updates)
        count = jax.tree.map(lambda n: n + 1, state.count)

        def step(m, v, n):
            first, second = (1 - b ** n.astype(m.dtype) for b in (b1, b2))
            return (m / first) / (jnp.sqrt(v / second) + eps)

        return jax.tree.map(step, mu, nu, count), ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def non_finite(selection: Selection, metrics: Any) -> str | None:
    """A line that names the subnets a round left out for NaN or Inf, or None: for the host.

    Args:
      selection: that of the round, whole `[E]` or as `split` divided it, `[devices, E / devices]`.
      metrics: the round's, of the same leading shape.

    Raises:
      ValueError: other shapes.
    """
    finite, valid = np.asarray(metrics.finite), np.asarray(selection.valid)
    if finite.shape != valid.shape:
        msg = (
            f"non_finite: metrics.finite has shape {finite.shape} but the selection "
            f"{valid.shape}; give the selection that the round was called with."
        )
        raise ValueError(msg)
    bad = np.flatnonzero(~finite & valid).tolist()  # split keeps the order, its padding is last
    if not bad:
        return None
    return (
        f"subnets {bad} became NaN or Inf; their weights and optimizer state were left out and are "
        "as before the round."
    )


__all__ = (
    "GradientBias",
    "ScaleByAdamState",
    "calibrate",
    "check_subnets",
    "exchange",
    "gradient_bias",
    "membership",
    "non_finite",
    "scale_by_adam",
    "state_axes",
    "store_specs",
)
