"""Runs, which are consecutive elements that see the same rows of some axes; and their parts."""

from collections.abc import Collection

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from psjax._types import AnyArray


def runs_of(
    indices: dict[str, np.ndarray], samples: Collection[str]
) -> tuple[int, tuple[str, ...]]:
    """Find, on the host, the length of runs and the axes of which they have equal rows.

    Args:
      indices: as in a `Selection`.
      samples: names of the axes that no parameter has. A run should share as many of these as
        possible: computations on them and on shared leaves, such as a network's trunk, are done
        once per run.

    Returns:
      `run_length` and `run_axes` of the `Selection`.
    """
    lengths = {}
    for name, index in indices.items():
        rows = np.asarray(index).reshape(len(index), -1)
        lengths[name] = _common_length(np.any(rows[1:] != rows[:-1], axis=1), len(rows))
    same = lambda n: [name for name, of_axis in lengths.items() if of_axis % n == 0]
    number = lambda n: len([name for name in same(n) if name in samples])
    found = max((n for n in lengths.values() if n > 1), key=lambda n: (number(n), n), default=1)
    return found, tuple(sorted(same(found))) if found > 1 else ()


def length_of(run: np.ndarray) -> int:
    """The common length of runs of equal numbers: the common divisor of their lengths."""
    return _common_length(run[1:] != run[:-1], len(run))


def _common_length(changes: Bool[np.ndarray, " n"], total: int):
    return int(np.gcd.reduce(np.flatnonzero(changes) + 1, initial=total))


def part_of_run(num_elements: int, run_length: int, n: int) -> int:
    """How many elements a part of a run should have, so that n workers get equally many parts.

    A part of p elements costs p elements and one evaluation of what they share.
    """
    parts = [p for p in range(1, run_length + 1) if run_length % p == 0]
    return min(parts, key=lambda p: p * -(-num_elements // (n * p)) * (p + 1) / p)


def cut(x: Shaped[AnyArray, "E ..."], n: int, size: int, last: bool | None = None):
    """`[E, ...] -> [n, size, ...]`, padded with the last row or `last`; NumPy in, NumPy out."""
    xp = np if on_host(x) else jnp
    pad = n * size - x.shape[0]
    if pad:
        end = x[-1:] if last is None else xp.full((1, *x.shape[1:]), last, x.dtype)
        x = xp.concatenate([x, xp.broadcast_to(end, (pad, *x.shape[1:]))])
    return x.reshape(n, size, *x.shape[1:])


def cut_each(x: Shaped[AnyArray, "E ..."], run_length: int, cuts: int, size: int):
    """Cut each run into `cuts` parts of `size`, padded: `[E, ...] -> [runs * cuts, size, ...]`."""
    runs = x.reshape(-1, run_length, *x.shape[1:])
    places = np.minimum(np.arange(cuts * size), run_length - 1)
    return runs[:, places].reshape(-1, size, *x.shape[1:])


def on_host(x: object) -> bool:
    """Whether an array is a NumPy array."""
    return isinstance(x, np.ndarray | np.generic)
