"""Convolutional networks in `flax.linen`."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.axes.common import BATCH, CLASSES, TOKENS, images, linen, normal

WINDOW = (2, 2)


class CNN(nn.Module):
    """Two convolutions with pooling, flattened."""

    @nn.compact
    def __call__(self, x):
        x = nn.max_pool(nn.relu(nn.Conv(5, (3, 3))(x)), WINDOW, WINDOW)
        x = nn.avg_pool(nn.relu(nn.Conv(7, (3, 3))(x)), WINDOW, WINDOW)
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(11)(x)))


class MnistCNN(nn.Module):
    """The network of Flax's example for MNIST, with smaller widths."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(features=5, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = nn.Conv(features=7, kernel_size=(3, 3))(x)
        x = nn.relu(x)
        x = nn.avg_pool(x, window_shape=(2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))  # flatten
        x = nn.Dense(features=13)(x)
        x = nn.relu(x)
        return nn.Dense(features=10)(x)


class BatchNormCNN(nn.Module):
    """Convolutions with batch normalisation."""

    @nn.compact
    def __call__(self, x, train):
        for width in (5, 7):
            x = nn.Conv(width, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


def _norm(kind, train):
    """The layer of that name, not yet called."""
    if kind == "batch":
        return functools.partial(nn.BatchNorm, use_running_average=not train, epsilon=1e-5)
    return functools.partial(nn.GroupNorm, num_groups=4) if kind == "group" else nn.LayerNorm


class ResNet(nn.Module):
    """Residual network, of two convolutions a block or of a bottleneck, as in Flax's example."""

    stages: tuple[int, ...]
    norm: str = "batch"
    bottleneck: bool = False
    width: int = 8

    def _block(self, x, width, stride, norm):
        conv = functools.partial(nn.Conv, use_bias=False)
        if self.bottleneck:
            y = nn.relu(norm()(conv(width, (1, 1))(x)))
            y = nn.relu(norm()(conv(width, (3, 3), stride)(y)))
            y = norm()(conv(4 * width, (1, 1))(y))
        else:
            y = nn.relu(norm()(conv(width, (3, 3), stride)(x)))
            y = norm()(conv(width, (3, 3))(y))
        if x.shape != y.shape:
            x = norm()(conv(y.shape[-1], (1, 1), stride)(x))
        return nn.relu(x + y)

    @nn.compact
    def __call__(self, x, train=False):
        norm = _norm(self.norm, train)
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False)(x)
        x = nn.max_pool(nn.relu(norm()(x)), (3, 3), (2, 2), "SAME")
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                x = self._block(x, self.width * 2**i, 2 if i and not j else 1, norm)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class VGG(nn.Module):
    """Pairs of convolutions with layer normalisation, pooling between them."""

    @nn.compact
    def __call__(self, x):
        for widths in ((4, 5), (7, 9)):
            for width in widths:
                x = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, WINDOW, WINDOW)
        x = nn.relu(nn.Dense(11)(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES)(x)


class MobileNet(nn.Module):
    """Depthwise separable and grouped convolutions, and an inverted residual block."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        conv = functools.partial(nn.Conv, use_bias=False)
        x = nn.hard_swish(norm()(conv(5, (3, 3), 2)(x)))
        x = nn.relu6(norm()(conv(5, (3, 3), feature_group_count=5)(x)))
        x = nn.relu6(norm()(conv(10, (1, 1))(x)))
        y = nn.relu6(norm()(conv(14, (1, 1))(x)))
        y = nn.relu6(norm()(conv(14, (3, 3), feature_group_count=14)(y)))
        x = x + norm()(conv(10, (1, 1))(y))
        x = nn.relu6(norm()(conv(16, (3, 3), feature_group_count=2)(x)))  # 2 groups
        x = nn.relu6(norm()(conv(32, (3, 3), feature_group_count=16)(x)))  # two for each channel
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class SqueezeExcite(nn.Module):
    """Residual blocks whose channels are weighted by a small network of their means."""

    @nn.compact
    def __call__(self, x):
        x = nn.silu(nn.Conv(9, (3, 3), 2)(x))
        for _ in range(2):
            y = nn.silu(nn.Conv(9, (3, 3))(x))
            weights = nn.Dense(9)(nn.relu(nn.Dense(4)(y.mean((1, 2)))))
            x = x + y * nn.sigmoid(weights)[:, None, None, :]
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class UNet(nn.Module):
    """Down by pooling, up by resizing or transposed convolutions, skips of unequal widths."""

    transpose: bool = False

    def _up(self, x, method):
        if self.transpose:
            return nn.ConvTranspose(x.shape[-1] - 1, WINDOW, strides=WINDOW)(x)
        b, h, w, c = x.shape
        return jax.image.resize(x, (b, 2 * h, 2 * w, c), method)

    @nn.compact
    def __call__(self, x):
        top = nn.relu(nn.Conv(5, (3, 3))(x))
        middle = nn.relu(nn.Conv(7, (3, 3))(nn.max_pool(top, WINDOW, WINDOW)))
        x = nn.relu(nn.Conv(11, (3, 3))(nn.max_pool(middle, WINDOW, WINDOW)))
        x = jnp.concatenate([self._up(x, "nearest"), middle], axis=-1)
        x = nn.relu(nn.Conv(9, (3, 3))(x))
        x = jnp.concatenate([top, self._up(x, "bilinear")], axis=-1)
        return nn.Conv(CLASSES, (1, 1))(nn.relu(nn.Conv(10, (3, 3))(x)))


class DenseNet(nn.Module):
    """Blocks whose layers see all before them."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.Conv(7, (3, 3))(x)
        for growth, last in ((4, 9), (5, 11)):
            for _ in range(3):
                y = nn.Conv(13, (1, 1), use_bias=False)(nn.relu(norm()(x)))
                y = nn.Conv(growth, (3, 3), use_bias=False)(nn.relu(norm()(y)))
                x = jnp.concatenate([x, y], axis=-1)
            x = nn.Conv(last, (1, 1), use_bias=False)(nn.relu(norm()(x)))
            x = nn.avg_pool(x, WINDOW, WINDOW)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class ConvNeXt(nn.Module):
    """Patches, depthwise convolutions, layer normalisation, inverted bottlenecks, layer scale."""

    @nn.compact
    def __call__(self, x):
        for width, hidden in ((7, 13), (10, 16)):
            x = nn.LayerNorm()(nn.Conv(width, WINDOW, strides=WINDOW)(x))
            for i in range(2):
                y = nn.Conv(width, (7, 7), feature_group_count=width)(x)
                y = nn.Dense(hidden)(nn.LayerNorm(epsilon=1e-6)(y))
                y = nn.Dense(width)(nn.gelu(y, approximate=False))
                x = x + self.param(f"gamma_{width}_{i}", nn.initializers.ones, (width,)) * y
        return nn.Dense(CLASSES)(nn.LayerNorm()(x.mean((1, 2))))


class Mixer(nn.Module):
    """MLP-Mixer: dense layers over patches and over channels in turn."""

    def _mlp(self, x, hidden):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(hidden)(x)))

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(10, WINDOW, strides=WINDOW)(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(self._mlp(y, 7), 1, 2)
            x = x + self._mlp(nn.LayerNorm()(x), 13)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(1))


