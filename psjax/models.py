r"""LeNet and PSNet, MLP and VGG11, with the papers' presets.

P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural network
training*, G-2023-36, sections 5 and 7, describe LeNet and PSNet. Here they have the form that the
authors ran: a sigmoid after every layer except the last, in the order convolution, bias, average
pooling, sigmoid; Xavier-uniform kernels and zero biases.

Both are Flax modules, and their parameters have the `class` axis. The sub-network behind a set of
`m` scores is the same module with `m` classes, `model.clone(num_classes=m)`, applied to the
gathered weights:

>>> import flax, jax, jax.numpy as jnp, psjax
>>> net = psjax.models.psnet("digits")
>>> images = jnp.zeros((5, 8, 8, 1))  # [batch, height, width, channels]
>>> variables = jax.jit(net.init)(jax.random.key(0), images)
>>> params = flax.linen.unbox(variables)["params"]
>>> axes = flax.linen.get_partition_spec(variables)["params"]
>>> stacked = psjax.select(axes, {"class": [[3, 7]]}, like=params).gather(params)
>>> element = jax.tree.map(lambda x: x[0], stacked)
>>> jax.jit(net.clone(num_classes=2).apply)({"params": element}, images).shape
(5, 2)

MLP, VGG11 and SparseMLP are those of B. Yuan, A. Kyrillidis, C. Jermaine, *Distributed Learning of
Neural Networks using Independent Subnet Training*, arXiv:1910.02120, section 6. The axes of the
hidden dense layers are `hidden_0`, `hidden_1`, .... The subnet of one of n workers is
`model.subnet(n)`, applied to the gathered weights.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Float, Integer, Num

from psjax import _public, losses
from psjax import nn as psnn
from psjax._types import AnyArray
from psjax.nn._annotate import annotated

__all__ = ["LeNet", "MLP", "PSNet", "SparseMLP", "VGG11", "lenet", "psnet"]
__dir__ = _public.listing(globals())


class PSNet(nn.Module):
    """Partitioned network (section 5.3): shared convolutions, then one group of layers per class.

    `[batch, height, width, channels] -> scores [batch, num_classes]`.

    Attributes:
      num_classes: number of class groups, C.
      trunk: number of kernels of each shared convolution; may be empty (the ideal network of
        section 5.3).
      fan_out: kernels **per class** in the convolution from all channels to each class.
      hidden: neurons **per class** in each separable dense layer before the last. Their axes are
        `hidden_0`, `hidden_1`, ...; `psjax.random_partition` can divide them.
      kernel_sizes, pools: side of the kernel and of the pooling window of every convolution, first
        those of the trunk and then that of the fan-out.
      implementation: see `psjax.nn.conv`.
    """

    num_classes: int = 10
    trunk: tuple[int, ...] = (40,)
    fan_out: int = 3
    hidden: tuple[int, ...] = (24, 15)
    kernel_sizes: tuple[int, ...] = (5, 5)
    pools: tuple[int, ...] = (2, 2)
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        sizes = [(k, k) for k in self.kernel_sizes]
        for i, features in enumerate(self.trunk):
            layer = psnn.Conv(features, sizes[i], self.pools[i], self.implementation)
            x = psnn.sigmoid(layer(x))
        x = psnn.FanOutConv(
            self.num_classes,
            self.fan_out,
            sizes[-1],
            self.pools[-1],
            implementation=self.implementation,
        )(x)
        x = psnn.flatten_groups(psnn.sigmoid(x))
        before = None
        for i, features in enumerate(self.hidden):
            names = {"in_axis": before, "out_axis": f"hidden_{i}"}
            x = psnn.sigmoid(psnn.SeparableDense(self.num_classes, features, **names)(x))
            before = f"hidden_{i}"
        return psnn.SeparableDense(self.num_classes, 1, in_axis=before)(x)[..., 0]


class LeNet(nn.Module):
    """The paper's LeNet: two convolutions and three dense layers; only the last is split by class.

    `[batch, height, width, channels] -> scores [batch, num_classes]`.

    Attributes:
      num_classes: number of scores, C.
      kernels: kernels of each convolution.
      hidden: neurons of each dense layer before the last.
      kernel_sizes, pools: side of the kernel and of the pooling window of each convolution.
      implementation: see `psjax.nn.conv`.
    """

    num_classes: int = 10
    kernels: tuple[int, ...] = (6, 16)
    hidden: tuple[int, ...] = (120, 84)
    kernel_sizes: tuple[int, ...] = (5, 5)
    pools: tuple[int, ...] = (2, 2)
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."]):
        for features, k, pool in zip(self.kernels, self.kernel_sizes, self.pools):
            x = psnn.sigmoid(psnn.Conv(features, (k, k), pool, self.implementation)(x))
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = psnn.sigmoid(psnn.Dense(features)(x))
        return psnn.FanOutDense(self.num_classes, 1)(x)[..., 0]


class _Divided(nn.Module):
    """A model whose hidden dense layers are divided among subnets."""

    def subnet(self, num_subnets: int):
        """The same module with the share of one of n subnets, `ceil(width / n)` per hidden layer.

        Raises:
          ValueError: a layer has fewer neurons than there are subnets.
        """
        hidden: tuple[int, ...] = self.hidden  # pyright: ignore[reportAttributeAccessIssue]
        least = min(hidden, default=0)
        if not 1 <= num_subnets <= least:
            msg = (
                f"subnet({num_subnets}): the hidden layers have {hidden} neurons; pass a number "
                f"of subnets from 1 to {least}, or wider layers."
            )
            raise ValueError(msg)
        return self.clone(hidden=tuple(-(-width // num_subnets) for width in hidden))

    @property
    def sizes(self) -> dict[str, int]:
        """`{axis name: neurons}` of the divided axes, for `psjax.random_partition`."""
        hidden: tuple[int, ...] = self.hidden  # pyright: ignore[reportAttributeAccessIssue]
        return {f"hidden_{i}": width for i, width in enumerate(hidden)}


class MLP(_Divided):
    """Dense layers, each followed by subnet normalisation and an activation, and an output layer.

    `[B, ...] -> scores [B, num_classes]`; further axes of the input are flattened.

    Attributes:
      num_classes: number of scores.
      hidden: neurons of each hidden layer.
      normalize: whether to normalise. Without it the layers have biases, and a network trained in
        subnets fails when it is put together (section 5).
      use_scale, use_bias: whether the normalisation has a scale and a shift.
      normalize_output: whether to normalise the scores, too, without scale and shift, as the
        paper's public code does. The output then has no bias.
      dropout: rate after every hidden layer, with the key `dropout`.
    """

    num_classes: int = 10
    hidden: tuple[int, ...] = (512,)
    normalize: bool = True
    use_scale: bool = True
    use_bias: bool = True
    normalize_output: bool = False
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."], train: bool = False):
        return _dense_layers(self, x.reshape(x.shape[0], -1), train)


class VGG11(_Divided):
    """VGG11 with normalisation (Simonyan, Zisserman, arXiv:1409.1556), for 32x32 images.

    `[B, height, width, channels] -> scores [B, num_classes]`. The dense layers on top are divided
    among subnets. Every subnet has all convolutions, and they are averaged (section 4.3).

    Attributes:
      num_classes: number of scores.
      convolutions: number of 3x3 kernels of each layer; 0 stands for max pooling over 2x2.
      hidden: neurons of each hidden dense layer.
      dropout: rate after every hidden dense layer.
      implementation: see `psjax.nn.conv`.
    """

    num_classes: int = 100
    convolutions: tuple[int, ...] = (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
    hidden: tuple[int, ...] = (4096, 4096)
    normalize: bool = True
    use_scale: bool = True
    use_bias: bool = True
    normalize_output: bool = False
    dropout: float = 0.0
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Num[AnyArray, "..."], train: bool = False):
        init = nn.initializers.he_normal()
        for i, features in enumerate(self.convolutions):
            if not features:
                x = nn.max_pool(x, (2, 2), (2, 2))
                continue
            kernel = self.param(f"convolution_{i}", init, (3, 3, x.shape[-1], features))
            x = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
            x = psnn.conv(x, kernel, implementation=self.implementation)
            x = nn.relu(psnn.SubnetNorm(None)(x, train))
        return _dense_layers(self, x.reshape(x.shape[0], -1), train)


def _dense_layers(self, x: Num[AnyArray, "B F"], train: bool):
    before = None
    for i, features in enumerate(self.hidden):
        axis = f"hidden_{i}"
        x = psnn.SubnetDense(features, before, axis, use_bias=not self.normalize)(x)
        if self.normalize:
            x = psnn.SubnetNorm(axis, self.use_scale, self.use_bias)(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        before = axis
    x = psnn.SubnetDense(self.num_classes, before, None, use_bias=not self.normalize_output)(x)
    if self.normalize_output:
        x = psnn.SubnetNorm(None, use_scale=False, use_bias=False)(x, train)
    return x


class SparseMLP(_Divided):
    """Two layers for sparse features and very many labels (the paper's Amazon-670k network).

    The input layer sums embedding rows, `sum_k values[b, k] * embedding[ids[b, k]]`, so that no
    dense batch of all features is needed. The loss goes through the labels in chunks.

    Attributes:
      num_labels: number of labels, L.
      num_features: number of features, F. The id F is padding; others outside [0, F) give NaN.
      hidden: `(neurons,)`, the width of the one hidden layer, the embedding dimension.
      use_scale, use_bias: whether the normalisation has a scale and a shift.
      chunk_size: labels per chunk in `loss` and `top_k`.
    """

    num_labels: int = 10
    num_features: int = 10
    hidden: tuple[int, ...] = (512,)
    use_scale: bool = True
    use_bias: bool = True
    chunk_size: int = 8192

    def setup(self):
        (width,) = self.hidden
        embedding = annotated(nn.initializers.he_normal(), None, "hidden_0")
        kernel = annotated(nn.initializers.he_normal(), "hidden_0", None)
        self.embedding = self.param("embedding", embedding, (self.num_features, width))
        self.norm = psnn.SubnetNorm("hidden_0", self.use_scale, self.use_bias)
        self.kernel = self.param("kernel", kernel, (width, self.num_labels))
        self.bias = self.param("bias", nn.initializers.zeros, (self.num_labels,))

    def _features(self, ids: Integer[AnyArray, "B K"], values: Float[AnyArray, "B K"], train: bool):
        rows = jnp.asarray(self.embedding).at[ids].get(mode="fill", fill_value=0)
        bad = (ids < 0) | (ids > self.num_features)  # F itself is padding
        x = jnp.einsum("bk,bkh->bh", jnp.where(bad, jnp.nan, values), rows)
        return nn.relu(self.norm(x, train))

    def __call__(
        self, ids: Integer[AnyArray, "B K"], values: Float[AnyArray, "B K"], train: bool = False
    ):
        """All scores, `[B, L]`, from `ids` int32 `[B, K]` and `values` `[B, K]`."""
        return self._features(ids, values, train) @ self.kernel + self.bias

    def loss(
        self,
        ids: Integer[AnyArray, "B K"],
        values: Float[AnyArray, "B K"],
        labels: Integer[AnyArray, "B M"],
        train: bool = True,
    ):
        """The loss of every row, `[B]`; see `psjax.losses.many_label_cross_entropy`."""
        x = self._features(ids, values, train)
        return losses.many_label_cross_entropy(
            x, self.kernel, self.bias, labels, chunk_size=self.chunk_size
        )

    def top_k(self, ids: Integer[AnyArray, "B K"], values: Float[AnyArray, "B K"], k: int):
        """The k labels with the highest scores for every row, int32 `[B, k]`."""
        x = self._features(ids, values, False)
        return losses.top_k_labels(x, self.kernel, self.bias, k, chunk_size=self.chunk_size)


# (trunk, fan-out, hidden): kernels and neurons of all classes together, as the paper counts them.
_PSNET = {
    "digits": ((20,), 40, (160,), (3, 2), (2, 1)),
    "mnist": ((40,), 30, (240, 150), (5, 5), (2, 2)),
    "mnist-53780": ((40,), 30, (350, 150), (5, 5), (2, 2)),
    "cifar10": ((60,), 30, (350, 150), (5, 5), (2, 2)),
}
_LENET = {
    "digits": ((6, 16), (40, 28), (3, 2), (2, 1)),
    "mnist": ((6, 16), (120, 84), (5, 5), (2, 2)),
    "cifar10": ((6, 16), (200, 100), (5, 5), (2, 2)),
}


def _preset(call: str, presets: Mapping[str, tuple[Any, ...]], name: str):
    if name not in presets:
        near = difflib.get_close_matches(str(name), presets, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"{call}({name!r}): no such preset; pass one of {sorted(presets)}.{hint}"
        raise ValueError(msg)
    return presets[name]


def psnet(preset: str = "digits", num_classes: int = 10) -> PSNet:
    """A `PSNet` of the paper's size.

    | preset | image | trunk | fan-out | separable layers |
    |---|---|---|---|---|
    | `digits` | 8x8x1 | 20 kernels 3x3, pool 2 | 40 kernels 2x2 | 160, C |
    | `mnist` | 28x28x1 | 40 kernels 5x5, pool 2 | 30 kernels 5x5, pool 2 | 240, 150, C |
    | `mnist-53780` | 28x28x1 | the same | the same | 350, 150, C |
    | `cifar10` | 32x32x3 | 60 kernels 5x5, pool 2 | 30 kernels 5x5, pool 2 | 350, 150, C |

    `mnist` has the layers named in the paper's text (46740 weights). `mnist-53780` has the number
    of weights and the element size that the paper prints.

    Args:
      preset: one of the names above.
      num_classes: number of classes, C. It must divide the neurons and kernels that are split by
        class.

    Raises:
      ValueError: the preset is unknown, or `num_classes` does not divide a width.
    """
    trunk, fan_out, hidden, kernel_sizes, pools = _preset("psnet", _PSNET, preset)
    for width in (fan_out, *hidden):
        if num_classes < 1 or width % num_classes:
            msg = (
                f"psnet({preset!r}, num_classes={num_classes}): {width} neurons or kernels cannot "
                f"be divided among {num_classes} classes; pass PSNet(num_classes={num_classes}, "
                "fan_out=..., hidden=...) with the numbers per class."
            )
            raise ValueError(msg)
    hidden = tuple(width // num_classes for width in hidden)
    return PSNet(num_classes, trunk, fan_out // num_classes, hidden, kernel_sizes, pools)


def lenet(preset: str = "digits", num_classes: int = 10) -> LeNet:
    """A `LeNet` of the paper's size: `digits`, `mnist` (120, 84, C) or `cifar10` (200, 100, C).

    Raises:
      ValueError: the preset is unknown.
    """
    kernels, hidden, kernel_sizes, pools = _preset("lenet", _LENET, preset)
    return LeNet(num_classes, kernels, hidden, kernel_sizes, pools)
