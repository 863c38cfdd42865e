"""Models of dense layers: perceptrons, factorisations, auto-encoders, sets and graphs."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.axes.common import BATCH, CLASSES, Made, fill, integers, linen, normal, shape


class MLP(nn.Module):
    """Dense layers with an activation, and dropout or batch normalisation between them."""

    widths: tuple[int, ...] = (9, 11)
    activation: str = "relu"
    dropout: float = 0.0
    normalize: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        for width in self.widths:
            x = nn.Dense(width)(x)
            if self.normalize:
                x = nn.BatchNorm(use_running_average=not train)(x)
            x = getattr(nn, self.activation)(x)
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(CLASSES)(x)


class WeightNormMLP(nn.Module):
    """Kernels of unit norm times a scale."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.WeightNorm(nn.Dense(9))(x))
        return nn.WeightNorm(nn.Dense(CLASSES))(x)


class Maxout(nn.Module):
    """The larger of four affine functions, neuron by neuron."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(9 * 4)(x).reshape(*x.shape[:-1], 9, 4).max(-1)
        return nn.Dense(CLASSES)(x)


class Autoencoder(nn.Module):
    """Reconstruction and code."""

    @nn.compact
    def __call__(self, x):
        code = nn.Dense(4)(nn.relu(nn.Dense(11)(x)))
        return nn.Dense(x.shape[-1])(nn.relu(nn.Dense(13)(code))), code


class DeepSets(nn.Module):
    """A function of a set: mean and maximum over its elements `[B, N, F]`."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(9)(x))
        x = jnp.concatenate([x.mean(1), nn.relu(nn.Dense(11)(x)).max(1)], axis=-1)
        return nn.Dense(CLASSES)(nn.silu(nn.Dense(13)(x)))


class RealNVP(nn.Module):
    """Affine couplings of unequal halves with reversal between them; `(z, log-determinant)`."""

    @nn.compact
    def __call__(self, x):
        total = jnp.zeros(x.shape[0])
        for _ in range(3):
            kept, moved = jnp.split(x, [4], axis=-1)
            hidden = nn.tanh(nn.Dense(11)(kept))
            log_scale = nn.tanh(nn.Dense(moved.shape[-1])(hidden))
            moved = moved * jnp.exp(log_scale) + nn.Dense(moved.shape[-1])(hidden)
            total = total + log_scale.sum(-1)
            x = jnp.concatenate([kept, moved], axis=-1)[:, ::-1]
        return x, total


def _dropout():
    keys = {"dropout": jax.random.key(1)}
    model = MLP(activation="gelu", dropout=0.3)
    return linen(model, normal(BATCH, 7), train=True, rngs=keys)


def _train():
    return linen(MLP(normalize=True), normal(BATCH, 7), train=True, mutable=["batch_stats"])


def _tied_autoencoder() -> Made:
    """The decoder's kernels are the encoder's, transposed."""

    def apply(p, x):
        x = jnp.tanh(jnp.tanh(x @ p["outer"] + p["up"]) @ p["inner"] + p["code"])
        return jnp.tanh(x @ p["inner"].T + p["down"]) @ p["outer"].T + p["bias"]

    shapes = {"outer": shape(7, 11), "inner": shape(11, 4), "up": shape(11), "code": shape(4)}
    return apply, fill(shapes | {"down": shape(11), "bias": shape(7)}), (normal(BATCH, 7),)


def _bilinear() -> Made:
    def apply(p, x, y):
        x, y = jnp.tanh(x @ p["left"]), jnp.tanh(y @ p["right"])
        return jnp.einsum("bi,ijk,bj->bk", x, p["core"], y) + p["bias"]

    shapes = {"left": shape(7, 9), "right": shape(6, 4), "core": shape(9, 4, 5), "bias": shape(5)}
    return apply, fill(shapes), (normal(BATCH, 7), normal(BATCH, 6, seed=2))


def _factorisation_machine() -> Made:
    def apply(p, x):
        pairs = jnp.square(x @ p["factors"]) - jnp.square(x) @ jnp.square(p["factors"])
        return p["bias"] + x @ p["weights"] + 0.5 * pairs.sum(-1)

    shapes = {"bias": shape(), "weights": shape(11), "factors": shape(11, 4)}
    return apply, fill(shapes), (normal(BATCH, 11),)


def _matrix_factorisation() -> Made:
    """Scores of users and items, by their numbers."""

    def apply(p, users, items):
        x, y = p["users"][users], jnp.take(p["items"], items, axis=0)
        return jnp.sum(x * y, axis=-1) + p["shift"][items]

    shapes = {"users": shape(13, 4), "items": shape(11, 4), "shift": shape(11)}
    return apply, fill(shapes), (integers(13, BATCH), integers(11, BATCH, seed=2))


