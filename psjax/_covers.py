"""Difference covers: small sets of residues whose differences are all residues.

They make cyclic quorums: W sets, w + D modulo W, of which every two meet, and such that every two
of the W residues lie in one of them together. The table holds covers modulo 1 to 128, made and, but
for `_UNPROVED`, proved smallest by `python -m experiments.covers`. Its idea is that of W.-S. Luk,
T.-T. Wong, *Two new quorum based algorithms for distributed mutual exclusion*, ICDCS 1997, who
searched covers up to 111. Beyond it a construction is as good for the purpose: C. J. Colbourn,
A. C. H. Ling, *Quorums from difference covers*, Information Processing Letters 75, 2000.
"""

import math


def difference_cover(num_groups: int) -> tuple[int, ...]:
    r"""Residues D modulo W, few of them, with $D - D = \mathbb Z_W$.

    $|D| (|D| - 1) \ge W - 1$ whatever D. Up to W = 128 the cover comes from a table and, with the
    few exceptions named there, none is smaller. Beyond it is a ruler of B. Wichmann (*A note on
    restricted difference bases*, Journal of the London Mathematical Society 38, 1963): its marks
    measure every length up to its own, and a ruler of length L covers W up to 2L + 1. Colbourn and
    Ling take those with gaps $1^r, r + 1, (2r + 1)^r, (4r + 3)^s, (2r + 2)^{r + 1}, 1^r$ and
    $s = 2r + 1$, which have $6r + 4$ marks and cover $W \le 24 r^2 + 36 r + 13$; here r and s are
    those with the fewest marks. So $|D| \le \sqrt{1.5 W} + 6$.

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
    if not isinstance(num_groups, int) or num_groups < 1:
        msg = f"difference_cover(num_groups={num_groups}): write a positive integer."
        raise ValueError(msg)
    if num_groups <= len(_TABLE):
        return _TABLE[num_groups - 1]
    _, r, s = min(_ruler(num_groups, r) for r in range(math.isqrt(num_groups)))
    gaps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * s + [2 * r + 2] * (r + 1) + [1] * r
    marks = [0]
    for gap in gaps:
        marks.append(marks[-1] + gap)
    return tuple(sorted({mark % num_groups for mark in marks}))


def _ruler(num_groups, r):
    """Marks, r and least s of a ruler that measures half of the residues, and so covers them."""
    shortest = 4 * r * (r + 2) + 3
    s = max(0, -((shortest - num_groups // 2) // (4 * r + 3)))
    return 4 * r + s + 3, r, s


# For each W from 1 the size and what it is at least, because |D| (|D| - 1) >= W - 1.
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
    (0, 6, 13, 14, 18, 28, 32, 47, 49, 58, 71, 74),  # 94: 12, bound 11, not proved
    (0, 1, 6, 8, 11, 19, 23, 32, 48, 62, 68),  # 95: 11, bound 11
    (0, 2, 10, 11, 30, 43, 44, 47, 69, 78, 83, 90),  # 96: 12, bound 11, not proved
    (0, 1, 9, 22, 29, 33, 67, 71, 73, 83, 89, 92),  # 97: 12, bound 11, not proved
    (0, 7, 10, 11, 23, 26, 28, 35, 57, 65, 71, 77),  # 98: 12, bound 11, not proved
    (0, 9, 10, 52, 55, 58, 79, 84, 86, 90, 91, 95),  # 99: 12, bound 11, not proved
    (0, 3, 7, 19, 29, 30, 32, 50, 53, 58, 67, 73),  # 100: 12, bound 11, not proved
    (0, 12, 23, 32, 33, 38, 51, 60, 63, 67, 75, 77),  # 101: 12, bound 11, not proved
    (0, 3, 10, 12, 20, 36, 39, 49, 50, 54, 71, 77),  # 102: 12, bound 11, not proved
    (0, 3, 5, 15, 19, 46, 47, 55, 67, 73, 80, 84),  # 103: 12, bound 11, not proved
    (0, 17, 21, 22, 29, 32, 38, 47, 52, 65, 80, 102),  # 104: 12, bound 11, not proved
    (0, 1, 5, 21, 39, 56, 69, 73, 79, 82, 84, 98),  # 105: 12, bound 11, not proved
    (0, 12, 25, 32, 34, 36, 42, 58, 63, 77, 78, 81),  # 106: 12, bound 11, not proved
    (0, 16, 27, 35, 44, 45, 47, 49, 68, 70, 77, 83),  # 107: 12, bound 11, not proved
    (0, 9, 16, 18, 19, 38, 72, 76, 78, 80, 91, 103),  # 108: 12, bound 11, not proved
    (0, 26, 27, 39, 47, 49, 58, 63, 64, 67, 102, 106),  # 109: 12, bound 11, not proved
    (0, 11, 14, 15, 44, 63, 65, 70, 79, 85, 87, 97),  # 110: 12, bound 11, not proved
    (0, 18, 30, 31, 46, 53, 65, 70, 73, 75, 79, 90),  # 111: 12, bound 11, not proved
    (0, 2, 21, 22, 28, 31, 45, 58, 63, 70, 74, 78),  # 112: 12, bound 12
    (0, 6, 7, 8, 12, 23, 41, 44, 54, 63, 68, 93),  # 113: 12, bound 12
    (0, 9, 28, 36, 41, 42, 57, 59, 66, 69, 77, 99, 103),  # 114: 13, bound 12, not proved
    (0, 7, 10, 11, 53, 59, 61, 65, 68, 81, 86, 91, 105),  # 115: 13, bound 12, not proved
    (0, 20, 22, 27, 39, 45, 48, 58, 59, 74, 80, 88, 92),  # 116: 13, bound 12, not proved
    (0, 34, 39, 46, 58, 72, 74, 78, 86, 87, 96, 97, 114),  # 117: 13, bound 12, not proved
    (0, 12, 17, 32, 37, 47, 65, 68, 69, 76, 78, 84, 92),  # 118: 13, bound 12, not proved
    (0, 8, 9, 12, 14, 21, 25, 31, 49, 54, 65, 69, 101),  # 119: 13, bound 12, not proved
    (0, 13, 21, 36, 46, 50, 70, 76, 81, 88, 97, 98, 100),  # 120: 13, bound 12, not proved
    (0, 12, 16, 19, 21, 34, 38, 48, 49, 58, 81, 83, 89),  # 121: 13, bound 12, not proved
    (0, 22, 26, 28, 29, 34, 40, 50, 53, 73, 88, 105, 114),  # 122: 13, bound 12, not proved
    (0, 2, 10, 14, 17, 26, 35, 46, 65, 78, 83, 84, 106),  # 123: 13, bound 12, not proved
    (0, 11, 17, 21, 37, 40, 42, 67, 90, 94, 102, 103, 117),  # 124: 13, bound 12, not proved
    (0, 1, 2, 6, 24, 27, 38, 46, 53, 55, 68, 88, 115),  # 125: 13, bound 12, not proved
    (0, 7, 9, 12, 20, 23, 24, 42, 49, 56, 77, 83, 87),  # 126: 13, bound 12, not proved
    (0, 12, 28, 31, 42, 46, 52, 53, 55, 90, 113, 119, 122),  # 127: 13, bound 12, not proved
    (0, 16, 21, 22, 36, 40, 53, 82, 85, 92, 94, 117, 120),  # 128: 13, bound 12, not proved
)

# Moduli whose covers might not be the smallest.
_UNPROVED = (
    94,
    96,
    97,
    98,
    99,
    100,
    101,
    102,
    103,
    104,
    105,
    106,
    107,
    108,
    109,
    110,
    111,
    114,
    115,
    116,
    117,
    118,
    119,
    120,
    121,
    122,
    123,
    124,
    125,
    126,
    127,
    128,
)