class ShuffleNet(nn.Module):
    """Grouped convolutions with the channels shuffled between them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(10, (3, 3), strides=2)(x))
        y = nn.relu(nn.Conv(15, (1, 1), feature_group_count=5)(x))
        y = jnp.swapaxes(y.reshape(*y.shape[:-1], 5, 3), -1, -2).reshape(y.shape)
        x = x + nn.Conv(10, (3, 3), feature_group_count=5)(y)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class PixelShuffle(nn.Module):
    """Super-resolution: channels become pixels."""

    @nn.compact
    def __call__(self, x):
        x = nn.PReLU()(nn.Conv(7, (5, 5))(x))
        b, h, w, _ = x.shape
        x = nn.Conv(4 * 4, (3, 3))(x).reshape(b, h, w, 2, 2, 4)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, 4)
        return nn.Conv(2, (1, 1))(nn.relu(x))


class WaveNet(nn.Module):
    """Causal dilated convolutions with gates, and a sum of skips."""

    @nn.compact
    def __call__(self, x):
        x, skips = nn.Dense(9)(x), 0.0
        for dilation in (1, 2):
            conv = functools.partial(
                nn.Conv, kernel_size=(2,), kernel_dilation=dilation, padding="CAUSAL"
            )
            y = nn.tanh(conv(11)(x)) * nn.sigmoid(conv(11)(x))
            x, skips = x + nn.Dense(9)(y), skips + nn.Dense(13)(y)
        return nn.Dense(CLASSES)(nn.relu(skips))


def _train():
    return linen(BatchNormCNN(), images(), train=True, mutable=["batch_stats"])


RESNETS = {
    "resnet18-batchnorm": lambda: linen(ResNet((2, 2, 2, 2)), images(12)),
    "resnet18-groupnorm": lambda: linen(ResNet((2, 2, 2, 2), "group"), images(12)),
    "resnet18-layernorm": lambda: linen(ResNet((2, 2, 2, 2), "layer"), images(12)),
    "resnet50-batchnorm": lambda: linen(ResNet((3, 4, 6, 3), bottleneck=True), images(12)),
}
MODELS = {
    "cnn": lambda: linen(CNN(), images()),
    "mnist-cnn": lambda: linen(MnistCNN(), images(12, channels=1)),
    "cnn-batchnorm": lambda: linen(BatchNormCNN(), images(), train=False),
    "cnn-batchnorm-train": _train,
    "vgg-layernorm": lambda: linen(VGG(), images()),
    "mobilenet": lambda: linen(MobileNet(), images()),
    "squeeze-excite": lambda: linen(SqueezeExcite(), images()),
    "unet-resize": lambda: linen(UNet(), images()),
    "unet-transpose": lambda: linen(UNet(transpose=True), images()),
    "densenet": lambda: linen(DenseNet(), images()),
    "convnext": lambda: linen(ConvNeXt(), images()),
    "mlp-mixer": lambda: linen(Mixer(), images()),
    "shufflenet": lambda: linen(ShuffleNet(), images()),
    "pixel-shuffle": lambda: linen(PixelShuffle(), images()),
    "wavenet": lambda: linen(WaveNet(), normal(BATCH, TOKENS, 7)),
    **RESNETS,
}