def _lora() -> Made:
    """Kernels with an update of low rank."""

    def apply(p, x):
        for layer in p:
            x = jnp.tanh(x @ (layer["kernel"] + layer["down"] @ layer["up"]) + layer["bias"])
        return x

    layer = lambda i, o, r: {
        "kernel": shape(i, o),
        "down": shape(i, r),
        "up": shape(r, o),
        "bias": shape(o),
    }
    return apply, fill([layer(7, 9, 4), layer(9, 11, 2)]), (normal(BATCH, 7),)


def _dict() -> Made:
    def apply(p, x):
        hidden = jax.nn.relu(jnp.dot(x, p["hidden"]["w"]) + p["hidden"]["b"])
        return jnp.dot(hidden, p["out"]["w"]) + p["out"]["b"]

    layer = lambda i, o: {"w": shape(i, o), "b": shape(o)}
    return apply, fill({"hidden": layer(7, 9), "out": layer(9, 5)}), (normal(BATCH, 7),)


def _tuples() -> Made:
    """The classical example of JAX: a list of pairs, kernels `[out, in]`, one sample under vmap."""

    def predict(p, x):
        for w, b in p[:-1]:
            x = jnp.tanh(jnp.dot(w, x) + b)
        w, b = p[-1]
        logits = jnp.dot(w, x) + b
        return logits - jax.nn.logsumexp(logits)

    sizes = (7, 9, 11, 5)
    params = [(shape(o, i), shape(o)) for i, o in zip(sizes, sizes[1:])]
    return jax.vmap(predict, (None, 0)), fill(params), (normal(BATCH, 7),)


def _ensemble() -> Made:
    """Members stacked along the first axis, averaged."""

    def member(p, x):
        return jax.nn.softmax(jnp.tanh(x @ p["in"] + p["bias"]) @ p["out"])

    shapes = {"in": shape(4, 7, 9), "bias": shape(4, 9), "out": shape(4, 9, 5)}
    apply = lambda p, x: jax.vmap(member, (0, None))(p, x).mean(0)
    return apply, fill(shapes), (normal(BATCH, 7),)


def _graph_convolution() -> Made:
    def apply(p, x, adjacency):
        degree = adjacency.sum(-1, keepdims=True) + 1
        for w in p[:-1]:
            x = jax.nn.relu(((adjacency @ x + x) / degree) @ w)
        return x.mean(0) @ p[-1]

    adjacency = integers(2, 8, 8).astype(jnp.float32)
    params = [shape(7, 9), shape(9, 11), shape(11, 5)]
    return apply, fill(params), (normal(8, 7), adjacency)


def _message_passing() -> Made:
    """Messages along edges, summed by `segment_sum`."""

    def apply(p, x, senders, receivers):
        pairs = jnp.concatenate([x[senders], x[receivers]], axis=-1)
        messages = jax.nn.relu(pairs @ p["message"] + p["bias"])
        received = jax.ops.segment_sum(messages, receivers, num_segments=x.shape[0])
        return jnp.concatenate([x, received], axis=-1) @ p["update"]

    shapes = {"message": shape(14, 9), "bias": shape(9), "update": shape(16, 5)}
    edges = integers(8, 12), integers(8, 12, seed=2)
    return apply, fill(shapes), (normal(8, 7), *edges)


MODELS = {
    "mlp-relu": lambda: linen(MLP(), normal(BATCH, 7)),
    "mlp-gelu-dropout": _dropout,
    "mlp-batchnorm": lambda: linen(MLP(normalize=True), normal(BATCH, 7)),
    "mlp-batchnorm-train": _train,
    "mlp-weightnorm": lambda: linen(WeightNormMLP(), normal(BATCH, 7)),
    "maxout": lambda: linen(Maxout(), normal(BATCH, 7)),
    "autoencoder": lambda: linen(Autoencoder(), normal(BATCH, 7)),
    "autoencoder-tied": _tied_autoencoder,
    "deep-sets": lambda: linen(DeepSets(), normal(BATCH, 6, 7)),
    "realnvp": lambda: linen(RealNVP(), normal(BATCH, 9)),
    "bilinear": _bilinear,
    "factorisation-machine": _factorisation_machine,
    "matrix-factorisation": _matrix_factorisation,
    "lora": _lora,
    "dict-mlp": _dict,
    "tuples-mlp": _tuples,
    "ensemble": _ensemble,
    "graph-convolution": _graph_convolution,
    "message-passing": _message_passing,
}
