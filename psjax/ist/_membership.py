"""The subnets of a round, drawn from the seed and the number of the round alone."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from psjax._partition import partition_of
from psjax._selection import Selection
from psjax.axes import Axes


def membership(
    seed: Any,
    round_number: Any,
    axes: Any,
    sizes: Mapping[str, int],
    num_subnets: int,
    stratified: bool = False,
    like: Any = None,
) -> Selection:
    """Draw the subnets of one round from `(seed, round_number)` alone.

    Every worker draws the same subnets, so that no index has to be sent (section 4.4 of
    arXiv:1910.02120).

    Args:
      seed: integer from 0 to 2^32 - 1, or an integer array; may be traced.
      round_number: which round, an integer from 0 to 2^32 - 1; may be traced. The same number gives
        the same subnets.
      axes: as in `psjax.random_partition`.
      sizes: `{axis name: neurons}` of the axes to divide, such as `psjax.models.MLP.sizes`.
      num_subnets: number of subnets, n.
      stratified: see `psjax.random_partition`.
      like: see `psjax.random_partition`.

    Raises:
      ValueError: as `psjax.random_partition`; `psjax.infer_axes` found that an axis cannot be
        divided into independent parts, for example because it is normalised over; a seed or round
        number is out of range. Traced numbers are not checked.
      TypeError: a seed or a round that is not an integer.
    """
    _check_number("seed", seed)
    _check_number("round_number", round_number)
    _check_divisible(axes, sizes)
    key = jax.random.fold_in(jax.random.key(seed), round_number)
    count = ("num_subnets", num_subnets)
    return partition_of("membership", key, axes, sizes, count, stratified, like)


def _check_divisible(axes: Any, sizes: Mapping[str, Any]):
    if not isinstance(axes, Axes):
        return
    for name in sizes:
        axis = axes.axes.get(name)
        if axis is not None and not axis.divisible:
            why = axis.coupled or "the inputs have it too"
            msg = (
                f"membership(sizes=...): subnets of axis {name!r} are not independent: {why}. "
                f"Divide other axes; these can be: {axes.divisible}."
            )
            raise ValueError(msg)


def _check_number(name: str, x: Any):
    if isinstance(x, Tracer):
        return
    if (
        isinstance(x, bool)
        or not isinstance(x, int)
        and (np.ndim(x) or np.asarray(x).dtype.kind not in "iu")
    ):
        msg = f"membership({name}={x!r}): pass an integer."
        raise TypeError(msg)
    if not 0 <= int(x) < 2**32:
        # Some workers would cut a larger number to 32 bits, and others would not.
        msg = f"membership({name}={x}): pass an integer from 0 to 2**32 - 1."
        raise ValueError(msg)


def non_finite(selection: Selection, metrics: Any) -> str | None:
    """Name, in one line, the subnets that a round left out for NaN or Inf; None if there are none.

    Call it on the host.

    Args:
      selection: the selection of the round, `[E]`, or split, `[devices, E / devices]`.
      metrics: the metrics of the round, with the same leading shape.

    Raises:
      ValueError: the leading shapes differ.
    """
    finite, valid = np.asarray(metrics.finite), np.asarray(selection.valid)
    if finite.shape != valid.shape:
        msg = (
            f"non_finite: metrics.finite has shape {finite.shape} but the selection "
            f"{valid.shape}; pass the selection that the round was called with."
        )
        raise ValueError(msg)
    bad = np.flatnonzero(~finite & valid).tolist()  # split keeps the order, with padding last
    if not bad:
        return None
    return (
        f"subnets {bad} became NaN or Inf; their weights and optimizer state were left out and are "
        "as before the round."
    )
