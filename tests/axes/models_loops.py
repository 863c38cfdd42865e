"""Models with programs inside: recurrences, loops, conditions, own derivatives, checkpoints."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.axes.common import BATCH, CLASSES, TOKENS, Made, fill, linen, normal, shape
from tests.axes.models_attention import WIDTH, Block, attend

sequence = functools.partial(normal, BATCH, TOKENS)


class Recurrent(nn.Module):
    """A cell of `flax.linen` along a sequence, and a head on its last output."""

    cell: str
    both: bool = False

    @nn.compact
    def __call__(self, x):
        layer = lambda width: nn.RNN(getattr(nn, self.cell)(width))
        x = nn.Bidirectional(layer(9), layer(11))(x) if self.both else layer(9)(x)
        return nn.Dense(CLASSES)(layer(13)(x)[:, -1])


class Mamba(nn.Module):
    """A selective state space: a scan over time with a state `[B, D, N]`."""

    inner: int = 9
    state: int = 4
    rank: int = 2

    def _scan(self, x, dt, b, c):
        log = self.param("A_log", nn.initializers.zeros, (self.inner, self.state))

        def step(h, now):
            x, dt, b, c = now
            h = jnp.exp(-dt[..., None] * jnp.exp(log)) * h + (dt * x)[..., None] * b[:, None, :]
            return h, jnp.einsum("bdn,bn->bd", h, c)

        start = jnp.zeros((x.shape[0], self.inner, self.state))
        over_time = jax.tree.map(lambda y: jnp.swapaxes(y, 0, 1), (x, dt, b, c))
        return jnp.swapaxes(jax.lax.scan(step, start, over_time)[1], 0, 1)

    @nn.compact
    def __call__(self, u):
        dense = functools.partial(nn.Dense, use_bias=False)
        x, z = jnp.split(dense(2 * self.inner)(nn.RMSNorm()(u)), 2, axis=-1)
        conv = nn.Conv(self.inner, (4,), padding="CAUSAL", feature_group_count=self.inner)
        x = nn.silu(conv(x))
        y = dense(self.rank + 2 * self.state)(x)
        dt, b, c = jnp.split(y, [self.rank, self.rank + self.state], axis=-1)
        dt = nn.softplus(nn.Dense(self.inner)(dt))
        skip = self.param("D", nn.initializers.ones, (self.inner,))
        y = self._scan(x, dt, b, c) + x * skip
        return u + dense(u.shape[-1])(y * nn.silu(z))


def _linear_recurrence() -> Made:
    """A diagonal recurrence as an associative scan."""

    def combine(left, right):
        return left[0] * right[0], right[0] * left[1] + right[1]

    def apply(p, x):
        x = x @ p["in"]
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), x.shape)
        _, h = jax.lax.associative_scan(combine, (decay, x), axis=1)
        return jax.nn.gelu(h) @ p["out"]

    shapes = {"in": shape(7, 9), "decay": shape(9), "out": shape(9, 5)}
    return apply, fill(shapes), (sequence(7),)


def _stacked() -> Made:
    """Layers of a transformer stacked along the first axis, `[L, ...]`, and scanned over."""

    def layer(x, p):
        norm = lambda x, scale: x * scale * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True))
        q, k, v = jnp.einsum("btd,dchk->cbthk", norm(x, p["first"]), p["qkv"])
        x = x + jnp.einsum("bthk,hkd->btd", attend(q, k, v), p["out"])
        hidden = jax.nn.gelu(norm(x, p["second"]) @ p["up"] + p["bias"])
        return x + hidden @ p["down"], None

    def apply(p, x):
        x, _ = jax.lax.scan(layer, x @ p["in"], p["layers"])
        return x @ p["head"]

    layers = {
        "first": shape(4, WIDTH),
        "second": shape(4, WIDTH),
        "qkv": shape(4, WIDTH, 3, 2, 7),
        "out": shape(4, 2, 7, WIDTH),
        "up": shape(4, WIDTH, 13),
        "bias": shape(4, 13),
        "down": shape(4, 13, WIDTH),
    }
    shapes = {"in": shape(9, WIDTH), "layers": layers, "head": shape(WIDTH, CLASSES)}
    return apply, fill(shapes), (sequence(9),)


class LinenStacked(nn.Module):
    """The same with `nn.scan`, in whole or with every layer's activations computed again."""

    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if self.remat else Block
        stack = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=4,
        )
        x, _ = stack(block(), nn.Dense(WIDTH)(x), None)
        return nn.Dense(CLASSES)(x)


class Remat(nn.Module):
    """Dense layers whose activations are computed again in the backward pass."""

    @nn.compact
    def __call__(self, x):
        for width in (9, 11):
            x = nn.gelu(nn.remat(nn.Dense)(width)(x))
        return nn.Dense(CLASSES)(x)


