"""Losses of margins between pairs of scores: margin functions, and sums of them."""

import difflib
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Integer, Shaped

from psjax._types import AnyArray
from psjax.losses._labels import int32_labels

# Beyond the bound, the exponential is continued by its tangent. Adam squares gradients, so they
# must stay below e^44 in float32 and below e^354 in float64. Margins in training are far smaller:
# in 40 epochs of the paper's PSNet on MNIST the largest 2z was 7.
_BOUNDS = {"float64": 300.0, "float32": 40.0, "bfloat16": 40.0, "float16": 5.0}


def exponential(z: Float[ArrayLike, "*shape"], bound: float | None = None):
    r"""The exponential without overflow: $e^z$ up to a bound $B$, and its tangent beyond.

    As a formula: $e^{\min(z, B)} (1 + \max(z - B, 0))$. In float32 it is finite for margins up to
    1e21. The bound applies to each margin by itself, so that the loss stays partially separable.
    The first derivative ($e^B$ beyond the bound) and the second (0 there) are right at every
    margin, infinite ones included.

    Args:
      z: margins, any shape, floating.
      bound: $B$. None: 40 in float32 and bfloat16, 300 in float64, 5 in float16, to guard against
        overflow. For a bound that is meant to change training, see `bounded_exponential`.
    """
    z = jnp.asarray(z)
    bound = _BOUNDS[jnp.result_type(z, jnp.float16).name] if bound is None else bound
    # With `where`, the branch that is not taken has a gradient of exactly 0. A product with a mask
    # would not do: beyond the bound, its factors can be inf although the derivative is finite. NaN
    # takes the branch of the exponential.
    beyond = z > bound
    below = jnp.exp(jnp.where(beyond, bound, z))
    slope = jnp.where(beyond, jnp.exp(bound), 1).astype(below.dtype)
    return jnp.where(beyond, slope * (1 + (z - bound)), below)


def squared_exponential(z: Float[ArrayLike, "*shape"], bound: float | None = None):
    r"""The loss that the paper's authors ran, $\varphi(z) = e^{2z}$, bounded like `exponential`."""
    return exponential(2 * z, bound)


def bounded_exponential(z: Float[ArrayLike, "*shape"], bound: float = 4.0):
    r"""`exponential` with a bound low enough to change training: on purpose, a different loss.

    A misclassified sample then weighs at most about $e^B$ times as much as one on the decision
    boundary. The effect was measured for `squared_exponential` with `margin_bound=4`, not for this
    function: under Adam, accuracy had no large drops, and four without the bound
    (experiments/psl/README.md, three seeds).
    """
    return exponential(z, bound)


def softplus(z: Float[ArrayLike, "*shape"]):
    r"""One-vs-each, $\log(1 + e^z)$ (Titsias, 2016, arXiv:1609.07410); gradients in [0, 1]."""
    return jax.nn.softplus(z)


def squared_hinge(z: Float[ArrayLike, "*shape"]):
    r"""The squared multiclass hinge of Weston and Watkins (1999), $\max(0, 1 + z)^2$."""
    return jnp.square(jnp.maximum(1 + z, 0))


MarginFn = Callable[[jax.Array], jax.Array]


