"""Which weights each score of a classifier depends on, for any function.

See section 5 of P. Raynaud, D. Orban, J. Bigeon, *Partially-separable loss to parallelize
partitioned neural network training*, G-2023-36; `psjax.structure.draw` draws figures 1, 3 and 5.
`_from_program` reads the program. The public names are in `psjax.structure`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.tree_util import keystr
from jaxtyping import Bool, PyTree

from psjax._like import check_like
from psjax._select import replicas
from psjax._types import Params
from psjax.structure._count import WeightCounts
from psjax.structure._from_program import Reading


class Cells(NamedTuple):
    """The weights of a leaf in cells: the same scores depend on all weights of a cell.

    Attributes:
      path: path of the leaf.
      holds: `bool[C, cells]`, which scores depend on a cell.
      kept: `int64[cells]`, number of weights that are kept.
      sizes: `int64[cells]`, number of weights.
    """

    path: tuple[Any, ...]
    holds: np.ndarray
    kept: np.ndarray
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dependencies:
    r"""Which weights each of C scores depends on; made by `dependencies`.

    Attributes:
      masks: tree like the parameters, `bool[C, ...]` that broadcasts to `[C, *leaf.shape]`. Row j
        is the diagonal of the paper's $U_j^\top U_j$. A dimension along which nothing changes has
        size 1.
      like: the parameters as `jax.ShapeDtypeStruct`s.
      how: tree like the parameters, `"program"` or `"jacobian"`: how a mask was found.
      order: tree like the parameters, int: the order in which the program reads the leaves.
    """

    masks: Any
    like: Any
    how: Any
    order: Any

    @property
    def num_classes(self) -> int:
        """Number of scores, C."""
        return len(jax.tree.leaves(self.masks)[0])

    @property
    def counts(self) -> WeightCounts:
        """Numbers of weights: `count()`."""
        return self.count()

    def cells(self, keep: Any = None) -> Iterator[Cells]:
        """The weights of every leaf, in groups on which the same scores depend.

        Args:
          keep: None, or a mask as in `Selection.drop`.

        Raises:
          ValueError, TypeError: from `Selection.drop`.
        """
        whole = replicas(self.like, 1)
        whole = whole if keep is None else whole.drop(keep)
        check_like("Dependencies", whole, self.like)
        leaves = jax.tree_util.tree_leaves_with_path(self.like)
        masks = whole.keep or [None] * len(leaves)
        for (path, x), holds, own in zip(leaves, jax.tree.leaves(self.masks), masks, strict=True):
            own = np.ones((), bool) if own is None else np.asarray(own)
            own = own.reshape((1,) * (len(x.shape) - own.ndim) + own.shape)
            cells = holds.shape[1:]
            rest = [d for d, n in enumerate(cells) if n == 1]
            size = math.prod(x.shape[d] for d in rest)
            times = math.prod(x.shape[d] for d in rest if own.shape[d] == 1)
            kept = own.sum(axis=tuple(rest), keepdims=True, dtype=np.int64) * times
            wide = lambda n, cells=cells: np.broadcast_to(n, cells).reshape(-1)
            yield Cells(path, holds.reshape(len(holds), -1), wide(kept), wide(np.int64(size)))

    def count(self, keep: Any = None) -> WeightCounts:
        """Count n, $n_j$, $n_{kj}$ and the common weights, as `psjax.structure.count` does.

        Args:
          keep: None, or a mask as in `Selection.drop`: count the weights that remain.

        Returns:
          `WeightCounts`. If scores or pairs depend on different numbers of weights, `score` and
          `element` are the largest. `n` includes weights that no score depends on.

        Raises:
          ValueError, TypeError: from `Selection.drop`.
        """
        shared, n, common = np.zeros((self.num_classes, self.num_classes)), 0, 0
        for own in self.cells(keep):
            holds = own.holds.astype(float)  # for faster products; exact below 2**53
            shared += (holds * own.kept) @ holds.T
            n += int(own.kept.sum())
            common += int(own.kept[own.holds.all(axis=0)].sum())
        scores = np.diag(shared)
        pairs = scores[:, None] + scores - shared
        np.fill_diagonal(pairs, 0)
        return WeightCounts(n, int(scores.max()), int(pairs.max()), common)

    def __str__(self):
        """The counts, and how they were found."""
        n, score, element, common = self.counts
        how = jax.tree.leaves(self.how)
        jacobian = how.count("jacobian")
        found = f"{jacobian} of {len(how)} leaves by Jacobians" if jacobian else "all leaves"
        found += ", the others" if 0 < jacobian < len(how) else ""
        found += " read off the program" if jacobian < len(how) else ""
        return (
            f"{self.num_classes} scores, {n} weights: {score} behind a score, {element} behind an "
            f"element, {common} behind every score\n({found})"
        )

    __repr__ = __str__


def dependencies(
    apply: Callable[..., Any], params: Any, *inputs: Any, axis: int | None = None
) -> Dependencies:
    r"""Find which weights each score of a classifier depends on.

    With $C$ scores $c_j(x; w) = \hat c_j(x; U_j w)$ (section 5.1), the rows of $U_j$ select the
    weights that score $j$ depends on. Nothing has to be annotated: psjax reads the traced program
    of `apply`. Suppose that rows of the parameters can be permuted together with the scores, and
    that no sum, maximum or other function combines several of them on the way to the scores. Then
    score $j$ depends on the rows $j$ alone. On every other weight, either all scores depend or
    none. Where the program does not tell, for example after a `log_softmax`, `from_jacobians` finds
    out at random weights.

    The program shows dependence of values, not of derivatives, and for whole leaves. A leaf that it
    reads counts in full: behind a `stop_gradient`, too, and a table of words of which a batch uses
    a few.

    Args:
      apply: `apply(params, *inputs)`, a pure function. Its result, or the first of its results, is
        the scores, `[..., C]`.
      params: its parameters, unboxed, or `jax.ShapeDtypeStruct`s of them. All arrays in it count as
        weights; let `apply` close over statistics and other constants.
      *inputs: arrays, or `jax.ShapeDtypeStruct`s; any batch size.
      axis: dimension of the result along which the scores lie. Default: the last.

    Returns:
      `Dependencies`: masks `[C, ...]` like the parameters, counts, and how each leaf was found.

    Raises:
      ValueError: the parameters have Flax boxes; there are fewer than two scores, or the result has
        no such dimension; the program does not tell, and the weights are abstract or the scores are
        not finite near them.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> def apply(w, x):  # x: [batch, 3]
      ...     hidden = jnp.tanh(x @ w["trunk"]).reshape(-1, 4, 2)  # [batch, C, 2]
      ...     return jnp.einsum("bci,ci->bc", hidden, w["own"])
      >>> w = {"trunk": jnp.ones((3, 8)), "own": jnp.ones((4, 2))}
      >>> found = psjax.structure.dependencies(apply, w, jnp.ones((5, 3)))
      >>> found.counts
      WeightCounts(n=32, score=8, element=16, common=0)
      >>> found.masks["trunk"][1, 0].astype(int)  # columns 2 and 3 belong to score 1
      array([0, 0, 1, 1, 0, 0, 0, 0])
    """
    like, reading = _reading("dependencies", apply, params, inputs, axis)
    told = reading.masks()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(params)
    open_ = [i for i, mask in enumerate(told) if mask is None]
    if open_:
        abstract = [keystr(path) for path, x in leaves if _is_abstract(x)]
        if abstract:
            msg = (
                f"dependencies(params=...): the program does not tell which weights of "
                f"{keystr(leaves[open_[0]][0])} each score depends on ({reading.reason}); "
                f"Jacobians do, but {abstract[0]} is abstract. Pass arrays."
            )
            raise ValueError(msg)
        found = jax.tree.leaves(from_jacobians(apply, params, *inputs, axis=axis))
        for i in open_:
            told[i] = found[i]
    how = ["jacobian" if i in open_ else "program" for i in range(len(told))]
    return Dependencies(
        *map(treedef.unflatten, (told, jax.tree.leaves(like), how, reading.order()))
    )


def from_program(
    apply: Callable[..., Any], params: Any, *inputs: Any, axis: int | None = None
) -> Any:
    """The masks of `dependencies`, read off the program alone.

    Returns:
      A tree like `params` of `bool[C, ...]`.

    Raises:
      ValueError: as `dependencies`; or the program does not tell for some leaf.
    """
    _, reading = _reading("from_program", apply, params, inputs, axis)
    found = reading.masks()
    if any(mask is None for mask in found):
        msg = f"from_program: the program does not tell: {reading.reason}."
        raise ValueError(msg)
    return jax.tree.structure(params).unflatten(found)


def from_jacobians(
    apply: Callable[..., Any],
    params: Any,
    *inputs: Any,
    axis: int | None = None,
    draws: int = 32,
    seed: int = 0,
) -> Any:
    r"""The masks of `dependencies`, from Jacobians of the scores at random weights.

    With random numbers $r_b$, one per row of the batch (and per other position), score $j$ depends
    on weight $w_i$ if $\partial \sum_b r_b c_j(x_b; w) / \partial w_i \ne 0$ in one of the draws.
    Without $r_b$, the sum could be constant, for example over a normalised batch.

    Each draw adds normal numbers to the given weights and inputs, with 1/4, 1/2, 1 or 2 times their
    root mean square. A leaf of positive numbers, such as variances, is multiplied and stays
    positive. A rectified unit that is 0 in all draws and samples seems to have no weights; if that
    may happen, pass more samples or draws.

    Args:
      apply: as in `dependencies`; JAX must be able to differentiate it in reverse mode.
      params: arrays. Leaves of integers have no derivative, and count for all scores.
      *inputs: arrays; abstract floating-point ones are drawn from a normal distribution.
      axis: as in `dependencies`.
      draws: number of draws.
      seed: seed of the draws.

    Returns:
      A tree like `params` of `bool[C, ...]`.

    Raises:
      ValueError: as `dependencies`; weights or integer inputs are abstract; the scores are not
        floating point, or are finite in no draw.
    """
    like, first, dim = _scores("from_jacobians", apply, params, inputs, axis)
    _check_numbers(params, inputs)
    leaves, treedef = jax.tree.flatten(params)
    real = [i for i, x in enumerate(leaves) if _is_inexact(x)]
    scores = jax.eval_shape(first, like, *inputs)
    others = scores.shape[:dim] + scores.shape[dim + 1 :]

    def score(own: PyTree, args: Any):
        full = dict(enumerate(leaves)) | dict(zip(real, own))
        result = first(treedef.unflatten([full[i] for i in range(len(leaves))]), *args)
        return jnp.moveaxis(result, dim, 0)

    @jax.jit
    def nonzero(own: PyTree, args: Any, factors: PyTree):
        values, back = jax.vjp(lambda own: score(own, args), own)

        def row(j: Any):
            (grads,) = back(jnp.zeros_like(values).at[j].set(factors))
            return [(g != 0) & jnp.isfinite(g) for g in grads]

        return jax.lax.map(row, jnp.arange(len(values))), jnp.isfinite(values).all()

    rng = np.random.default_rng(seed)
    found: list[Any] = [np.zeros((scores.shape[dim], *leaves[i].shape), bool) for i in real]
    finite = False
    for draw in range(draws):
        own, args = jax.tree.map(
            lambda x, spread=2.0 ** (draw % 4 - 2): _near(rng, x, spread),
            ([leaves[i] for i in real], inputs),
        )
        masks, fine = nonzero(own, args, jnp.asarray(rng.normal(size=others), scores.dtype))
        found = [a | np.asarray(b) for a, b in zip(found, masks)]
        finite |= bool(fine)
    if not finite:
        msg = f"from_jacobians: in none of {draws} draws of the weights were all scores finite."
        raise ValueError(msg)
    masks = [np.ones((scores.shape[dim],) + (1,) * np.ndim(x), bool) for x in leaves]
    for i, mask in zip(real, found):
        masks[i] = _narrow(mask)
    return treedef.unflatten(masks)


def _narrow(mask: Bool[np.ndarray, "..."]):
    """A mask with size 1 along the dimensions in which it does not change."""
    for d in range(1, mask.ndim):
        first = mask.take([0], d) if mask.shape[d] else np.zeros_like(mask, shape=())
        if mask.shape[d] and (mask == first).all():
            mask = first
    return mask


def _is_abstract(x: Any):
    return isinstance(x, jax.ShapeDtypeStruct)


def _is_inexact(x: Any):
    return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def _near(rng: np.random.Generator, x: Any, spread: float):
    """Random numbers near the given ones, or in place of abstract ones."""
    if not _is_inexact(x):
        return x
    noise = rng.normal(size=np.shape(x))
    if not _is_abstract(x):
        given = np.asarray(x)
        scale = float(np.sqrt(np.mean(np.abs(given) ** 2))) if given.size else 0.0
        positive = not np.iscomplexobj(given) and (given > 0).all()
        noise = (
            given * np.exp(spread * noise) if positive else given + spread * (scale or 1) * noise
        )
    return jnp.asarray(noise, jnp.result_type(x))


def _check_numbers(params: Params, inputs: tuple[Any, ...]):
    """Raise if numbers are missing that cannot be drawn."""
    for path, x in jax.tree_util.tree_leaves_with_path((params, inputs)):
        weight = path[0].idx == 0
        if _is_abstract(x) and (weight or not _is_inexact(x)):
            call = "params" if weight else "inputs"
            msg = (
                f"from_jacobians({call}=...): {keystr(path[1:])} is {x.dtype}{list(x.shape)} "
                "without numbers; pass an array."
            )
            raise ValueError(msg)


def _reading(
    call: str, apply: Callable[..., Any], params: Params, inputs: tuple[Any, ...], axis: int | None
):
    like, first, dim = _scores(call, apply, params, inputs, axis)
    return like, Reading(first, like, inputs, dim)


def _scores(
    call: str, apply: Callable[..., Any], params: Params, inputs: tuple[Any, ...], axis: int | None
):
    """Shapes of the parameters, the function of the scores alone, and their dimension."""
    is_box = lambda x: isinstance(x, meta.AxisMetadata)
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
    for path, x in leaves:
        if is_box(x):
            msg = (
                f"{call}(params=...): {keystr(path)} is a {type(x).__name__} of Flax; pass "
                "flax.linen.unbox(params)."
            )
            raise ValueError(msg)
    if not leaves:
        msg = f"{call}(params=...): the parameters have no arrays."
        raise ValueError(msg)
    first = lambda p, *xs: jax.tree.leaves(apply(p, *xs))[0]
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), params)
    result = jax.eval_shape(first, like, *inputs)
    ndim = len(result.shape)
    dim = ndim - 1 if axis is None else axis
    if not -ndim <= dim < ndim:
        msg = (
            f"{call}(axis={axis}): the result has shape {list(result.shape)}; the scores must be "
            "one of its dimensions."
        )
        raise ValueError(msg)
    if not jnp.issubdtype(result.dtype, jnp.inexact) or result.shape[dim] < 2:
        msg = (
            f"{call}(apply=...): the first result is {result.dtype}{list(result.shape)}; it must "
            f"be the scores of two classes or more along dimension {dim}, in floating point."
        )
        raise ValueError(msg)
    return like, first, dim % ndim
