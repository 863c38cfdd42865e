"""A dense layer that can be divided among subnets, and a normalisation for subnets."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Num

from psjax._types import AnyArray
from psjax.nn._annotate import annotated


class SubnetDense(nn.Module):
    """Dense layer whose inputs and outputs may be divided among subnets.

    `[B, in] -> [B, features]`. The parameters are those of `flax.linen.Dense`, `kernel`
    `[in, features]` and `bias` `[features]`, with one exception: if only the outputs are divided,
    the layer has `kernel_transposed` `[features, in]` instead of `kernel`, because rows move
    between subnets several times faster than columns. To import weights into such a layer, pass
    the transpose. He-normal kernel, zero bias.

    Attributes:
      features: number of outputs.
      in_axis, out_axis: names of the axes of inputs and outputs; None if they are not divided.
      use_bias: whether to add a bias. It is not needed before a normalisation, which has a shift.

    Raises:
      ValueError: the parameters have `kernel` instead of `kernel_transposed`.
    """

    features: int
    in_axis: str | None = None
    out_axis: str | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Num[AnyArray, "... in"]):
        name, init = "kernel", nn.initializers.he_normal()
        names, shape = (self.in_axis, self.out_axis), (x.shape[-1], self.features)
        rows_first = self.in_axis is None and self.out_axis is not None
        if rows_first:
            self._refuse_kernel()
            name, init = "kernel_transposed", nn.initializers.he_normal(in_axis=-1, out_axis=-2)
            names, shape = names[::-1], shape[::-1]
        kernel = self.param(name, annotated(init, *names), shape)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (int(rows_first),)), ((), ())))
        if not self.use_bias:
            return y
        return y + self.param(
            "bias", annotated(nn.initializers.zeros, self.out_axis), (self.features,)
        )

    def _refuse_kernel(self):
        if self.has_variable("params", "kernel"):
            msg = (
                f"SubnetDense {'/'.join(self.path)}: the parameters have 'kernel', but only the "
                f"outputs of this layer are divided ({self.out_axis!r}); pass its transpose "
                "[features, in] as 'kernel_transposed'."
            )
            raise ValueError(msg)


class SubnetNorm(nn.Module):
    r"""Batch normalisation of each neuron by itself, for subnets: $(x - \mu) / \sigma$.

    `[..., features] -> [..., features]`. In training, $\mu$ and $\sigma$ are those of the batch; in
    prediction, those that `psjax.ist.calibrate` computes with the whole network. They differ,
    because a neuron has fewer inputs in a subnet (section 5 of B. Yuan, A. Kyrillidis,
    C. Jermaine, *Distributed Learning of Neural Networks using Independent Subnet Training*,
    arXiv:1910.02120).

    As in `flax.linen.BatchNorm`, statistics are over all axes except the last, with the variance of
    the population. There are two differences: parameters and statistics carry the axis of the
    neurons, so that a subnet gets its part of them, and a missing statistic is an error.

    `init` fills `batch_stats` with mean 0 and variance 1. Predicting with these values raises no
    error but does not normalise; pass the result of `psjax.ist.calibrate`.

    Attributes:
      axis: name of the axis that subnets divide; None if every subnet has all features.
      use_scale, use_bias: whether a scale and a shift are learned.
      momentum: momentum of the running averages. They are updated only if the caller makes the
        collection `batch_stats` mutable, and they are those of a subnet.
      epsilon: added to the variance.
    """

    axis: str | None = None
    use_scale: bool = True
    use_bias: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Num[AnyArray, "... in"], train: bool):
        """Normalise by the batch if `train`, else by the collection `batch_stats`.

        Raises:
          ValueError: `batch_stats` lacks a mean or a variance in prediction.
        """
        if self.is_mutable_collection("moments") and not self.is_initializing():
            if self.has_variable("moments", "mean"):
                msg = (
                    f"SubnetNorm {'/'.join(self.path)}: called twice in one pass, but it has one "
                    "mean and variance; make one SubnetNorm for each place."
                )
                raise ValueError(msg)
            mean, var = _moments(x)
            count = jnp.asarray(x.size // x.shape[-1], x.dtype)
            for name, value in (("mean", mean), ("var", var), ("count", count)):
                self.put_variable("moments", name, value)
        mean, var = self._train(x) if train else self._predict(x)
        shape = (x.shape[-1],)
        scale = jnp.reciprocal(jnp.sqrt(var + self.epsilon))
        if self.use_scale:
            scale = scale * self.param("scale", annotated(nn.initializers.ones, self.axis), shape)
        y = (x - mean) * scale
        if self.use_bias:
            y = y + self.param("bias", annotated(nn.initializers.zeros, self.axis), shape)
        return y

    def _running(self, features: int):
        """The running mean and variance, created if they do not exist."""
        return [
            self.variable("batch_stats", name, annotated(init, self.axis), None, (features,))
            for name, init in (("mean", nn.initializers.zeros), ("var", nn.initializers.ones))
        ]

    def _train(self, x: Num[AnyArray, "... in"]):
        moments = _moments(x)
        if self.is_mutable_collection("batch_stats"):
            for running, new in zip(self._running(x.shape[-1]), moments):
                if not self.is_initializing():
                    old: Any = running.value
                    running.value = self.momentum * old + (1 - self.momentum) * new
        return moments

    def _predict(self, x: Num[AnyArray, "... in"]):
        missing = [x for x in ("mean", "var") if not self.has_variable("batch_stats", x)]
        if missing and not self.is_initializing():
            msg = (
                f"SubnetNorm {'/'.join(self.path)}: prediction (train=False) needs statistics of "
                f"the whole network, and 'batch_stats' has no {' and no '.join(missing)} here; "
                "pass variables = {'params': params, "
                "'batch_stats': psjax.ist.calibrate(model, params, batches)}."
            )
            raise ValueError(msg)
        mean, var = (running.value for running in self._running(x.shape[-1]))
        return mean, var


def _moments(x: Num[AnyArray, "... in"]):
    over = tuple(range(x.ndim - 1))
    return jnp.mean(x, axis=over), jnp.var(x, axis=over)
