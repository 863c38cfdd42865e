"""The softmax over very many labels, in chunks of the output layer: scores never exist all at once.

The scores of `B` samples for `L` labels are `B * L` numbers: 128 times 670 091 in float32 take
343 MB, and their gradient takes as much again. Here at most two blocks `[B, chunk]` exist at once.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32, Integer, PyTree, Shaped

from psjax._placement import vary
from psjax._types import AnyArray
from psjax.losses._labels import int32_labels


def many_label_cross_entropy(
    hidden: Float[AnyArray, "B H"],
    kernel: Float[AnyArray, "H L"],
    bias: Float[AnyArray, " L"] | None,
    labels: Integer[AnyArray, "B K"],
    chunk_size: int = 8192,
):
    r"""Softmax cross entropy with very many labels, without ever making all scores.

    For scores $s = h W + b$ and a sample's list of labels $Y$, it is
    $\log \sum_l e^{s_l} - \frac1{|Y|} \sum_{y \in Y} s_y$: the cross entropy between the uniform
    distribution over $Y$ and the softmax. With one label per sample it is the negative
    log-likelihood. No array `[B, L]` exists, and the kernel is neither padded nor copied.

    The forward pass goes through the labels in chunks with a running maximum and a running sum
    (online softmax: M. Milakov, N. Gimelshein, *Online normalizer calculation for softmax*,
    [arXiv:1805.02867](https://arxiv.org/abs/1805.02867)). The backward pass computes the scores of
    each chunk again and writes its columns of the kernel's gradient in place. This takes four
    products of the size of $h W$; the plain formula takes three.

    Only `jax.grad` works, once (it is a `jax.custom_vjp`); `jax.jvp` and `jax.hessian` do not. It
    works under `vmap`, `jit`, `scan`, `pmap` and `shard_map`. Under `shard_map(check_vma=True)`,
    gradients of replicated values are summed over devices, as JAX does.

    Its use is extreme classification, as in section 6 (Amazon-670k) of *Distributed Learning of
    Neural Networks using Independent Subnet Training*,
    [arXiv:1910.02120](https://arxiv.org/abs/1910.02120). The paper does not say which loss it used
    for lists of labels; this one is our choice.

    Args:
      hidden: `[B, H]`, floating, the inputs of the output layer.
      kernel: `[H, L]`, of the same dtype.
      bias: `[L]`, of the same dtype, or None.
      labels: `[B, K]`, integers in `[0, L)` in any order, padded with `L`. A sample without labels
        gives 0, and its gradients are 0 whatever its `hidden`. A label given twice counts twice.
        Other numbers give NaN, in the gradient too, because a jitted function cannot raise.
      chunk_size: labels per chunk, 1 or more; if larger than `L`, there is one chunk.

    Returns:
      `[B]`, the loss of each sample, in the dtype of `hidden`, but at least float32.

    Raises:
      ValueError: shapes do not agree, or `chunk_size` is less than 1.
      TypeError: dtypes are not floating or differ, or labels are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from psjax import losses
      >>> hidden, kernel = jnp.zeros((2, 3)), jnp.zeros((3, 8))
      >>> labels = jnp.array([[0, 5], [7, 8]])  # the second sample has one label
      >>> losses.many_label_cross_entropy(hidden, kernel, None, labels, chunk_size=3)
      Array([2.0794415, 2.0794415], dtype=float32)
    """
    call = "many_label_cross_entropy(hidden, kernel, bias, labels)"
    hidden, kernel, bias = _check_layer(call, hidden, kernel, bias, chunk_size)
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        msg = f"{call}: labels are {labels.dtype}; pass integers in [0, L), padded with L."
        raise TypeError(msg)
    if labels.ndim != 2 or labels.shape[0] != hidden.shape[0]:
        msg = (
            f"{call}: labels have shape {labels.shape} and hidden {hidden.shape}; pass labels "
            "[B, K], one list per sample, and hidden [B, H]."
        )
        raise ValueError(msg)
    num_labels = kernel.shape[1]
    labels = int32_labels(labels, num_labels)
    held = (labels >= 0) & (labels < num_labels)
    wrong = jnp.any(labels < 0, axis=-1)
    empty = ~jnp.any(held, axis=-1) & ~wrong
    # A row without labels is padding: nothing in it, not even inf, may lead to NaN.
    hidden = jnp.where(empty[:, None], 0, hidden)
    hidden, kernel, bias = vary((hidden, kernel, bias), (hidden, kernel, bias, labels))
    loss: jax.Array = _cross_entropy(min(chunk_size, num_labels), hidden, kernel, bias, labels)
    return jnp.where(empty, 0, loss * jnp.where(wrong, jnp.nan, 1).astype(loss.dtype))


def top_k_labels(
    hidden: Float[AnyArray, "B H"],
    kernel: Float[AnyArray, "H L"],
    bias: Float[AnyArray, " L"] | None,
    k: int,
    chunk_size: int = 8192,
):
    """The `k` labels with the highest scores `hidden @ kernel + bias`, in chunks of the labels.

    It equals `jax.lax.top_k(hidden @ kernel + bias, k)[1]` (of equal scores, the lower label comes
    first), but the scores `[B, L]` never exist. Use it to evaluate a network with very many labels,
    for example by precision at 1, 3 and 5. It cannot be differentiated.

    Args:
      hidden: `[B, H]`, floating.
      kernel: `[H, L]`, of the same dtype.
      bias: `[L]`, of the same dtype, or None.
      k: number of labels, from 1 to L.
      chunk_size: labels per chunk, 1 or more; a number below `k` is raised to `k`.

    Returns:
      int32 `[B, k]`, best first.

    Raises:
      ValueError: shapes do not agree, `k` is outside `[1, L]`, or `chunk_size` is less than 1.
      TypeError: dtypes are not floating or differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from psjax import losses
      >>> kernel = jnp.array([[1.0, 5.0, 3.0, 5.0]])
      >>> losses.top_k_labels(jnp.ones((1, 1)), kernel, None, k=3, chunk_size=2)
      Array([[1, 3, 2]], dtype=int32)
    """
    call = "top_k_labels(hidden, kernel, bias, k)"
    hidden, kernel, bias = _check_layer(call, hidden, kernel, bias, chunk_size)
    num_labels = kernel.shape[1]
    if not 1 <= k <= num_labels:
        msg = f"{call}: k={k} with {num_labels} labels; k must be from 1 to {num_labels}."
        raise ValueError(msg)
    hidden, kernel, bias = vary((hidden, kernel, bias), (hidden, kernel, bias))

    def best(start: int | Integer[Array, ""], size: int):
        values, places = lax.top_k(_scores(hidden, kernel, bias, start, size), k)
        return values, (start + places).astype(jnp.int32)

    def merge(
        old: tuple[Array, Array], new: tuple[Array, Array]
    ):  # the old labels are lower: put first, they win ties
        values, labels = (jnp.concatenate(both, axis=1) for both in zip(old, new))
        values, places = lax.top_k(values, k)
        return values, jnp.take_along_axis(labels, places, axis=1)

    chunk = min(max(chunk_size, k), num_labels)
    first = num_labels % chunk
    first = first if first >= k else first + chunk
    body = lambda start, carry: merge(carry, best(start, chunk))
    return _over_chunks(num_labels, first, chunk, body, best(0, first))[1]


# --- the loss -------------------------------------------------------------------------------------
#
# The first chunk, of 1 to `chunk` labels, takes the remainder, outside the loop. So no label is
# padded, masked or counted twice, and the loop's carry has its dtypes and mapped axes from the
# start.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    chunk: int,
    hidden: Float[Array, "B H"],
    kernel: Float[Array, "H L"],
    bias: Float[Array, " L"] | None,
    labels: Int32[Array, "B K"],
):
    return _forward(chunk, hidden, kernel, bias, labels)[0]


def _forward(
    chunk: int,
    hidden: Float[Array, "B H"],
    kernel: Float[Array, "H L"],
    bias: Float[Array, " L"] | None,
    labels: Int32[Array, "B K"],
):
    weights = _label_weights(labels, kernel.shape[1], _wide(hidden.dtype))

    def part(start: int | Integer[Array, ""], size: int):
        """Maximum, sum of exponentials relative to it, weighted sum of label scores of a chunk."""
        scores = _scores(hidden, kernel, bias, start, size)
        # If a score of -inf masks all labels of a chunk, the maximum is not a number to subtract.
        top = jnp.maximum(jnp.max(scores, axis=1), jnp.finfo(scores.dtype).min)
        total = jnp.sum(jnp.exp(scores - top[:, None]), axis=1)
        inside = (labels >= start) & (labels < start + size)
        own = jnp.take_along_axis(scores, jnp.where(inside, labels - start, 0), axis=1)
        return top, total, jnp.sum(jnp.where(inside, weights * own, 0), axis=1)

    def merge(a: tuple[Array, ...], b: tuple[Array, ...]):
        top = jnp.maximum(a[0], b[0])
        total = a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)
        return top, total, a[2] + b[2]

    first = _first(kernel.shape[1], chunk)
    body = lambda start, carry: merge(carry, part(start, chunk))
    top, total, own = _over_chunks(kernel.shape[1], first, chunk, body, part(0, first))
    normalizer = top + jnp.log(total)
    return normalizer - own, (hidden, kernel, bias, labels, normalizer)


def _backward(
    chunk: int,
    residuals: tuple[Array, Array, Array | None, Array, Array],
    cotangent: Float[Array, " B"],
):
    hidden, kernel, bias, labels, normalizer = residuals
    weights = _label_weights(labels, kernel.shape[1], normalizer.dtype)
    rows = jnp.arange(hidden.shape[0])[:, None]

    def part(start: int | Integer[Array, ""], size: int, grads: tuple[Array, Array, Array | None]):
        scores = _scores(hidden, kernel, bias, start, size)
        error = jnp.exp(scores - normalizer[:, None])
        inside = (labels >= start) & (labels < start + size)
        places = jnp.where(inside, labels - start, size)  # past the end: dropped
        error = error.at[rows, places].add(-weights, mode="drop") * cotangent[:, None]
        narrow = error.astype(hidden.dtype)
        columns = lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
        d_hidden, d_kernel, d_bias = grads
        d_hidden = d_hidden + jnp.matmul(narrow, columns.T, preferred_element_type=error.dtype)
        d_kernel = lax.dynamic_update_slice_in_dim(d_kernel, hidden.T @ narrow, start, axis=1)
        if d_bias is not None:
            summed = jnp.sum(error, axis=0).astype(d_bias.dtype)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, summed, start, axis=0)
        return d_hidden, d_kernel, d_bias

    zeros = jnp.zeros(hidden.shape, normalizer.dtype), *jax.tree.map(jnp.zeros_like, (kernel, bias))
    first = _first(kernel.shape[1], chunk)
    init = part(0, first, zeros)
    body = lambda start, grads: part(start, chunk, grads)
    d_hidden, d_kernel, d_bias = _over_chunks(kernel.shape[1], first, chunk, body, init)
    return d_hidden.astype(hidden.dtype), d_kernel, d_bias, None


_cross_entropy.defvjp(_forward, _backward)


def _first(num_labels: int, chunk: int):
    """Size of the first chunk, 1 to `chunk`: the remainder of whole chunks."""
    return (num_labels - 1) % chunk + 1


def _over_chunks(
    num_labels: int, first: int, chunk: int, body: Callable[[Array, PyTree], PyTree], carry: PyTree
):
    """`carry = body(start, carry)` over the whole chunks that follow the first."""
    step = lambda i, carry: body(first + chunk * i.astype(jnp.int32), carry)
    return lax.fori_loop(0, (num_labels - first) // chunk, step, carry)


def _scores(
    hidden: Float[AnyArray, "B H"],
    kernel: Float[AnyArray, "H L"],
    bias: Float[AnyArray, " L"] | None,
    start: int | Integer[AnyArray, ""],
    size: int,
):
    """Scores `[B, size]` of the labels from `start`, in float32 at least."""
    columns = lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
    scores = jnp.matmul(hidden, columns, preferred_element_type=_wide(hidden.dtype))
    if bias is None:
        return scores
    return scores + lax.dynamic_slice_in_dim(bias, start, size).astype(scores.dtype)[None]


def _label_weights(labels: Int32[Array, "B K"], num_labels: int, dtype: DTypeLike):
    """`[B, K]`: one over the number of the sample's labels, and 0 for padding."""
    held = ((labels >= 0) & (labels < num_labels)).astype(dtype)
    return held / jnp.maximum(jnp.sum(held, axis=1, keepdims=True), 1)


def _wide(dtype: DTypeLike):
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _check_layer(
    call: str,
    hidden: Shaped[AnyArray, "..."],
    kernel: Shaped[AnyArray, "..."],
    bias: Shaped[AnyArray, "..."] | None,
    chunk_size: int,
):
    hidden, kernel = jnp.asarray(hidden), jnp.asarray(kernel)
    bias = None if bias is None else jnp.asarray(bias)
    if hidden.ndim != 2 or kernel.ndim != 2 or hidden.shape[1] != kernel.shape[0]:
        msg = (
            f"{call}: hidden has shape {hidden.shape} and kernel {kernel.shape}; pass hidden "
            "[B, H] and kernel [H, L]."
        )
        raise ValueError(msg)
    if kernel.shape[1] < 1:
        msg = f"{call}: kernel has shape {kernel.shape}; a softmax needs at least one label."
        raise ValueError(msg)
    if bias is not None and bias.shape != kernel.shape[1:]:
        msg = (
            f"{call}: bias has shape {bias.shape} and kernel {kernel.shape}; pass bias "
            f"[{kernel.shape[1]}], one number per label, or None."
        )
        raise ValueError(msg)
    dtypes = [x.dtype for x in (hidden, kernel, bias) if x is not None]
    if not jnp.issubdtype(hidden.dtype, jnp.floating) or len(set(dtypes)) > 1:
        msg = (
            f"{call}: dtypes are {', '.join(d.name for d in dtypes)}; pass one floating dtype "
            "for hidden, kernel and bias."
        )
        raise TypeError(msg)
    if chunk_size < 1:
        msg = f"{call}: chunk_size={chunk_size}; pass 1 or more."
        raise ValueError(msg)
    return hidden, kernel, bias
