"""`check_elements`: whether the elements add up to the whole loss."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Num, PyTree

from psjax._select import select
from psjax._selection import Selection
from psjax._separable import value_and_grad
from psjax._types import Params
from psjax.axes import coupled_axes

_SHOWN = 8  # leaves in a message


def check_elements(
    element_fn: Callable[..., Any],
    whole_loss: Callable[..., Any],
    params: Any,
    selection: Selection,
    *args: Any,
    in_axes: Any = None,
    whole_args: tuple[Any, ...] | None = None,
    chunk_size: int | None = None,
    noise: float = 0.1,
    seed: int = 0,
    tolerance: float | None = None,
) -> None:
    r"""Raise unless the elements add up to the whole loss, in value and gradient.

    Elements that add up to another loss would train that loss, and no error would be raised.
    Therefore call this once before training, on the host, with a small batch. It compares
    $\sum_e \hat f_e(U_e w)$ and its gradient, from `psjax.value_and_grad`, with `whole_loss` and
    its gradient, at random parameters near the given ones.

    The message lists the leaves that differ, by how much, and a cause if one fits: samples chosen
    by the wrong index; a constant factor, such as a forgotten 1/L; a constant term; a loss that
    couples the samples of a batch, such as a batch normalisation; or a loss that couples more rows
    than any element has, such as a softmax over the scores, with the line of the program.

    Args:
      element_fn: as in `psjax.value_and_grad`.
      whole_loss: `whole_loss(params, *whole_args)` returns the scalar that the elements should sum
        to.
      params: parameters of the whole network.
      selection: the elements. Weights that its masks drop are zero in both losses.
      *args: further arguments of `element_fn`, such as a batch sorted by label.
      in_axes: as in `psjax.value_and_grad`: how `args` are mapped.
      whole_args: further arguments of `whole_loss`, such as the same samples as a flat batch. None:
        `args`.
      chunk_size: as in `psjax.value_and_grad`.
      noise: standard deviation of the noise added to every parameter, relative to the root mean
        square of its leaf (absolute if that is zero). 0 compares at the given parameters.
      seed: seed of the noise.
      tolerance: largest difference allowed. For the value, it is relative to the value; for a leaf,
        to its largest entry, or to 1/100 of the largest entry of all leaves. None: the square root
        of the machine epsilon, 3e-4 for float32. Data in half precision is widened to float32
        first; the default is then the epsilon of half precision, 8e-3 for bfloat16.

    Raises:
      ValueError: the value or a leaf of the gradient differs or is not finite.

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> from jax.sharding import PartitionSpec as P
      >>> w = jnp.array([1., 2., 3., 4.])
      >>> s = psjax.select(P("i"), {"i": [[0, 1], [1, 2], [2, 3]]}, like=w)
      >>> element = lambda u: u[0] * u[1]
      >>> whole = lambda w: jnp.sum(w[1:] * w[:-1])
      >>> psjax.check_elements(element, whole, w, s)
      >>> psjax.check_elements(
      ...     element, lambda w: whole(w) / 3, w, s, noise=0
      ... )  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      ...
      ValueError: check_elements: the elements do not add up to whole_loss.
        value: elements 20, whole 6.66667, ratio 3
        gradient, largest entries: elements 6, whole 2, difference 4
      Value and gradient of the elements are 3 times those of whole_loss. ...
    """
    tolerance = tolerance or _tolerance((params, args, whole_args))
    params, args, whole_args = jax.tree.map(_single, (params, args, whole_args))
    params = _near(params, noise, seed)
    own = args if whole_args is None else whole_args
    whole = lambda w: whole_loss(selection.masked(w), *own)
    elements = value_and_grad(element_fn, in_axes, chunk_size)
    with jax.default_matmul_precision("highest"):
        got = elements(params, selection, *args)
        _check_scalar(jax.eval_shape(whole, params))
        expected = jax.value_and_grad(whole)(params)
        compare = lambda got: _Comparison(got, expected, tolerance)
        found = compare(got)
        if found.equal:
            return
        agrees = lambda other: compare(elements(params, other, *args)).equal
        causes = _causes(found, whole, whole_loss, params, selection, args, own, seed, agrees)
        msg = f"{found.report()}\n{next(causes)}"
    raise ValueError(msg)


def _tolerance(tree: PyTree):
    """The square root of the epsilon of the computation, or the epsilon of the data."""
    dtypes = {jnp.result_type(x) for x in jax.tree.leaves(tree)} | {jnp.result_type(float)}
    floats = [jnp.finfo(x) for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
    eps, single = (float(x) for x in (max(f.eps for f in floats), jnp.finfo(jnp.float32).eps))
    return max(eps, min(eps, single) ** 0.5)


def _single(x: ArrayLike):
    """Widen to single precision at least: rounding in half precision is not tested here."""
    dtype = jnp.result_type(x)
    wide = jnp.issubdtype(dtype, jnp.floating)
    return jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)) if wide else x


def _near(params: Params, noise: float, seed: int):
    rng = np.random.default_rng(seed)

    def leaf(x: ArrayLike):
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            return x
        size = jnp.sqrt(jnp.mean(jnp.abs(x) ** 2))
        size = jnp.where(size > 0, size, jnp.ones_like(size))
        return x + noise * size * jnp.asarray(rng.normal(size=jnp.shape(x)), size.dtype)

    return jax.tree.map(leaf, params) if noise else params


def _check_scalar(value: Any):
    if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
        shown = jax.tree.map(lambda x: f"{x.dtype}{list(x.shape)}", value)
        msg = (
            f"check_elements: whole_loss must return a floating scalar, got {shown}. Sum or "
            "average over the batch inside it."
        )
        raise ValueError(msg)


class _Comparison:
    """Value and gradient of the elements beside those of the whole loss, in double precision."""

    def __init__(self, got: tuple[Any, Params], expected: tuple[Any, Params], tolerance: float):
        self.tolerance = tolerance
        wide = lambda x: np.asarray(
            x, np.complex128 if jnp.issubdtype(x.dtype, jnp.complexfloating) else np.float64
        )
        self.value, self.whole_value = float(got[0]), float(expected[0])
        self.paths = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(got[1])]
        self.grads = [wide(x) for x in jax.tree.leaves(got[1])]
        self.whole_grads = [wide(x) for x in jax.tree.leaves(expected[1])]
        self.finite = all(
            np.isfinite(x).all()
            for x in (self.value, self.whole_value, *self.grads, *self.whole_grads)
        )
        self.same_value = self.close_value(1)
        self.same = self.close_grads(1)
        self.equal = self.finite and self.same_value and all(self.same)

    def close_value(self, factor: float):
        whole = factor * self.whole_value
        return abs(self.value - whole) <= self.tolerance * max(abs(self.value), abs(whole))

    def close_grads(self, factor: float):
        """Which leaves agree. Small leaves are compared with 1/100 of the largest entry of all."""
        pairs = [(a, factor * b) for a, b in zip(self.grads, self.whole_grads)]
        sizes = [max(_largest(a), _largest(b)) for a, b in pairs]
        least = max(sizes, default=0) / 100
        return [
            _largest(a - b) <= self.tolerance * max(size, least)
            for (a, b), size in zip(pairs, sizes)
        ]

    def factor(self):
        """The number that all gradients of the whole loss are multiplied by, or None."""
        square = sum(np.vdot(b, b).real for b in self.whole_grads)
        if not square:
            return None
        product = sum(np.vdot(b, a).real for a, b in zip(self.grads, self.whole_grads))
        factor = float(product / square)
        return factor if factor and all(self.close_grads(factor)) else None

    def report(self):
        ratio = lambda a, b: f", ratio {a / b:.6g}" if b else ""
        lines = [
            "check_elements: the elements do not add up to whole_loss.",
            f"  value: elements {self.value:.6g}, whole {self.whole_value:.6g}"
            f"{ratio(self.value, self.whole_value)}",
        ]
        wrong = [i for i, same in enumerate(self.same) if not same]
        for i in wrong[:_SHOWN]:
            a, b = self.grads[i], self.whole_grads[i]
            lines.append(
                f"  gradient{' of ' * bool(self.paths[i])}{self.paths[i]}, largest entries: "
                f"elements {_largest(a):.6g}, whole {_largest(b):.6g}, difference "
                f"{_largest(a - b):.6g}"
            )
        if len(wrong) > _SHOWN:
            lines.append(f"  and {len(wrong) - _SHOWN} more leaves")
        if len(wrong) < len(self.same):
            lines.append(f"  the gradient agrees in {len(self.same) - len(wrong)} leaves")
        return "\n".join(lines)


def _largest(x: np.ndarray | np.number):
    return float(np.abs(x).max(initial=0))


def _causes(
    found: _Comparison,
    whole: Callable[[Params], Any],
    whole_loss: Callable[..., Any],
    params: Params,
    selection: Selection,
    args: tuple[Any, ...],
    own: tuple[Any, ...],
    seed: int,
    agrees: Callable[[Selection], bool],
) -> Iterator[str]:
    """Causes that fit, the surest first; each is tried only if the earlier ones do not fit."""
    if not found.finite:
        yield "Some numbers are NaN or Inf: pass other parameters or samples, or a smaller noise."
    for name, other, place, selected in _other_samples(selection, params):
        if agrees(selected):
            yield (
                f"They agree with indices {{{name!r}: {other}[:, {place}]}}, where {other} are the "
                f"indices of axis {other!r}: the elements see the wrong samples."
            )
    factor = found.factor()
    if factor is not None and not all(found.same):
        yield _of_factor(found, factor, args, own)
    if all(found.same):
        yield (
            f"The gradient agrees and the value differs by {found.value - found.whole_value:.6g}: "
            "a term that does not depend on the parameters, such as the exp(0) of a class compared "
            "with itself. Training is the same; leave the term out of whole_loss, or add it to the "
            "elements."
        )
    size = _couples_samples(whole_loss, selection.masked(params), own, found.tolerance, seed)
    if size:
        yield (
            f"whole_loss is not a sum over samples: what one sample adds depends on the others "
            f"(by {size:.2g} of the loss), as with a batch normalisation. An element sees other "
            "samples than the whole batch. Normalise each sample by itself, or with fixed "
            "statistics."
        )
    for name, rows, size in _coupled_rows(whole, params, selection, seed):
        if size > found.tolerance:
            yield (
                f"whole_loss is not a sum of functions of what single elements see: rows {rows} of "
                f"axis {name!r} act together (by {size:.2g} of the loss), and no element holds all "
                f"of them. {_step(whole, params, selection, name)}Leave the reduction out, or "
                "choose a loss that is a sum over the elements."
            )
    yield _of_leaves(found, selection)


def _step(whole: Callable[[Params], Any], params: Params, selection: Selection, name: str):
    """The step of the program that lets the rows of an axis act together, if it is found."""
    leaves, treedef = jax.tree.flatten(params)
    fn = lambda leaves: whole(treedef.unflatten(leaves))
    told = coupled_axes(fn, leaves, selection.specs, selection.sizes, [name])[name].coupled
    if told is None:
        return (
            "The network or its loss reduces over that axis, such as a norm or a softmax of the "
            "scores. "
        )
    return f"The network or its loss reduces over that axis: {told}. "


def _of_factor(found: _Comparison, factor: float, args: tuple[Any, ...], own: tuple[Any, ...]):
    times, many = (factor, "") if abs(factor) >= 1 else (1 / factor, "1/")
    what = f"{many}{times:.6g} times those of whole_loss"
    if found.close_value(factor):
        text = f"Value and gradient of the elements are {what}. "
    else:
        text = f"The gradient of the elements is {what}, but the value is not. "
    for label, tree in (("whole_args", own), ("args", args)):
        for path, x in jax.tree_util.tree_leaves_with_path(tree):
            shape = jnp.shape(x)
            if shape and shape[0] > 1 and abs(times - shape[0]) <= found.tolerance * shape[0]:
                where = f"{shape[0]} is the length of {label}{keystr(path)}"
                side = "whole_loss divides by it and element_fn does not"
                if many:
                    side = "element_fn divides by it and whole_loss does not, or it does so twice"
                return f"{text}{where}: {side} (a forgotten 1/L)."
    return (
        f"{text}A weight such as 1/L is missing or there twice, or the elements contain a term "
        "several times."
    )


def _of_leaves(found: _Comparison, selection: Selection):
    if found.same_value:
        return (
            "The value agrees and the gradient does not: a stop_gradient, a derivative rule of its "
            "own, or another branch of a maximum on one side."
        )
    own = [any(name in selection.indices for name in spec or ()) for spec in selection.specs]
    wrong = {is_own for is_own, same in zip(own, found.same) if not same}
    if all(found.same) or any(found.same) and len(wrong) == 2:
        return "No single cause fits; compare the two functions in the leaves above."
    if any(found.same) and len(wrong) == 1 and len(set(own)) == 2:
        kind = "with a selected axis" if wrong.pop() else "that every element sees whole"
        return f"Only leaves {kind} differ; compare what the two functions do with them."
    return (
        "No single cause fits: the two functions differ in the loss, in the samples and their "
        "weights, or in the rows that elements hold."
    )


def _other_samples(
    selection: Selection, params: Params
) -> Iterator[tuple[str, str, int, Selection]]:
    """The same elements with other samples: those of another row of a parameters' axis."""
    in_params = {name for spec in selection.specs for name in spec or ()} & set(selection.indices)
    indices = {name: np.asarray(rows) for name, rows in selection.indices.items()}
    if not np.all(selection.valid):
        return
    tree = jax.tree.structure(params)
    held = {
        name: [row[row < selection.sizes[name]] for row in rows] if rows.ndim == 2 else rows
        for name, rows in indices.items()
    }
    for name in sorted(set(indices) - in_params):
        for other in sorted(in_params):
            rows = indices[other]
            if indices[name].ndim != 1 or rows.ndim != 2:
                continue
            for place in range(min(rows.shape[1], _SHOWN)):
                row = rows[:, place]
                if row.max() >= selection.sizes[name] or (row == indices[name]).all():
                    continue
                axes = tree.unflatten(selection.specs)
                new = {**held, name: row}
                changed = select(axes, new, like=params, sizes=selection.sizes)
                if selection.keep is not None:
                    changed = changed.drop(tree.unflatten(selection.keep))
                yield name, other, place, changed


