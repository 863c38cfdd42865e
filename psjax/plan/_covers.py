"""Difference covers: small sets of residues whose differences are all residues.

They make cyclic quorums: the W sets w + D modulo W. Every two of these sets meet, and every two of
the W residues are together in one of them. The table has covers modulo 1 to 128, made by
`python -m experiments.covers`. The same search proved that there are no smaller ones, except for
the moduli in `_UNPROVED`, where it did not finish. The idea of the search is from W.-S. Luk,
T.-T. Wong, *Two new quorum based algorithms for distributed mutual exclusion*, ICDCS 1997, who
searched covers up to 111. Covers beyond the table follow C. J. Colbourn, A. C. H. Ling, *Quorums
from difference covers*, Information Processing Letters 75, 2000.
"""

import math
import operator
from typing import SupportsIndex


def difference_cover(num_groups: SupportsIndex) -> tuple[int, ...]:
    r"""A small set of residues D modulo W with $D - D = \mathbb Z_W$.

    Every such set has $|D| (|D| - 1) \ge W - 1$. Up to W = 128, the cover is from a table; up to
    W = 113, no cover is smaller. Beyond the table, $|D| \le \sqrt{1.5 W} + 6$, and the cover is a
    ruler of B. Wichmann (*A note on restricted difference bases*, Journal of the London
    Mathematical Society 38, 1963). The marks of such a ruler measure every length up to its own, so
    that a ruler of length L covers W up to 2L + 1. Colbourn and Ling take rulers with the gaps
    $1^r, r + 1, (2r + 1)^r, (4r + 3)^s, (2r + 2)^{r + 1}, 1^r$ and $s = 2r + 1$, which have
    $6r + 4$ marks and cover $W \le 24 r^2 + 36 r + 13$. Here, r and s are chosen for the fewest
    marks.

    Args:
      num_groups: W.

    Returns:
      D, ascending, from 0.

    Raises:
      ValueError: W is not a positive integer.

    Example:
      >>> from psjax import plan
      >>> cover = plan.difference_cover(7)
      >>> sorted({(a - b) % 7 for a in cover for b in cover})
      [0, 1, 2, 3, 4, 5, 6]
    """
    try:
        modulus = operator.index(num_groups)
    except TypeError:
        modulus = 0
    if modulus < 1:
        msg = f"difference_cover(num_groups={num_groups}): pass a positive integer."
        raise ValueError(msg)
    if modulus <= len(_TABLE):
        return _TABLE[modulus - 1]
    _, r, s = min(_ruler(modulus, r) for r in range(math.isqrt(modulus)))
    gaps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s + [2 * r + 2] * (r + 1) + [1] * r
    marks = [0]
    for gap in gaps:
        marks.append(marks[-1] + gap)
    return tuple(sorted({mark % modulus for mark in marks}))