def _mlp(activation) -> Made:
    """Two layers with an activation of one's own."""

    def apply(p, x):
        return activation(x @ p["in"] + p["bias"]) @ p["out"]

    shapes = {"in": shape(7, 9), "bias": shape(9), "out": shape(9, 5)}
    return apply, fill(shapes), (normal(BATCH, 7),)


def _checkpoint() -> Made:
    apply, params, inputs = _mlp(jax.nn.gelu)
    return jax.checkpoint(apply), params, inputs


def _custom_vjp() -> Made:
    """An activation whose gradient is cut off."""

    @jax.custom_vjp
    def activation(x):
        return x * jax.nn.sigmoid(x)

    forward = lambda x: (activation(x), x)
    backward = lambda x, g: (jnp.clip(g, -1, 1) * jax.nn.sigmoid(x),)
    activation.defvjp(forward, backward)
    return _mlp(activation)


def _custom_jvp() -> Made:
    @jax.custom_jvp
    def activation(x):
        return jnp.log1p(jnp.exp(x))

    activation.defjvps(lambda t, _, x: t * jax.nn.sigmoid(x))
    return _mlp(activation)


def _cond() -> Made:
    """One of two layers, as the mean of the batch says: one for `x`, the other for `y = -x`."""

    def scores(p, x):
        x = jnp.tanh(x @ p["in"])
        one = lambda x: jax.nn.relu(x @ p["one"]) + x
        other = lambda x: jnp.tanh(x @ p["other"] + p["bias"])
        return jax.lax.cond(x.mean() > 0, one, other, x) @ p["out"]

    def apply(p, x, y):
        return scores(p, x), scores(p, y)

    shapes = {"in": shape(7, 9), "one": shape(9, 9), "other": shape(9, 9), "bias": shape(9)}
    return apply, fill(shapes | {"out": shape(9, 5)}), (normal(BATCH, 7), -normal(BATCH, 7))


def _switch() -> Made:
    """One of three activations, by its number."""

    def apply(p, x, which):
        branches = [jax.nn.relu, jnp.tanh, lambda x: x * p["slope"]]
        return jax.lax.switch(which, branches, x @ p["in"]) @ p["out"]

    shapes = {"in": shape(7, 9), "slope": shape(9), "out": shape(9, 5)}
    return apply, fill(shapes), (normal(BATCH, 7), jnp.int32(2))


def _while_loop() -> Made:
    """The fixed point of a layer."""

    def apply(p, x):
        x = x @ p["in"] + p["bias"]

        def step(carry):
            h, _, i = carry
            new = jnp.tanh(0.3 * h @ p["inner"] + x)
            return new, jnp.max(jnp.abs(new - h)), i + 1

        again = lambda carry: (carry[1] > 1e-6) & (carry[2] < 30)
        return jax.lax.while_loop(again, step, (jnp.zeros_like(x), jnp.inf, 0))[0] @ p["out"]

    shapes = {"in": shape(7, 9), "bias": shape(9), "inner": shape(9, 9), "out": shape(9, 5)}
    return apply, fill(shapes), (normal(BATCH, 7),)


def _fori_loop() -> Made:
    """Layers stacked along the first axis, taken by their number."""

    def apply(p, x):
        def step(i, x):
            kernel = jax.lax.dynamic_index_in_dim(p["inner"], i, keepdims=False)
            return x + jnp.tanh(x @ kernel + p["bias"][i])

        return jax.lax.fori_loop(0, p["inner"].shape[0], step, x @ p["in"]) @ p["out"]

    shapes = {"in": shape(7, 9), "inner": shape(4, 9, 9), "bias": shape(4, 9), "out": shape(9, 5)}
    return apply, fill(shapes), (normal(BATCH, 7),)


MODELS = {
    "lstm": lambda: linen(Recurrent("OptimizedLSTMCell"), sequence(7)),
    "lstm-bidirectional": lambda: linen(Recurrent("LSTMCell", both=True), sequence(7)),
    "gru": lambda: linen(Recurrent("GRUCell"), sequence(7)),
    "mamba": lambda: linen(Mamba(), sequence(7)),
    "linear-recurrence": _linear_recurrence,
    "stacked-transformer": _stacked,
    "stacked-transformer-linen": lambda: linen(LinenStacked(), sequence(7)),
    "stacked-transformer-remat": lambda: linen(LinenStacked(remat=True), sequence(7)),
    "mlp-remat": lambda: linen(Remat(), normal(BATCH, 7)),
    "mlp-checkpoint": _checkpoint,
    "custom-vjp": _custom_vjp,
    "custom-jvp": _custom_jvp,
    "cond": _cond,
    "switch": _switch,
    "while-loop": _while_loop,
    "fori-loop": _fori_loop,
}
