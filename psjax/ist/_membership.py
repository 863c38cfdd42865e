"""The subnets of a round, from the seed and the number of the round alone."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from psjax._partition import random_partition
from psjax._selection import Selection


def membership(
    seed: Any,
    round_number: Any,
    axes: Any,
    sizes: Mapping[str, int],
    num_subnets: int,
    stratified: bool = False,
) -> Selection:
    """The subnets of one round, from `(seed, round_number)` alone: every worker derives the same.

    Section 4.4: no index travels, for all workers share the generator.

    Args:
      seed: integer, or an integer array; may be traced.
      round_number: which round, from 0; the same number gives the same subnets.
      axes: tree of `PartitionSpec`s, as in `psjax.select`.
      sizes: `{axis name: neurons}` of the axes to divide, such as `psjax.models.MLP.sizes`.
      num_subnets: n.
      stratified: see `psjax.random_partition`.

    Raises:
      ValueError: the number of the round is negative, or 2^32 or more.
    """
    if isinstance(round_number, int | np.integer) and not 0 <= round_number < 2**32:
        msg = f"membership(round_number={round_number}): it must be from 0 to {2**32 - 1}."
        raise ValueError(msg)
    key = jax.random.fold_in(jax.random.key(seed), round_number)
    return random_partition(key, axes, sizes, num_elements=num_subnets, stratified=stratified)


def non_finite(selection: Selection, metrics: Any) -> str | None:
    """A line that names the subnets a round left out for NaN or Inf, or None: for the host.

    Args:
      selection: that of the round, whole `[E]` or as `split` divided it, `[devices, E / devices]`.
      metrics: the round's, of the same leading shape.

    Raises:
      ValueError: other shapes.
    """
    finite, valid = np.asarray(metrics.finite), np.asarray(selection.valid)
    if finite.shape != valid.shape:
        msg = (
            f"non_finite: metrics.finite has shape {finite.shape} but the selection "
            f"{valid.shape}; give the selection that the round was called with."
        )
        raise ValueError(msg)
    bad = np.flatnonzero(~finite & valid).tolist()  # split keeps the order, its padding is last
    if not bad:
        return None
    return (
        f"subnets {bad} became NaN or Inf; their weights and optimizer state were left out and are "
        "as before the round."
    )
