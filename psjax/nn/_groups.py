"""Layers shared by all class groups, and layers with one group of outputs per class."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Num, Shaped

from psjax._types import AnyArray
from psjax.nn._annotate import annotated
from psjax.nn._conv import conv


def split_groups(x: Shaped[AnyArray, "... features"], num_groups: int):
    """Divide the last axis among groups: `[..., features]` to `[..., num_groups, features/group]`.

    Raises:
      ValueError: `num_groups` does not divide the last axis.
    """
    features = x.shape[-1]
    if num_groups < 1 or features % num_groups:
        msg = (
            f"split_groups(x, num_groups={num_groups}): the last axis of x has {features} features,"
            f" which {num_groups} groups cannot share evenly; pass a multiple of {num_groups}."
        )
        raise ValueError(msg)
    return x.reshape(*x.shape[:-1], num_groups, features // num_groups)


def _check_groups(layer: "SeparableDense | SeparableConv", x: AnyArray, rank: int, shape: str):
    if jnp.ndim(x) != rank or x.shape[-2] != layer.groups:
        msg = (
            f"{type(layer).__name__}(groups={layer.groups}): x has shape {jnp.shape(x)}, but must "
            f"be {shape} with {layer.groups} groups; split_groups(x, {layer.groups}) divides a "
            "plain layer's output."
        )
        raise ValueError(msg)


def _glorot(**axes: int | tuple[int, ...]) -> Callable[..., Any]:
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", **axes)


# A fan-out layer is initialised as the plain layer that it equals. The groups of a separable layer
# are initialised one by one, as small dense layers.
_plain_init = _glorot()
_fan_out_init = _glorot(in_axis=-2, out_axis=(0, -1))
_separable_init = _glorot(batch_axis=(0,))
_zeros = nn.initializers.zeros


def _grouped(init: Callable[..., Any], axis: str, rank: int) -> Callable[..., Any]:
    """An initializer whose array is annotated with the group axis first."""
    return annotated(init, axis, *[None] * (rank - 1))


class Conv(nn.Module):
    """Plain convolution shared by all groups, with average pooling as in `conv`.

    `[B, H, W, in] -> [B, h, w, features]`. Its parameters have no named axis: every sub-network has
    all of them.
    """

    features: int
    kernel_size: tuple[int, int] = (5, 5)
    pool: int = 1
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        kernel = self.param("kernel", _plain_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv(x, kernel, bias, pool=self.pool, implementation=self.implementation)


class Dense(nn.Module):
    """Plain dense layer shared by all groups: `[..., in] -> [..., features]`."""

    features: int

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        kernel = self.param("kernel", _plain_init, (x.shape[-1], self.features))
        return x @ kernel + self.param("bias", nn.initializers.zeros, (self.features,))


class FanOutConv(nn.Module):
    """Convolution from all inputs to each group: `[B, H, W, in] -> [B, h, w, groups, features]`.

    Kernel `[groups, kernel_height, kernel_width, in, features]`, bias `[groups, features]`, both
    annotated with `axis` first. It computes what a plain convolution with `groups * features`
    kernels does. The last convolution of the paper's PSNet is one.
    """

    groups: int
    features: int
    kernel_size: tuple[int, int] = (5, 5)
    pool: int = 1
    axis: str = "class"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        shape = (self.groups, *self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _grouped(_fan_out_init, self.axis, len(shape)), shape)
        bias = self.param("bias", _grouped(_zeros, self.axis, 2), (self.groups, self.features))
        whole = jnp.moveaxis(kernel, 0, -2).reshape(*shape[1:4], -1)
        y = conv(x, whole, bias.ravel(), pool=self.pool, implementation=self.implementation)
        return split_groups(y, self.groups)


class SeparableConv(nn.Module):
    """Convolution from each group to its counterpart.

    `[B, H, W, groups, in] -> [B, h, w, groups, features]`. Kernel
    `[groups, kernel_height, kernel_width, in, features]`, bias `[groups, features]`, both annotated
    with `axis` first.
    """

    groups: int
    features: int
    kernel_size: tuple[int, int] = (5, 5)
    pool: int = 1
    axis: str = "class"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        _check_groups(self, x, 5, "[batch, height, width, groups, in]")
        shape = (self.groups, *self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _grouped(_separable_init, self.axis, len(shape)), shape)
        bias = self.param("bias", _grouped(_zeros, self.axis, 2), (self.groups, self.features))
        # One convolution per group, unrolled: `vmap` over kernels gives a grouped convolution, and
        # its gradient is up to 40 times slower on the CPU.
        parts = [
            conv(x[..., g, :], kernel[g], pool=self.pool, implementation=self.implementation)
            for g in range(self.groups)
        ]
        return jnp.stack(parts, axis=-2) + bias


class FanOutDense(nn.Module):
    """Dense layer from all inputs to each group: `[B, in] -> [B, groups, features]`.

    Kernel `[groups, in, features]`, bias `[groups, features]`, both annotated with `axis` first.
    It computes what a plain dense layer with `groups * features` outputs does.
    """

    groups: int
    features: int
    axis: str = "class"

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        shape = (self.groups, x.shape[-1], self.features)
        kernel = self.param("kernel", _grouped(_fan_out_init, self.axis, len(shape)), shape)
        bias = self.param("bias", _grouped(_zeros, self.axis, 2), (self.groups, self.features))
        whole = jnp.moveaxis(kernel, 0, 1).reshape(x.shape[-1], -1)
        return split_groups(x @ whole, self.groups) + bias


class SeparableDense(nn.Module):
    """Dense layer from each group to its counterpart: `[B, groups, in] -> [B, groups, features]`.

    Kernel `[groups, in, features]`, bias `[groups, features]`, both annotated with `axis` first:
    `groups` times fewer weights than a dense layer (section 5.2, figure 2).

    Attributes:
      groups: number of groups.
      features: outputs of one group.
      axis: name of the axis of the groups.
      in_axis, out_axis: names of the axes of a group's inputs and outputs, if subnets divide them.
    """

    groups: int
    features: int
    axis: str = "class"
    in_axis: str | None = None
    out_axis: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        _check_groups(self, x, 3, "[batch, groups, in]")
        shape = (self.groups, x.shape[-1], self.features)
        names = self.axis, self.in_axis, self.out_axis
        kernel = self.param("kernel", annotated(_separable_init, *names), shape)
        bias_init = annotated(_zeros, self.axis, self.out_axis)
        bias = self.param("bias", bias_init, (self.groups, self.features))
        return jnp.einsum("bgi,gio->bgo", x, kernel) + bias


def flatten_groups(x: Shaped[AnyArray, "batch height width groups features"]):
    """`[B, height, width, groups, features] -> [B, groups, height * width * features]`."""
    x = jnp.moveaxis(x, -2, 1)
    return x.reshape(*x.shape[:2], -1)
