r"""LeNet and PSNet with the papers' presets.

P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize partitioned neural network
training*, G-2023-36, sections 5 and 7. Both networks in the form the authors ran: sigmoid after
every layer but the last; convolution, bias, average pooling, sigmoid; Xavier-uniform kernels, zero
biases.

Both are Flax modules whose parameters carry the `class` axis. The sub-network behind a set of `m`
scores is the same module with `m` classes, `model.clone(num_classes=m)`, applied to the gathered
weights::

    net = psjax.models.psnet("digits")
    variables = net.init(jax.random.key(0), images)            # [batch, height, width, channels]
    params = flax.linen.unbox(variables)["params"]
    axes = flax.linen.get_partition_spec(variables)["params"]
"""

import difflib

from flax import linen as nn

from psjax import nn as psnn


class PSNet(nn.Module):
    """Partitioned network (section 5.3): shared convolutions, then one group of layers a class.

    `[batch, height, width, channels] -> scores [batch, num_classes]`.

    Attributes:
      num_classes: number of class groups, C.
      trunk: kernels of each shared convolution; may be empty (the ideal network of section 5.3).
      fan_out: kernels **a class** of the convolution that leads from all channels to each class.
      hidden: neurons **a class** of each separable dense layer before the last.
      kernel_sizes, pools: side of the kernel and of the pooling window of every convolution, the
        trunk's and then the fan-out's.
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
    def __call__(self, x):
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
        for features in self.hidden:
            x = psnn.sigmoid(psnn.SeparableDense(self.num_classes, features)(x))
        return psnn.SeparableDense(self.num_classes, 1)(x)[..., 0]


class LeNet(nn.Module):
    """The paper's LeNet: two convolutions and three dense layers, only the last one split by class.

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
    def __call__(self, x):
        for features, k, pool in zip(self.kernels, self.kernel_sizes, self.pools):
            x = psnn.sigmoid(psnn.Conv(features, (k, k), pool, self.implementation)(x))
        x = x.reshape(x.shape[0], -1)
        for features in self.hidden:
            x = psnn.sigmoid(psnn.Dense(features)(x))
        return psnn.FanOutDense(self.num_classes, 1)(x)[..., 0]


# Neurons and kernels of all classes together, as the paper counts them: (trunk, fan-out, hidden).
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


def _preset(call, presets, name):
    if name not in presets:
        near = difflib.get_close_matches(str(name), presets, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"{call}({name!r}): no such preset; write one of {sorted(presets)}.{hint}"
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

    `mnist` has the layers named in the paper's text (46740 weights); `mnist-53780` is the network
    whose weight count and element size the paper prints.

    Args:
      preset: one of the names above.
      num_classes: C; must divide the neurons and kernels that are split by class.

    Raises:
      ValueError: unknown preset, or a width that `num_classes` does not divide.
    """
    trunk, fan_out, hidden, kernel_sizes, pools = _preset("psnet", _PSNET, preset)
    for width in (fan_out, *hidden):
        if num_classes < 1 or width % num_classes:
            msg = (
                f"psnet({preset!r}, num_classes={num_classes}): {width} neurons or kernels cannot "
                f"be divided among {num_classes} classes; write PSNet(num_classes={num_classes}, "
                "fan_out=..., hidden=...) with the numbers for one class."
            )
            raise ValueError(msg)
    hidden = tuple(width // num_classes for width in hidden)
    return PSNet(num_classes, trunk, fan_out // num_classes, hidden, kernel_sizes, pools)


def lenet(preset: str = "digits", num_classes: int = 10) -> LeNet:
    """A `LeNet` of the paper's size: `digits`, `mnist` (120, 84, C) or `cifar10` (200, 100, C).

    Raises:
      ValueError: unknown preset.
    """
    kernels, hidden, kernel_sizes, pools = _preset("lenet", _LENET, preset)
    return LeNet(num_classes, kernels, hidden, kernel_sizes, pools)