def psl_with_integer_labels(
    scores: Float[AnyArray, "*batch C"],
    labels: Integer[AnyArray, "*batch"],
    margin_fn: MarginFn = exponential,
):
    r"""The partially-separable loss $\sum_{j \ne y} \varphi(c_j - c_y)$ of each sample.

    It takes all scores at once: equation (6b) of the paper. Equation (6a) also has the term
    $j = y$ and is larger by 1. The authors ran `squared_exponential`, which is the same loss at
    doubled scores.

    With $\varphi = \exp$ it equals $1/p_y - 1 = e^{\mathrm{NLL}} - 1$, where $p_y$ is the softmax
    probability of the label. Its gradient is that of the negative log-likelihood with each sample
    weighted by $1/p_y$. This is heavy-tailed: under Adam, one sample that is confidently wrong
    moves every weight.

    In float32, $e^z$ would overflow at a margin of 88.7 and $e^{2z}$ at 44.4; `exponential`
    continues as its tangent before that.

    Args:
      scores: `[..., C]`, floating, C >= 2.
      labels: `[...]`, integers in `[0, C)`. A label out of range gives NaN in the value and the
        gradient, because a jitted function cannot raise; `psjax.data.check_labels` raises on the
        host.
      margin_fn: $\varphi$, elementwise.

    Returns:
      `[...]`, the loss of each sample.

    Raises:
      ValueError: scores do not have the shape `labels.shape + (C,)`, or there is one class only.
      TypeError: labels are not integers.
    """
    scores, labels = _check("psl_with_integer_labels", scores, labels)
    other = ~jax.nn.one_hot(labels, scores.shape[-1], dtype=bool)
    own = jnp.take_along_axis(scores, labels[..., None], axis=-1)
    # Mask twice: if only the value were masked, a margin inf - inf would give NaN in the gradient.
    values = jnp.where(other, margin_fn(jnp.where(other, scores - own, 0)), 0)
    return _nan_outside(labels) * jnp.sum(values, axis=-1)


def nll_with_integer_labels(
    scores: Float[AnyArray, "*batch C"], labels: Integer[AnyArray, "*batch"]
):
    """The negative log-likelihood of each sample, equation (2) of the paper; not separable.

    Arguments and errors are those of `psl_with_integer_labels`.
    """
    scores, labels = _check("nll_with_integer_labels", scores, labels)
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    return _nan_outside(labels) * loss


def one_vs_all_with_integer_labels(
    scores: Float[AnyArray, "*batch C"], labels: Integer[AnyArray, "*batch"]
):
    r"""One-vs-all: $\log(1 + e^{-c_y}) + \sum_{j \ne y} \log(1 + e^{c_j})$ of each sample.

    It has C elements of one score each, and no two elements share the weights of a class.

    Arguments and errors are those of `psl_with_integer_labels`.
    """
    scores, labels = _check("one_vs_all_with_integer_labels", scores, labels)
    own = jax.nn.one_hot(labels, scores.shape[-1], dtype=bool)
    return _nan_outside(labels) * jnp.sum(one_score(scores, own), axis=-1)


def one_score(score: Float[AnyArray, "*batch"], own: Bool[AnyArray, "*batch"]):
    """One-vs-all loss of class j: `softplus(-score)` if the label is j, else `softplus(score)`.

    Args:
      score: `[...]`, the score $c_j$.
      own: `[...]`, bool, whether the label is $j$.
    """
    return jax.nn.softplus(jnp.where(own, -score, score))


def pair(
    scores: Float[AnyArray, "*batch 2"],
    weight: Float[AnyArray, "*batch"],
    margin_fn: MarginFn = exponential,
):
    r"""The element $h_{kj}$, equation (6c): two scores of the samples with label $k$.

    Args:
      scores: `[..., 2]`, the scores of $k$ and of $j$, for samples with label $k$.
      weight: `[...]`, the weight of each sample: $1/L$, where $L$ is the size of the **whole**
        batch, or 0 for padding.
      margin_fn: $\varphi$.

    Returns:
      A scalar.

    Raises:
      ValueError: scores of another shape.
    """
    if jnp.shape(scores) != (*jnp.shape(weight), 2):
        msg = (
            f"pair(scores, weight): scores have shape {jnp.shape(scores)} and weight "
            f"{jnp.shape(weight)}; pass scores [..., 2] and weight [...]."
        )
        raise ValueError(msg)
    return _weighted(weight, margin_fn, scores[..., 1] - scores[..., 0])


