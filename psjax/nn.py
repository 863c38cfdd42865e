"""Layers whose class groups are axes of their own, so that one gather takes a sub-network.

Every kernel of a grouped layer has the group axis first, `[groups, ..., features]`, annotated
with `flax.linen.with_partitioning`; `flax.linen.get_partition_spec` therefore returns the `axes`
tree that `psjax.select` wants. A sub-network of `m` groups is the same module with `groups=m`.

The layers are those of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize
partitioned neural network training*, G-2023-36, section 5.2; `features` counts the outputs of
**one** group, where the paper counts all groups together.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from psjax._norm import SubnetNorm as SubnetNorm
from psjax._norm import annotated


def conv(x, kernel, bias=None, *, pool: int = 1, implementation: str | None = None):
    r"""Convolution ('VALID', stride 1) and, folded into it, average pooling.

    A convolution followed by the mean over `pool x pool` windows is one convolution with the mean
    of the shifted kernels and stride `pool`: a 5x5 kernel and 2x2 pooling are a 6x6 kernel with
    stride 2, 36 products an output where the plain form has 100. The result is that of
    `avg_pool(conv(x) + bias)` (pooling windows that do not fit are dropped, as in Flax's 'VALID').

    Args:
      x: images `[batch, height, width, in]`.
      kernel: `[kernel_height, kernel_width, in, out]`, of the dtype of `x`.
      bias: `[out]`, or None.
      pool: side of the pooling window, 1 for none.
      implementation: `"native"` calls XLA's convolution; `"patches"` cuts the image into patches
        by slices and multiplies once by a matrix, which inside a `lax.scan` on the CPU is 5 to 18
        times faster. None: patches on the CPU, native elsewhere, decided when XLA compiles.

    Returns:
      `[batch, (height - kernel_height + 1) // pool, (width - kernel_width + 1) // pool, out]`.

    Raises:
      ValueError: if the shapes do not fit or no output is left.
    """
    _check_conv(x, kernel, pool, implementation)
    if implementation is None:
        y = jax.lax.platform_dependent(x, kernel, cpu=_patches(pool), default=_native(pool))
    else:
        y = {"native": _native, "patches": _patches}[implementation](pool)(x, kernel)
    return y if bias is None else y + bias


def _check_conv(x, kernel, pool, implementation):
    call = f"conv(x={jnp.shape(x)}, kernel={jnp.shape(kernel)}, pool={pool})"
    if implementation not in (None, "native", "patches"):
        msg = f"{call}: implementation={implementation!r}; write 'native', 'patches' or None."
        raise ValueError(msg)
    if jnp.ndim(x) != 4 or jnp.ndim(kernel) != 4 or x.shape[3] != kernel.shape[2]:
        msg = f"{call}: x is [batch, height, width, in] and kernel [height, width, in, out]."
        raise ValueError(msg)
    if pool < 1 or any((n - k + 1) // pool < 1 for n, k in zip(x.shape[1:3], kernel.shape[:2])):
        msg = f"{call}: nothing is left of the image; write a smaller kernel or pooling window."
        raise ValueError(msg)


def _native(pool):
    """XLA's convolution with stride `pool` and the mean of the `pool**2` shifted kernels."""

    def apply(x, kernel):
        shifts = [(i, j) for i in range(pool) for j in range(pool)]
        pads = [((i, pool - 1 - i), (j, pool - 1 - j), (0, 0), (0, 0)) for i, j in shifts]
        folded = sum(jnp.pad(kernel, pad) for pad in pads) / pool**2
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, folded, (pool, pool), "VALID", dimension_numbers=dims
        )

    return apply


