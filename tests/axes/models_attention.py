"""Transformers, and a mixture of experts."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from tests.axes.common import (
    BATCH,
    CLASSES,
    TOKENS,
    VOCABULARY,
    Made,
    fill,
    images,
    linen,
    normal,
    shape,
    tokens,
)

WIDTH = 10


def attend(q, k, v):
    """Causal attention over `[B, T, H, K]`."""
    scores = jnp.einsum("bthk,bshk->bhts", q, k) / math.sqrt(q.shape[-1])
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def attend_grouped(q, k, v):
    """The same where each head of `k` and `v` has a group of heads of `q`."""
    b, t, heads, size = k.shape
    q = q.reshape(b, t, heads, -1, size)
    scores = jnp.einsum("btngk,bsnk->bngts", q, k) / math.sqrt(size)
    causal = jnp.arange(t)[:, None] >= jnp.arange(t)
    weights = jax.nn.softmax(jnp.where(causal, scores, -1e9), axis=-1)
    return jnp.einsum("bngts,bsnk->btngk", weights, v).reshape(b, t, -1, size)


def attend_repeated(q, k, v):
    """The same with the heads of `k` and `v` repeated."""
    groups = q.shape[2] // k.shape[2]
    return attend(q, jnp.repeat(k, groups, axis=2), jnp.repeat(v, groups, axis=2))


def attend_jax(q, k, v):
    """JAX's own."""
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def rotary(x):
    """Rotary positions; the two halves of a head are the two coordinates."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 100.0 ** (jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class Block(nn.Module):
    """Attention of `flax.linen` and two dense layers, normalised before."""

    @nn.compact
    def __call__(self, x, mask=None):
        attention = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=14)
        x = x + attention(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(13)(nn.LayerNorm()(x))))


class ViT(nn.Module):
    """Vision transformer with a class token and a learned table of positions."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), strides=(4, 4))(x)
        x = x.reshape(x.shape[0], -1, WIDTH)
        first = self.param("class_token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(first, (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(), (1, x.shape[1], WIDTH))
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


class GPT(nn.Module):
    """Embedding, positions, blocks and a head."""

    layers: int = 2

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(VOCABULARY, WIDTH)(ids)
        x = x + self.param("positions", nn.initializers.normal(), (ids.shape[1], WIDTH))
        for _ in range(self.layers):
            x = Block()(x, nn.make_causal_mask(ids))
        return nn.Dense(VOCABULARY, use_bias=False)(nn.LayerNorm()(x))


class FusedBlock(nn.Module):
    """One kernel for queries, keys and values, one for the two halves of the gated layer."""

    interleaved: bool = False  # a head's q, k and v lie together, as in GPT-NeoX

    @nn.compact
    def __call__(self, x):
        b, t, _ = x.shape
        y = nn.Dense(3 * 2 * 4, use_bias=False, name="qkv")(nn.RMSNorm()(x))
        if self.interleaved:
            q, k, v = jnp.split(y.reshape(b, t, 2, 3 * 4), 3, axis=-1)
        else:
            q, k, v = jnp.moveaxis(y.reshape(b, t, 3, 2, 4), 2, 0)
        y = attend(rotary(q), rotary(k), v).reshape(b, t, -1)
        x = x + nn.Dense(WIDTH, use_bias=False, name="out")(y)
        gate, up = jnp.split(nn.Dense(2 * 13, use_bias=False, name="glu")(nn.RMSNorm()(x)), 2, -1)
        return x + nn.Dense(WIDTH, use_bias=False, name="down")(nn.silu(gate) * up)


class FusedGPT(nn.Module):
    """Fused kernels, rotary positions, and scores by the embedding itself."""

    interleaved: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(VOCABULARY, WIDTH)
        x = embed(ids)
        for _ in range(2):
            x = FusedBlock(self.interleaved)(x)
        return embed.attend(nn.RMSNorm()(x))


HEADS, SHARED, SIZE = 8, 4, 5  # of queries, of keys and values


def _grouped(attention) -> Made:
    """Grouped queries, a kernel for each of q, k and v, a gated layer of two kernels."""

    def apply(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        x = x + jnp.einsum("bthk,hkd->btd", attention(q, k, v), p["out"])
        return x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]

    shapes = {
        "q": shape(WIDTH, HEADS, SIZE),
        "k": shape(WIDTH, SHARED, SIZE),
        "v": shape(WIDTH, SHARED, SIZE),
        "out": shape(HEADS, SIZE, WIDTH),
        "gate": shape(WIDTH, 13),
        "up": shape(WIDTH, 13),
        "down": shape(13, WIDTH),
    }
    return apply, fill(shapes), (normal(BATCH, TOKENS, WIDTH),)


def _grouped_fused() -> Made:
    """One kernel whose slices for q, k and v have unequal widths."""

    def apply(p, x):
        ends = [HEADS * SIZE, (HEADS + SHARED) * SIZE]
        parts = jnp.split(x @ p["qkv"] + p["bias"], ends, axis=-1)
        q, k, v = (y.reshape(*x.shape[:2], -1, SIZE) for y in parts)
        return x + attend_grouped(q, k, v).reshape(*x.shape[:2], -1) @ p["out"]

    width = (HEADS + 2 * SHARED) * SIZE
    shapes = {"qkv": shape(WIDTH, width), "bias": shape(width), "out": shape(HEADS * SIZE, WIDTH)}
    return apply, fill(shapes), (normal(BATCH, TOKENS, WIDTH),)


def _experts() -> Made:
    """Each token by its two best experts, all of which are evaluated."""

    def apply(p, x):
        probabilities = jax.nn.softmax(x @ p["router"], axis=-1)
        best, ids = jax.lax.top_k(probabilities, 2)
        best = best / best.sum(-1, keepdims=True)
        one_hot = jax.nn.one_hot(ids, probabilities.shape[-1])
        combine = jnp.einsum("btk,btke->bte", best, one_hot)
        hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", x, p["in"]) + p["bias"])
        y = jnp.einsum("btef,efd->bted", hidden, p["out"])
        return (x + jnp.einsum("bte,bted->btd", combine, y)) @ p["head"]

    shapes = {
        "router": shape(WIDTH, 4),
        "in": shape(4, WIDTH, 13),
        "bias": shape(4, 13),
        "out": shape(4, 13, WIDTH),
        "head": shape(WIDTH, CLASSES),
    }
    return apply, fill(shapes), (normal(BATCH, TOKENS, WIDTH),)


class EncoderDecoder(nn.Module):
    """Attention of one sequence to another of another width."""

    @nn.compact
    def __call__(self, x, y):
        attention = lambda: nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
        x = nn.LayerNorm()(x + attention()(x))
        y = nn.LayerNorm()(y + attention()(y, mask=nn.make_causal_mask(y[..., 0])))
        y = nn.LayerNorm()(y + attention()(y, x))
        return nn.Dense(CLASSES)(y + nn.Dense(9)(nn.relu(nn.Dense(13)(y))))


class Swin(nn.Module):
    """Attention in windows of 4x4 pixels, shifted by two in every other block."""

    def _windows(self, x, shift):
        b, h, w, c = x.shape
        y = jnp.roll(x, (-shift, -shift), axis=(1, 2)).reshape(b, h // 4, 4, w // 4, 4, c)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=14)(y)
        y = y.reshape(b, h // 4, w // 4, 4, 4, c).transpose(0, 1, 3, 2, 4, 5)
        return jnp.roll(y.reshape(b, h, w, c), (shift, shift), axis=(1, 2))

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x)
        for shift in (0, 2):
            x = x + self._windows(nn.LayerNorm()(x), shift)
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(13)(nn.LayerNorm()(x))))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean((1, 2)))


MODELS = {
    "vit": lambda: linen(ViT(), images()),
    "gpt": lambda: linen(GPT(), tokens()),
    "gpt-12-layers": lambda: linen(GPT(12), tokens()),
    "gpt-fused": lambda: linen(FusedGPT(), tokens()),
    "gpt-fused-interleaved": lambda: linen(FusedGPT(interleaved=True), tokens()),
    "grouped-query": lambda: _grouped(attend_grouped),
    "grouped-query-repeat": lambda: _grouped(attend_repeated),
    "grouped-query-jax": lambda: _grouped(attend_jax),
    "grouped-query-fused": _grouped_fused,
    "mixture-of-experts": _experts,
    "encoder-decoder": lambda: linen(
        EncoderDecoder(), normal(BATCH, 7, 11), normal(BATCH, TOKENS, 9)
    ),
    "swin": lambda: linen(Swin(), images()),
}