def block(
    scores: Float[AnyArray, "l slots s"],
    weight: Float[AnyArray, "l slots"],
    pairs: Shaped[AnyArray, "l s"],
    margin_fn: MarginFn = exponential,
):
    r"""Sum of the elements $h_{ab}$ among $s$ classes for which `pairs[a, b]` is not 0.

    Args:
      scores: `[l, slots, s]`, the scores of all $s$ classes for the samples of the first $l$
        classes. A slot is a place for a sample of a label; it may be empty.
      weight: `[l, slots]`, the weight of each sample: $1/L$, where $L$ is the size of the whole
        batch, or 0 for an empty slot.
      pairs: `[l, s]`, 1 or True for the ordered pairs (label, other) to sum; the diagonal is 0.
      margin_fn: $\varphi$.

    Returns:
      A scalar.

    Raises:
      ValueError: scores of another shape.
    """
    shape = jnp.shape(scores)
    fits = len(shape) == 3 and jnp.shape(weight) == shape[:2] and shape[0] <= shape[2]
    if not fits or jnp.shape(pairs) != (shape[0], shape[2]):
        msg = (
            f"block(scores, weight, pairs): scores {jnp.shape(scores)}, weight "
            f"{jnp.shape(weight)}, pairs {jnp.shape(pairs)}; pass scores [l, slots, s], weight "
            "[l, slots], pairs [l, s] with l <= s."
        )
        raise ValueError(msg)
    own = jnp.diagonal(scores, axis1=0, axis2=2).T[..., None]  # [l, slots, 1]
    used = jnp.where(pairs[:, None, :] != 0, weight[..., None], 0)
    return _weighted(used, margin_fn, scores - own)


def _weighted(weight: Float[AnyArray, "..."], margin_fn: MarginFn, margins: Float[AnyArray, "..."]):
    """Weighted sum over the margins. An empty slot counts 0, and so do its derivatives."""
    used = weight != 0
    return jnp.sum(jnp.where(used, weight, 0) * margin_fn(jnp.where(used, margins, 0)))


def _check(call: str, scores: Shaped[AnyArray, "..."], labels: Shaped[AnyArray, "..."]):
    scores, labels = jnp.asarray(scores), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        msg = f"{call}(scores, labels): labels are {labels.dtype}; pass integers in [0, C)."
        raise TypeError(msg)
    if scores.ndim != labels.ndim + 1 or scores.shape[:-1] != labels.shape:
        msg = (
            f"{call}(scores, labels): scores have shape {scores.shape} and labels {labels.shape}; "
            "pass scores [..., C] and labels [...]."
        )
        raise ValueError(msg)
    if scores.shape[-1] < 2:
        msg = f"{call}(scores, labels): {scores.shape[-1]} class; a margin needs two scores."
        raise ValueError(msg)
    return scores, int32_labels(labels, scores.shape[-1] - 1)


def _nan_outside(labels: Integer[AnyArray, "*batch"]):
    """A factor 1, or NaN for a label out of range, which makes the gradient NaN too."""
    return jnp.where(labels >= 0, 1.0, jnp.nan)


def margin_function(name: str, bound: float | None = None) -> MarginFn:
    """The margin function of a named loss.

    Args:
      name: `psl`, `psl-squared`, `psl-bounded`, `one-vs-each` or `squared-hinge`.
      bound: $B$ of the exponentials; None: their default.

    Raises:
      ValueError: the name is unknown, or the loss has no bound and one was passed.
    """
    table = {
        "psl": exponential,
        "psl-squared": squared_exponential,
        "psl-bounded": bounded_exponential,
        "one-vs-each": softplus,
        "squared-hinge": squared_hinge,
    }
    if name not in table:
        near = difflib.get_close_matches(str(name).lower(), table, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        msg = f"margin_function({name!r}): no such loss; pass one of {sorted(table)}.{hint}"
        raise ValueError(msg)
    if bound is None:
        return table[name]
    if not name.startswith("psl"):
        msg = f"margin_function({name!r}, bound={bound}): this loss has no bound; leave it out."
        raise ValueError(msg)
    return functools.partial(table[name], bound=bound)