def _ruler(num_groups: int, r: int):
    """Marks, r and least s of a ruler that measures half of the residues and so covers all."""
    shortest = 4 * r * (r + 2) + 3
    s = max(0, -((shortest - num_groups // 2) // (4 * r + 3)))
    return 4 * r + s + 3, r, s


# Beside each cover: the modulus, the size, and the least k with k (k - 1) >= W - 1.
_TABLE = (
    (0,),  # 1: 1, bound 1
    (0, 1),  # 2: 2, bound 2
    (0, 2),  # 3: 2, bound 2
    (0, 2, 3),  # 4: 3, bound 3
    (0, 3, 4),  # 5: 3, bound 3
    (0, 1, 4),  # 6: 3, bound 3
    (0, 1, 3),  # 7: 3, bound 3
    (0, 2, 4, 5),  # 8: 4, bound 4
    (0, 2, 6, 7),  # 9: 4, bound 4
    (0, 2, 4, 5),  # 10: 4, bound 4
    (0, 2, 4, 5),  # 11: 4, bound 4
    (0, 4, 6, 7),  # 12: 4, bound 4
    (0, 1, 4, 6),  # 13: 4, bound 4
    (0, 6, 7, 10, 12),  # 14: 5, bound 5
    (0, 1, 3, 7, 8),  # 15: 5, bound 5
    (0, 3, 4, 11, 14),  # 16: 5, bound 5
    (0, 1, 4, 6, 8),  # 17: 5, bound 5
    (0, 1, 2, 5, 11),  # 18: 5, bound 5
    (0, 2, 5, 6, 14),  # 19: 5, bound 5
    (0, 1, 5, 6, 10, 18),  # 20: 6, bound 5
    (0, 10, 12, 17, 18),  # 21: 5, bound 5
    (0, 3, 4, 9, 10, 11),  # 22: 6, bound 6
    (0, 1, 3, 7, 14, 18),  # 23: 6, bound 6
    (0, 5, 11, 13, 14, 17),  # 24: 6, bound 6
    (0, 1, 3, 7, 12, 15),  # 25: 6, bound 6
    (0, 3, 7, 11, 12, 13),  # 26: 6, bound 6
    (0, 9, 14, 15, 16, 19),  # 27: 6, bound 6
    (0, 6, 7, 10, 21, 26),  # 28: 6, bound 6
    (0, 3, 4, 9, 10, 16, 18),  # 29: 7, bound 6
    (0, 1, 2, 6, 7, 12, 15),  # 30: 7, bound 6
    (0, 6, 10, 15, 17, 18),  # 31: 6, bound 6
    (0, 6, 8, 10, 11, 20, 27),  # 32: 7, bound 7
    (0, 1, 7, 11, 20, 23, 25),  # 33: 7, bound 7
    (0, 2, 5, 6, 16, 19, 27),  # 34: 7, bound 7
    (0, 1, 15, 19, 21, 23, 26),  # 35: 7, bound 7
    (0, 5, 12, 14, 20, 23, 24),  # 36: 7, bound 7
    (0, 1, 3, 5, 22, 28, 29),  # 37: 7, bound 7
    (0, 4, 8, 16, 17, 19, 24, 32),  # 38: 8, bound 7
    (0, 13, 18, 22, 23, 25, 33),  # 39: 7, bound 7
    (0, 5, 12, 15, 26, 30, 31, 32),  # 40: 8, bound 7
    (0, 4, 15, 16, 17, 22, 25, 36),  # 41: 8, bound 7
    (0, 1, 5, 7, 15, 16, 25, 28),  # 42: 8, bound 7
    (0, 3, 20, 23, 25, 27, 37, 38),  # 43: 8, bound 7
    (0, 5, 11, 13, 21, 22, 25, 37),  # 44: 8, bound 8
    (0, 3, 7, 8, 14, 23, 33, 35),  # 45: 8, bound 8
    (0, 3, 12, 16, 34, 35, 36, 41),  # 46: 8, bound 8
    (0, 1, 2, 5, 10, 16, 28, 35),  # 47: 8, bound 8
    (0, 5, 20, 28, 29, 32, 42, 46),  # 48: 8, bound 8
    (0, 18, 20, 27, 28, 30, 32, 43),  # 49: 8, bound 8
    (0, 11, 16, 29, 35, 36, 38, 46),  # 50: 8, bound 8
    (0, 3, 5, 8, 14, 15, 34, 38),  # 51: 8, bound 8
    (0, 1, 2, 3, 7, 12, 16, 25, 33),  # 52: 9, bound 8
    (0, 11, 13, 16, 19, 23, 31, 39, 40),  # 53: 9, bound 8
    (0, 14, 15, 19, 23, 25, 26, 36, 53),  # 54: 9, bound 8
    (0, 5, 6, 9, 15, 22, 30, 41, 43),  # 55: 9, bound 8
    (0, 4, 11, 14, 16, 20, 32, 33, 41),  # 56: 9, bound 8
    (0, 3, 21, 31, 33, 37, 38, 46),  # 57: 8, bound 8
    (0, 2, 4, 9, 19, 22, 25, 33, 34),  # 58: 9, bound 9
    (0, 4, 5, 29, 36, 37, 43, 46, 48),  # 59: 9, bound 9
    (0, 6, 7, 9, 10, 19, 30, 35, 52),  # 60: 9, bound 9
    (0, 6, 8, 11, 18, 34, 47, 48, 52),  # 61: 9, bound 9
    (0, 24, 29, 32, 41, 42, 51, 55, 57),  # 62: 9, bound 9
    (0, 2, 9, 10, 24, 28, 43, 49, 60),  # 63: 9, bound 9
    (0, 3, 7, 12, 13, 27, 29, 35, 46),  # 64: 9, bound 9
    (0, 2, 4, 5, 12, 20, 37, 43, 56),  # 65: 9, bound 9
    (0, 4, 25, 37, 38, 40, 45, 47, 56, 64),  # 66: 10, bound 9
    (0, 3, 17, 18, 20, 22, 29, 43, 51, 57),  # 67: 10, bound 9
    (0, 6, 7, 8, 10, 19, 24, 39, 48, 53),  # 68: 10, bound 9
    (0, 3, 7, 9, 15, 16, 17, 28, 49, 54),  # 69: 10, bound 9
    (0, 5, 9, 14, 21, 22, 24, 32, 49, 55),  # 70: 10, bound 9
    (0, 6, 9, 10, 18, 20, 25, 31, 44, 48),  # 71: 10, bound 9
    (0, 5, 11, 16, 18, 19, 35, 45, 47, 68),  # 72: 10, bound 9
    (0, 8, 24, 29, 47, 56, 66, 67, 69),  # 73: 9, bound 9
    (0, 2, 18, 30, 37, 40, 45, 50, 51, 54),  # 74: 10, bound 10
    (0, 16, 37, 40, 41, 46, 48, 60, 63, 73),  # 75: 10, bound 10
    (0, 11, 13, 20, 21, 25, 41, 44, 47, 59),  # 76: 10, bound 10
    (0, 19, 20, 23, 29, 37, 39, 50, 65, 72),  # 77: 10, bound 10
    (0, 7, 8, 19, 25, 29, 34, 62, 64, 65),  # 78: 10, bound 10
    (0, 9, 14, 19, 21, 27, 43, 44, 47, 58),  # 79: 10, bound 10
    (0, 11, 16, 29, 37, 44, 61, 68, 69, 71, 75),  # 80: 11, bound 10
    (0, 5, 12, 20, 33, 34, 35, 45, 51, 54, 77),  # 81: 11, bound 10
    (0, 12, 13, 16, 27, 36, 38, 46, 53, 59, 64),  # 82: 11, bound 10
    (0, 8, 22, 36, 37, 41, 44, 54, 60, 62, 71),  # 83: 11, bound 10
    (0, 7, 11, 13, 23, 29, 50, 59, 64, 65, 67),  # 84: 11, bound 10
    (0, 2, 8, 10, 25, 28, 29, 36, 41, 50, 63),  # 85: 11, bound 10
    (0, 4, 9, 19, 20, 21, 28, 41, 47, 50, 72),  # 86: 11, bound 10
    (0, 5, 16, 17, 23, 26, 31, 50, 72, 74, 78),  # 87: 11, bound 10
    (0, 2, 17, 34, 41, 54, 55, 60, 63, 74, 78),  # 88: 11, bound 10
    (0, 3, 8, 10, 14, 18, 26, 27, 47, 61, 67),  # 89: 11, bound 10
    (0, 11, 21, 30, 37, 45, 59, 60, 63, 65, 77),  # 90: 11, bound 10
    (0, 26, 27, 31, 34, 44, 46, 55, 69, 85),  # 91: 10, bound 10
    (0, 3, 5, 9, 20, 32, 42, 46, 76, 77, 84),  # 92: 11, bound 11
    (0, 21, 25, 30, 37, 40, 57, 58, 63, 69, 71),  # 93: 11, bound 11
    (0, 1, 13, 20, 23, 27, 31, 32, 56, 73, 77, 79),  # 94: 12, bound 11
    (0, 16, 23, 29, 31, 34, 43, 53, 57, 78, 79),  # 95: 11, bound 11
    (0, 4, 21, 32, 34, 39, 45, 48, 54, 57, 58, 88),  # 96: 12, bound 11
    (0, 9, 12, 16, 32, 45, 50, 51, 59, 61, 73, 76),  # 97: 12, bound 11
    (0, 4, 10, 16, 46, 47, 55, 70, 76, 81, 95, 96),  # 98: 12, bound 11
    (0, 4, 6, 14, 27, 36, 39, 40, 51, 56, 58, 67),  # 99: 12, bound 11
    (0, 6, 8, 9, 20, 25, 42, 46, 52, 70, 77, 93),  # 100: 12, bound 11
    (0, 4, 22, 27, 28, 36, 38, 40, 43, 53, 73, 82),  # 101: 12, bound 11
    (0, 1, 7, 15, 31, 32, 34, 38, 43, 56, 72, 82),  # 102: 12, bound 11
    (0, 7, 8, 11, 13, 22, 30, 51, 63, 69, 79, 89),  # 103: 12, bound 11
    (0, 3, 12, 17, 19, 37, 41, 47, 52, 64, 65, 73),  # 104: 12, bound 11
    (0, 6, 15, 17, 20, 32, 33, 45, 67, 74, 82, 101),  # 105: 12, bound 11
    (0, 5, 30, 31, 33, 39, 47, 51, 58, 74, 87, 96),  # 106: 12, bound 11
    (0, 12, 16, 19, 22, 27, 40, 51, 60, 74, 76, 77),  # 107: 12, bound 11
    (0, 3, 4, 10, 24, 26, 28, 39, 58, 66, 70, 75),  # 108: 12, bound 11
    (0, 16, 17, 21, 24, 29, 35, 44, 66, 68, 90, 100),  # 109: 12, bound 11
    (0, 5, 13, 37, 39, 48, 49, 51, 55, 70, 78, 95),  # 110: 12, bound 11
    (0, 10, 14, 16, 17, 29, 37, 51, 53, 62, 67, 93),  # 111: 12, bound 11
    (0, 6, 7, 10, 26, 28, 39, 53, 62, 70, 77, 82),  # 112: 12, bound 12
    (0, 26, 29, 50, 56, 59, 60, 62, 73, 78, 98, 105),  # 113: 12, bound 12
    (0, 7, 10, 16, 18, 40, 41, 55, 59, 68, 73, 76, 88),  # 114: 13, bound 12, not proved
    (0, 12, 16, 35, 43, 49, 64, 71, 73, 81, 84, 88, 89),  # 115: 13, bound 12, not proved
    (0, 15, 16, 21, 24, 41, 50, 54, 61, 63, 68, 73, 101),  # 116: 13, bound 12, not proved
    (0, 4, 8, 10, 16, 19, 35, 53, 57, 58, 71, 97, 104),  # 117: 13, bound 12, not proved
    (0, 5, 28, 34, 37, 38, 45, 55, 57, 77, 79, 92, 93),  # 118: 13, bound 12, not proved
    (0, 5, 6, 14, 18, 30, 40, 47, 50, 52, 71, 82, 110),  # 119: 13, bound 12, not proved
    (0, 9, 14, 17, 30, 36, 38, 58, 63, 69, 70, 73, 111),  # 120: 13, bound 12, not proved
    (0, 3, 5, 13, 20, 24, 32, 38, 45, 54, 95, 97, 98),  # 121: 13, bound 12, not proved
    (0, 4, 9, 10, 17, 52, 62, 71, 73, 82, 85, 98, 100),  # 122: 13, bound 12, not proved
    (0, 5, 17, 25, 34, 41, 43, 62, 63, 73, 76, 113, 117),  # 123: 13, bound 12, not proved
    (0, 7, 46, 47, 50, 59, 61, 79, 80, 83, 88, 108, 114),  # 124: 13, bound 12
    (0, 20, 29, 36, 42, 43, 46, 54, 69, 74, 101, 104, 106),  # 125: 13, bound 12, not proved
    (0, 7, 15, 18, 24, 51, 52, 53, 64, 74, 78, 83, 94),  # 126: 13, bound 12, not proved
    (0, 1, 8, 10, 22, 29, 71, 77, 81, 84, 111, 112, 117),  # 127: 13, bound 12, not proved
    (0, 6, 9, 10, 18, 51, 60, 75, 77, 82, 95, 98, 109),  # 128: 13, bound 12
)

# Moduli whose covers might not be the smallest.
_UNPROVED = (114, 115, 116, 117, 118, 119, 120, 121, 122, 123, 125, 126, 127)
