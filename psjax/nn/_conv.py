"""Convolution with average pooling, and the logistic function, for the papers' networks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from psjax._types import AnyArray


def conv(
    x: Float[AnyArray, "batch height width in"],
    kernel: Float[AnyArray, "kernel_height kernel_width in out"],
    bias: Float[AnyArray, " out"] | None = None,
    *,
    pool: int = 1,
    implementation: str | None = None,
):
    r"""Convolution ('VALID', stride 1), followed by average pooling, in one step.

    The result equals `avg_pool(conv(x) + bias)`, where pooling windows that do not fit are dropped
    (Flax's 'VALID'). It is computed as one convolution with the mean of the shifted kernels and
    stride `pool`. A 5x5 kernel with 2x2 pooling becomes a 6x6 kernel with stride 2, which takes 36
    products per output instead of 100.

    Args:
      x: images `[batch, height, width, in]`.
      kernel: `[kernel_height, kernel_width, in, out]`, of the dtype of `x`.
      bias: `[out]`, or None.
      pool: side of the pooling window, 1 for none.
      implementation: `"native"` calls XLA's convolution. `"patches"` cuts the image into patches
        and multiplies them by a matrix, which is much faster inside a `lax.scan` on the CPU. None:
        patches on the CPU and native elsewhere, decided when XLA compiles.

    Returns:
      `[batch, (height - kernel_height + 1) // pool, (width - kernel_width + 1) // pool, out]`.

    Raises:
      ValueError: if the shapes do not fit or no output is left.
    """
    _check_conv(x, kernel, pool, implementation)
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    if implementation is None:
        y = jax.lax.platform_dependent(x, kernel, cpu=_patches(pool), default=_native(pool))
    else:
        y = {"native": _native, "patches": _patches}[implementation](pool)(x, kernel)
    return y if bias is None else y + bias


def _check_conv(
    x: Shaped[AnyArray, "..."],
    kernel: Shaped[AnyArray, "..."],
    pool: int,
    implementation: str | None,
):
    call = f"conv(x={jnp.shape(x)}, kernel={jnp.shape(kernel)}, pool={pool})"
    if implementation not in (None, "native", "patches"):
        msg = f"{call}: implementation={implementation!r}; pass 'native', 'patches' or None."
        raise ValueError(msg)
    if jnp.ndim(x) != 4 or jnp.ndim(kernel) != 4 or x.shape[3] != kernel.shape[2]:
        msg = f"{call}: x is [batch, height, width, in] and kernel [height, width, in, out]."
        raise ValueError(msg)
    if pool < 1 or any((n - k + 1) // pool < 1 for n, k in zip(x.shape[1:3], kernel.shape[:2])):
        msg = f"{call}: nothing is left of the image; pass a smaller kernel or pooling window."
        raise ValueError(msg)


def _native(pool: int):
    """XLA's convolution with stride `pool` and the mean of the `pool**2` shifted kernels."""

    def apply(
        x: Float[Array, "batch height width in"],
        kernel: Float[Array, "kernel_height kernel_width in out"],
    ):
        shifts = [(i, j) for i in range(pool) for j in range(pool)]
        pads = [((i, pool - 1 - i), (j, pool - 1 - j), (0, 0), (0, 0)) for i, j in shifts]
        folded = jnp.asarray(sum(jnp.pad(kernel, pad) for pad in pads)) / pool**2
        dims = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, folded, (pool, pool), "VALID", dimension_numbers=dims
        )

    return apply


def _patches(pool: int):
    """Turn blocks of `pool x pool` pixels into channels; then stride 1, slices and one product.

    Inside a `lax.scan` on the CPU, this is 5 to 18 times faster than `_native`.
    """

    def apply(
        x: Float[Array, "batch height width in"],
        kernel: Float[Array, "kernel_height kernel_width in out"],
    ):
        kh, kw, channels, features = kernel.shape
        gh, gw = ((k + 2 * (pool - 1)) // pool for k in (kh, kw))  # blocks the folded kernel spans
        rows, cols = ((n - k + 1) // pool for n, k in zip(x.shape[1:3], (kh, kw)))
        height, width = (rows + gh - 1) * pool, (cols + gw - 1) * pool
        x = x[:, :height, :width]
        x = jnp.pad(x, [(0, 0), (0, height - x.shape[1]), (0, width - x.shape[2]), (0, 0)])
        # One dimension at a time: on Explicit meshes, JAX refuses a reshape that splits two.
        batch, blocks = x.shape[0], (rows + gh - 1, cols + gw - 1)
        x = x.reshape(batch, blocks[0], pool, width, channels)
        x = x.reshape(batch, blocks[0], pool, blocks[1], pool, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, *blocks, pool**2 * channels)
        parts = [x[:, i : i + rows, j : j + cols] for i in range(gh) for j in range(gw)]
        # One product with a constant folds the kernel, which is kept as [features, taps]. With pads
        # and transposes, and a product with transposed patches, an element takes twice as long.
        fold = jnp.asarray(_fold_matrix(kh, kw, pool), kernel.dtype)
        taps = kernel.reshape(kh * kw, channels, features)
        matrix = jnp.einsum("fk,kco->ofc", fold, taps).reshape(features, -1)
        return jnp.einsum("bhwk,ok->bhwo", jnp.concatenate(parts, axis=-1), matrix)

    return apply


def _fold_matrix(kh: int, kw: int, pool: int):
    """The matrix from a kernel's taps to the folded kernel's, in the order of patch channels."""
    gh, gw = ((k + 2 * (pool - 1)) // pool for k in (kh, kw))
    fold = np.zeros((gh, gw, pool, pool, kh, kw))
    for a, b, i, j in itertools.product(range(kh), range(kw), range(pool), range(pool)):
        (r, u), (c, v) = divmod(a + i, pool), divmod(b + j, pool)
        fold[r, c, u, v, a, b] += 1 / pool**2
    return fold.reshape(gh * gw * pool**2, kh * kw)


@jax.custom_jvp
def sigmoid(x: Float[ArrayLike, "*shape"]):
    """The logistic function, equal to `jax.nn.sigmoid` but with a faster derivative on the CPU."""
    # XLA fuses the cotangent of `jax.nn.sigmoid`, `g * (y * (1 - y))`, into every consumer (and the
    # patch sums before it) and computes it again in each. It tends to compute `g * y - (g * y) * y`
    # once. A step of an MNIST PSNet at batch 20 went from 1.9 to 1.2 ms.
    return jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals: tuple[Array], tangents: tuple[Array]):
    y = sigmoid(*primals)
    (g,) = tangents
    return y, g * y - (g * y) * y