def _couples_samples(
    whole_loss: Callable[..., Any],
    params: Params,
    own: tuple[Any, ...],
    tolerance: float,
    seed: int,
):
    """How much the halves of a batch interact, relative to the loss; 0 below the tolerance."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(own)
    arrays = [
        x
        for x in leaves
        if jnp.ndim(x) and len(x) > 1 and jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]
    if not arrays:
        return 0
    moves = {id(x): np.std(x) * rng.normal(size=x.shape) / 2 for x in arrays}

    def loss(halves: Sequence[int]):
        def leaf(x: Any):
            if id(x) not in moves:
                return x
            first = np.arange(len(x)) < len(x) // 2
            moved = first * halves[0] + ~first * halves[1]
            moved = moved.reshape(-1, *[1] * (x.ndim - 1)) * moves[id(x)]
            return x + jnp.asarray(moved, x.dtype)

        return whole_loss(params, *treedef.unflatten(map(leaf, leaves)))

    size = _mixed_difference(loss, 2)
    return size if size > tolerance else 0


def _coupled_rows(
    whole: Callable[[Params], Any], params: Params, selection: Selection, seed: int
) -> Iterator[tuple[str, list[int], float]]:
    """How much rows of an axis interact if no element has all of them."""
    rng = np.random.default_rng(seed)
    leaves, treedef = jax.tree.flatten(params)
    for name, index in sorted(selection.indices.items()):
        index = np.asarray(index).reshape(len(selection.valid), -1)[np.asarray(selection.valid)]
        holds = np.zeros((len(index), selection.sizes[name] + 1), bool)
        np.put_along_axis(holds, index, True, axis=1)
        for rows in _not_held_together(holds[:, :-1], rng):
            moves = [
                jnp.asarray(rng.normal(size=x.shape) * (np.std(x) or 1), x.dtype)
                if name in (spec or ())
                else None
                for spec, x in zip(selection.specs, leaves)
            ]

            def loss(
                moved: Sequence[int],
                name: str = name,
                rows: np.ndarray = rows,
                moves: Sequence[Array | None] = moves,
            ):
                here = dict(zip(rows.tolist(), moved))
                factors = [here.get(i, 0) for i in range(selection.sizes[name])]
                new = [
                    x + _along(spec, name, np.array(factors), move)
                    for spec, x, move in zip(selection.specs, leaves, moves)
                ]
                return whole(treedef.unflatten(new))

            if any(move is not None for move in moves):
                yield name, rows.tolist(), _mixed_difference(loss, len(rows))


def _along(spec: P, name: str, factors: Num[np.ndarray, " size"], move: Array | None):
    if move is None:
        return 0
    d = spec.index(name)
    return jnp.asarray(factors.reshape([-1 if k == d else 1 for k in range(move.ndim)])) * move


def _not_held_together(holds: Bool[np.ndarray, "E size"], rng: np.random.Generator):
    """Up to three smallest sets of 4 rows or fewer, such that no element has a whole set."""
    size = holds.shape[1]
    for number in range(2, min(4, size) + 1):
        draws = [np.sort(rng.permutation(size)[:number]) for _ in range(50)]
        free = [rows for rows in draws if not holds[:, rows].all(axis=1).any()]
        if free:
            yield from free[:3]
            return


def _mixed_difference(loss: Callable[[Sequence[int]], Any], number: int):
    r"""Relative to the loss, $|\sum_S (-1)^{|S|} f(S)|$ over the subsets S of `number` changes.

    It is zero where f is a sum of functions each of which lacks one of the changes.
    """
    subsets = list(itertools.product((0, 1), repeat=number))
    values = [float(loss(subset)) for subset in subsets]
    signed = sum((-1) ** sum(subset) * value for subset, value in zip(subsets, values))
    return abs(signed) / max(map(abs, values)) if np.isfinite(values).all() and any(values) else 0.0