def _patches(pool):
    """Blocks of `pool x pool` pixels become channels of one; then stride 1, slices, one product."""

    def apply(x, kernel):
        kh, kw, channels, features = kernel.shape
        gh, gw = ((k + 2 * (pool - 1)) // pool for k in (kh, kw))  # blocks the folded kernel spans
        rows, cols = ((n - k + 1) // pool for n, k in zip(x.shape[1:3], (kh, kw)))
        height, width = (rows + gh - 1) * pool, (cols + gw - 1) * pool
        x = x[:, :height, :width]
        x = jnp.pad(x, [(0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)])
        x = x.reshape(-1, rows + gh - 1, pool, cols + gw - 1, pool, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, *x.shape[1:4:2], pool**2 * channels)
        parts = [x[:, i : i + rows, j : j + cols] for i in range(gh) for j in range(gw)]
        # The kernel is folded by one product with a constant and kept as [features, taps]: pads,
        # transposes, and a product with the patches transposed, cost an element half its time.
        fold = jnp.asarray(_fold_matrix(kh, kw, pool), kernel.dtype)
        taps = kernel.reshape(kh * kw, channels, features)
        matrix = jnp.einsum("fk,kco->ofc", fold, taps).reshape(features, -1)
        return jnp.einsum("bhwk,ok->bhwo", jnp.concatenate(parts, axis=-1), matrix)

    return apply


def _fold_matrix(kh, kw, pool):
    """From the kernel's taps to those of the folded one, in the order of the patches' channels."""
    gh, gw = ((k + 2 * (pool - 1)) // pool for k in (kh, kw))
    fold = np.zeros((gh, gw, pool, pool, kh, kw))
    for a, b, i, j in itertools.product(range(kh), range(kw), range(pool), range(pool)):
        (r, u), (c, v) = divmod(a + i, pool), divmod(b + j, pool)
        fold[r, c, u, v, a, b] += 1 / pool**2
    return fold.reshape(gh * gw * pool**2, kh * kw)


@jax.custom_jvp
def sigmoid(x):
    """The logistic function; its derivative is written so that XLA's CPU backend computes it once.

    Value and derivative are those of `jax.nn.sigmoid`, whose cotangent `g * (y * (1 - y))` is fused
    into every consumer, the patch sums before it included, and computed again in each. As
    `g * y - (g * y) * y` it is materialised where `g` would be dear, which is XLA's choice and not
    a promise; an MNIST PSNet's step at batch 20 went from 1.9 to 1.2 ms.
    """
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    y = sigmoid(*primals)
    (g,) = tangents
    return y, g * y - (g * y) * y


def split_groups(x, num_groups: int):
    """Divide the last axis among groups: `[..., features]` to `[..., num_groups, features/group]`.

    Raises:
      ValueError: if `num_groups` does not divide the last axis (section 5.2: it must).
    """
    features = x.shape[-1]
    if num_groups < 1 or features % num_groups:
        msg = (
            f"split_groups(x, num_groups={num_groups}): the last axis of x has {features} features,"
            f" which {num_groups} groups cannot share evenly; write a multiple of {num_groups}."
        )
        raise ValueError(msg)
    return x.reshape(*x.shape[:-1], num_groups, features // num_groups)


def _check_groups(layer, x, rank, shape):
    if jnp.ndim(x) != rank or x.shape[-2] != layer.groups:
        msg = (
            f"{type(layer).__name__}(groups={layer.groups}): x has shape {jnp.shape(x)}, but must "
            f"be {shape} with {layer.groups} groups; split_groups(x, {layer.groups}) divides a "
            "plain layer's output."
        )
        raise ValueError(msg)


def _glorot(**axes) -> Callable[..., Any]:
    return nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", **axes)


# The fans of a fan-out layer are those of the whole plain layer that it is; a separable layer's
# groups are small dense layers, each with its own.
_plain_init = _glorot()
_fan_out_init = _glorot(in_axis=-2, out_axis=(0, -1))
_separable_init = _glorot(batch_axis=(0,))
_zeros = nn.initializers.zeros


def _grouped(init, axis: str, rank: int) -> Callable[..., Any]:
    """An initializer whose array is annotated with the group axis first."""
    return annotated(init, axis, *[None] * (rank - 1))


class Conv(nn.Module):
    """Plain convolution shared by all groups, pooling folded in.

    `[B, H, W, in] -> [B, h, w, features]`. Its parameters are annotated with no
    axis: every sub-network holds them whole. See `conv`.
    """

    features: int
    kernel_size: tuple[int, int] = (5, 5)
    pool: int = 1
    implementation: str | None = None

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", _plain_init, (*self.kernel_size, x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv(x, kernel, bias, pool=self.pool, implementation=self.implementation)


class Dense(nn.Module):
    """Plain dense layer shared by all groups: `[..., in] -> [..., features]`."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", _plain_init, (x.shape[-1], self.features))
        return x @ kernel + self.param("bias", nn.initializers.zeros, (self.features,))


class FanOutConv(nn.Module):
    """Convolution from all inputs to each group: `[B, H, W, in] -> [B, h, w, groups, features]`.

    Kernel `[groups, kernel_height, kernel_width, in, features]`, bias `[groups, features]`, both
    annotated with `axis` first. It is a plain convolution of `groups * features` kernels; the
    paper's PSNet has one as its last convolution.
    """

    groups: int
    features: int
    kernel_size: tuple[int, int] = (5, 5)
    pool: int = 1
    axis: str = "class"
    implementation: str | None = None

    @nn.compact
    def __call__(self, x):
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
    def __call__(self, x):
        _check_groups(self, x, 5, "[batch, height, width, groups, in]")
        shape = (self.groups, *self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", _grouped(_separable_init, self.axis, len(shape)), shape)
        bias = self.param("bias", _grouped(_zeros, self.axis, 2), (self.groups, self.features))
        # One convolution a group, unrolled: vmap over kernels is a grouped convolution, whose
        # gradient is up to 40 times slower on the CPU.
        parts = [
            conv(x[..., g, :], kernel[g], pool=self.pool, implementation=self.implementation)
            for g in range(self.groups)
        ]
        return jnp.stack(parts, axis=-2) + bias


class FanOutDense(nn.Module):
    """Dense layer from all inputs to each group: `[B, in] -> [B, groups, features]`.

    Kernel `[groups, in, features]`, bias `[groups, features]`, both annotated with `axis` first.
    It is a plain dense layer of `groups * features` outputs.
    """

    groups: int
    features: int
    axis: str = "class"

    @nn.compact
    def __call__(self, x):
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
      axis: name of the groups' axis.
      in_axis, out_axis: names of the inputs and outputs of a group, where subnets divide them.
    """

    groups: int
    features: int
    axis: str = "class"
    in_axis: str | None = None
    out_axis: str | None = None

    @nn.compact
    def __call__(self, x):
        _check_groups(self, x, 3, "[batch, groups, in]")
        shape = (self.groups, x.shape[-1], self.features)
        names = self.axis, self.in_axis, self.out_axis
        kernel = self.param("kernel", annotated(_separable_init, *names), shape)
        bias_init = annotated(_zeros, self.axis, self.out_axis)
        bias = self.param("bias", bias_init, (self.groups, self.features))
        return jnp.einsum("bgi,gio->bgo", x, kernel) + bias


class SubnetDense(nn.Module):
    """Dense layer whose inputs and outputs may be divided among subnets.

    `[B, in] -> [B, features]`. The kernel is `[in, features]`, but `[features, in]` where only the
    outputs are divided: rows of a kernel move between subnets faster than its columns. He-normal
    kernel, zero bias.

    Attributes:
      features: number of outputs.
      in_axis, out_axis: names of the divided axes; None for what every subnet holds whole.
      use_bias: whether to add a bias; a normalisation that follows has its own shift.
    """

    features: int
    in_axis: str | None = None
    out_axis: str | None = None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        rows_first = self.in_axis is None and self.out_axis is not None
        names, shape = (self.in_axis, self.out_axis), (x.shape[-1], self.features)
        init = nn.initializers.he_normal(in_axis=-2, out_axis=-1)
        if rows_first:
            names, shape = names[::-1], shape[::-1]
            init = nn.initializers.he_normal(in_axis=-1, out_axis=-2)
        kernel = self.param("kernel", annotated(init, *names), shape)
        y = jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (int(rows_first),)), ((), ())))
        if not self.use_bias:
            return y
        return y + self.param("bias", annotated(_zeros, self.out_axis), (self.features,))


def flatten_groups(x):
    """`[batch, height, width, groups, features] -> [batch, groups, height * width * features]`."""
    x = jnp.moveaxis(x, -2, 1)
    return x.reshape(*x.shape[:2], -1)


__all__: Sequence[str] = (
    "Conv",
    "Dense",
    "FanOutConv",
    "FanOutDense",
    "SeparableConv",
    "SeparableDense",
    "SubnetDense",
    "SubnetNorm",
    "conv",
    "flatten_groups",
    "sigmoid",
    "split_groups",
)
