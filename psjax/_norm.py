"""Batch normalisation of a subnet while it trains, of the whole network once it is calibrated."""

import jax.numpy as jnp
from flax import linen as nn


class SubnetNorm(nn.Module):
    r"""Batch normalisation over whatever neurons the (sub)network has: $(x - \mu) / \sigma$.

    Section 5 of B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using
    Independent Subnet Training*, arXiv:1910.02120: a neuron has fewer inputs in a subnet than in
    the whole network, so each is normalised by its own statistics: while training by the batch's,
    at prediction by those that `psjax.ist.calibrate` computes with the whole network.

    `[..., features] -> [..., features]`, statistics over all axes but the last, the variance that
    of the population, as in `flax.linen.BatchNorm`. Differences to it: parameters and statistics
    carry the axis of the neurons, so that they travel with a subnet; a missing statistic is an
    error.

    Attributes:
      axis: name of the axis that subnets divide; None where every subnet has all features.
      use_scale, use_bias: whether a scale and a shift are learned.
      momentum: of the running averages, which are updated only where the caller makes the
        collection `batch_stats` mutable. They are a subnet's; see `psjax.ist.calibrate`.
      epsilon: added to the variance.
    """

    axis: str | None = None
    use_scale: bool = True
    use_bias: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, train: bool):
        """Normalise by the batch if `train`, else by the collection `batch_stats`.

        Raises:
          ValueError: prediction without statistics.
        """
        shape, over = (x.shape[-1],), tuple(range(x.ndim - 1))
        if (
            not train
            and not self.is_initializing()
            and not self.has_variable("batch_stats", "mean")
        ):
            msg = (
                f"SubnetNorm {'/'.join(self.path)}: prediction (train=False) needs statistics of "
                "the whole network, and there is no 'batch_stats' collection; write variables = "
                "{'params': params, 'batch_stats': psjax.ist.calibrate(model, params, batches)}."
            )
            raise ValueError(msg)
        moments = self.is_mutable_collection("moments") and not self.is_initializing()
        if train or moments:
            mean, var = jnp.mean(x, axis=over), jnp.var(x, axis=over)
        if moments:
            count = jnp.asarray(x.size // x.shape[-1], x.dtype)
            for name, value in (("mean", mean), ("var", var), ("count", count)):
                self.put_variable("moments", name, value)
        running = None
        if self.has_variable("batch_stats", "mean") or self.is_mutable_collection("batch_stats"):
            annotated = lambda init: nn.with_partitioning(init, (self.axis,))
            zeros, ones = annotated(nn.initializers.zeros), annotated(nn.initializers.ones)
            running = (
                self.variable("batch_stats", "mean", zeros, None, shape),
                self.variable("batch_stats", "var", ones, None, shape),
            )
        if train and running and self.is_mutable_collection("batch_stats"):
            if not self.is_initializing():
                for old, new in zip(running, (mean, var)):
                    old.value = self.momentum * old.value + (1 - self.momentum) * new
        if not train:
            mean, var = (r.value for r in running)
        scale = jnp.reciprocal(jnp.sqrt(var + self.epsilon))
        if self.use_scale:
            ones = nn.with_partitioning(nn.initializers.ones, (self.axis,))
            scale = scale * self.param("scale", ones, shape)
        y = (x - mean) * scale
        if self.use_bias:
            zeros = nn.with_partitioning(nn.initializers.zeros, (self.axis,))
            y = y + self.param("bias", zeros, shape)
        return y
