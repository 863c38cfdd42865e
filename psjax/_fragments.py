"""Which leaves workers exchange in which round."""

import dataclasses
import math
from typing import Any

import jax

from psjax._select import flat_specs


@dataclasses.dataclass(frozen=True)
class Fragments:
    """Groups of leaves, of which each round sends one; made by `psjax.fragments`.

    Attributes:
      groups: the fragment of every leaf, flat.
      paths: the path of every leaf.
      num_fragments: F.
      delay: rounds between sending and using.
      mixing: what a worker keeps of its own weights when a fragment arrives.
    """

    groups: tuple[int, ...]
    paths: tuple[str, ...]
    num_fragments: int
    delay: int = 0
    mixing: float = 0.0

    def leaves(self, number: int) -> list[int]:
        """The leaves of a fragment, by number."""
        return [i for i, group in enumerate(self.groups) if group == number]


def fragments(
    axes: Any, num_fragments: int, like: Any = None, *, delay: int = 0, mixing: float = 0.0
) -> Fragments:
    r"""Divide the leaves of the parameters among rounds: round r exchanges fragment r mod F.

    A. Douillard et al., *Streaming DiLoCo with overlapping communication*, arXiv:2501.18512. A
    round sends a part of the weights, so that the peak of the traffic falls by F. Each worker goes
    on from its own weights; the shared ones change when a fragment has been exchanged. What was
    sent in round r is used at the end of round $r + d$, and may travel meanwhile. The worker then
    goes on from $\alpha$ of its own and $1 - \alpha$ of the shared weights of the fragment.

    Pass the result to `psjax.codec.compress`. Workers hold all weights (`psjax.replicas`).

    Args:
      axes: as in `psjax.select`, one entry per leaf; or, with `like`, a prefix tree or None.
      num_fragments: F.
      like: the parameters, or shapes of them: leaves are then divided into fragments of about equal
        size, and else in turn. `psjax.infer_axes` returns axes that know it.
      delay: d, at most F - 1: a fragment is used before it is sent again.
      mixing: $\alpha$ in [0, 1).

    Raises:
      ValueError: F that is not from 1 to the number of leaves, a delay outside 0 to F - 1, a mixing
        outside [0, 1).

    Example:
      >>> import jax.numpy as jnp, psjax
      >>> w = {"a": jnp.ones(8), "b": jnp.ones(3), "c": jnp.ones(4)}
      >>> psjax.fragments(None, 2, like=w).groups  # the fragments of a, b and c
      (0, 1, 1)
    """
    like = getattr(axes, "like", None) if like is None else like
    paths = flat_specs("fragments", axes, like)[1]
    shapes = [()] * len(paths) if like is None else [x.shape for x in jax.tree.leaves(like)]
    if not 1 <= num_fragments <= len(paths):
        msg = (
            f"fragments(num_fragments={num_fragments}): the parameters have {len(paths)} leaves; "
            f"pass a number from 1 to {len(paths)}."
        )
        raise ValueError(msg)
    if not 0 <= delay < num_fragments:
        msg = (
            f"fragments(delay={delay}): a fragment is sent every {num_fragments} rounds and must "
            f"be used before; pass a delay from 0 to {num_fragments - 1}."
        )
        raise ValueError(msg)
    if not 0 <= mixing < 1:
        msg = f"fragments(mixing={mixing}): pass the share of a worker's own weights, in [0, 1)."
        raise ValueError(msg)
    sizes, groups = [0] * num_fragments, [0] * len(paths)
    for i in sorted(range(len(paths)), key=lambda i: -math.prod(shapes[i])):
        groups[i] = sizes.index(min(sizes))
        sizes[groups[i]] += math.prod(shapes[i])
    return Fragments(tuple(groups), paths, num_fragments, delay, float(mixing))
