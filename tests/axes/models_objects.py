"""Models that are objects: Flax NNX and Equinox. Equinox may be missing, hence its late import."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from tests.axes.common import BATCH, TOKENS, Made, fill, images, normal


class MLP(nnx.Module):
    """Three layers with layer normalisation."""

    def __init__(self, rngs):
        sizes = (7, 9, 11, 5)
        layers = [nnx.Linear(i, o, rngs=rngs) for i, o in zip(sizes, sizes[1:])]
        self.layers, self.norm = nnx.List(layers), nnx.LayerNorm(9, rngs=rngs)

    def __call__(self, x):
        first, second, third = self.layers
        return third(nnx.gelu(second(nnx.relu(self.norm(first(x))))))


class CNN(nnx.Module):
    """The network of Flax's NNX tutorial, with batch normalisation."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(2, 5, kernel_size=(3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(5, use_running_average=True, rngs=rngs)
        self.conv2 = nnx.Conv(5, 7, kernel_size=(3, 3), rngs=rngs)
        self.linear1 = nnx.Linear(2 * 2 * 7, 11, rngs=rngs)
        self.linear2 = nnx.Linear(11, 4, rngs=rngs)
        self.pool = functools.partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))

    def __call__(self, x):
        x = self.pool(nnx.relu(self.norm1(self.conv1(x))))
        x = self.pool(nnx.relu(self.conv2(x)))
        return self.linear2(nnx.relu(self.linear1(x.reshape(x.shape[0], -1))))


class Attention(nnx.Module):
    """One layer of attention with a residual connection."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(10, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 10, 14, decode=False, rngs=rngs)
        self.head = nnx.Linear(10, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(x + self.attention(self.norm(x)))


def _nnx(module, *inputs, pure=True) -> Made:
    """The function of an NNX module, its state as nested dictionaries or as it is."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(nnx.Rngs(0))))
    params = fill(nnx.to_pure_dict(state) if pure else state)
    return lambda state, *x: nnx.merge(graphdef, state)(*x), params, inputs


def _equinox(build, x) -> Made:
    """The function of an Equinox module, under vmap; its static part is closed over."""
    import equinox as eqx

    module = eqx.filter_eval_shape(build, eqx, jax.random.key(0))
    shapes, static = eqx.partition(module, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))
    return lambda p, x: jax.vmap(eqx.combine(p, static))(x), fill(shapes), (x,)


def _equinox_mlp(eqx, key):
    return eqx.nn.MLP(7, 5, width_size=9, depth=2, activation=jax.nn.gelu, key=key)


def _equinox_cnn(eqx, key):
    first, second, third, fourth = jax.random.split(key, 4)
    layers = [
        eqx.nn.Conv2d(2, 4, 3, key=first),
        eqx.nn.MaxPool2d(2, 2),
        eqx.nn.Lambda(jax.nn.relu),
        eqx.nn.Conv2d(4, 6, 2, key=second),
        eqx.nn.GroupNorm(2, 6),
        eqx.nn.Lambda(jnp.ravel),
        eqx.nn.Linear(2 * 2 * 6, 11, key=third),
        eqx.nn.Lambda(jax.nn.sigmoid),
        eqx.nn.Linear(11, 5, key=fourth),
    ]
    return eqx.nn.Sequential(layers)


NNX = {
    "nnx-mlp": lambda: _nnx(MLP, normal(BATCH, 7)),
    "nnx-cnn": lambda: _nnx(CNN, images(), pure=False),
    "nnx-attention": lambda: _nnx(Attention, normal(BATCH, TOKENS, 10)),
}
EQUINOX = {
    "equinox-mlp": lambda: _equinox(_equinox_mlp, normal(BATCH, 7)),
    "equinox-cnn": lambda: _equinox(_equinox_cnn, normal(BATCH, 2, 8, 8)),
}
