"""The search that made the table of difference covers, run by `python -m experiments.covers`.

Sizes are tried from the lower bound on. `anneal` looks for a cover; where it finds none, `exhaust`
looks at all sets, up to symmetry, and either finds one or proves that there is none.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np

LARGEST = 128  # residues as the bits of two words, differences up to their sign as those of one


def lower_bound(modulus: int) -> int:
    """The least k with k (k - 1) >= modulus - 1."""
    return next(k for k in itertools.count(1) if k * (k - 1) >= modulus - 1)


def is_cover(residues, modulus: int) -> bool:
    """Whether every residue is the difference of two of these."""
    return len({(a - b) % modulus for a in residues for b in residues}) == modulus


# ------------------------------------------------------------------------------------------ finding


def anneal(
    modulus: int,
    size: int,
    rng: np.random.Generator,
    steps: int,
    *,
    chains: int = 64,
    temperature: float = 0.5,
) -> tuple[int, ...] | None:
    """A cover by Gibbs sampling: one element leaves, any residue comes in its place.

    A residue is drawn with probability proportional to exp(-missing differences / temperature),
    in many chains at once, all at one temperature.

    Args:
      modulus: 1 to 128.
      size: how many elements.
      rng: what is drawn comes from here.
      steps: in each of the chains.
      chains: as many sets side by side.
      temperature: in missing differences.

    Returns:
      A cover, sorted and with 0, or None.
    """
    pairs, half = _pairs(modulus), modulus // 2
    sets = np.argsort(rng.random((chains, modulus)), axis=1)[:, :size]
    i, j = np.triu_indices(size - 1, 1)
    for _ in range(steps):
        rest = sets[:, rng.permutation(size)[1:]]
        covered = np.bitwise_or.reduce(pairs[rest], axis=1)  # [chains, modulus], by what is new
        covered |= np.bitwise_or.reduce(pairs[rest[:, i], rest[:, j]], axis=1)[:, None]
        missing = half - np.bitwise_count(covered).astype(np.float32)
        if missing.min() == 0:
            chain, new = np.argwhere(missing == 0)[0]
            return _normalised([*rest[chain], new], modulus)
        drawn = np.argmin(missing - temperature * rng.gumbel(size=missing.shape), axis=1)
        sets = np.concatenate([rest, drawn[:, None]], axis=1)
    return None


# ------------------------------------------------------------------------------------------ proving


class TooManySets(Exception):
    """`covers` has looked at as many sets as it may."""


def exhaust(
    modulus: int,
    size: int,
    max_sets: float = math.inf,
    progress: Callable[[int], object] = lambda sets: None,
) -> tuple[tuple[int, ...] | None, bool]:
    """The first of `covers`, and whether the search came to an end: `(None, True)` is a proof."""
    try:
        return next(covers(modulus, size, max_sets, progress), None), True
    except TooManySets:
        return None, False


def covers(
    modulus: int,
    size: int,
    max_sets: float = math.inf,
    progress: Callable[[int], object] = lambda sets: None,
) -> Iterator[tuple[int, ...]]:
    r"""Of every cover an image under $x \mapsto ux + v$, u a unit, or several.

    A cover has two elements with difference 1, so it has an image that begins 0, 1, c. The triples
    {0, 1, c} fall into classes under the maps. Class by class, from its representative on, sets
    grow by larger and larger residues, none of which may complete a triple of an earlier class:
    covers with such a triple are found there. {0, 1, 2} is its own image under $x \mapsto 2 - x$;
    of the rest and its image the one with the smaller first residue will do.

    A set that lacks r elements is left when its differences cannot become complete: they make
    r (r - 1) / 2 among themselves at most, and each of them with the set at most as many new ones
    as the best candidate makes.

    Args:
      modulus: 4 to 128.
      size: how many elements; at least 4.
      max_sets: look at no more.
      progress: called with the number of sets looked at since the last call.

    Yields:
      Covers, sorted and with 0.

    Raises:
      TooManySets: there are more than `max_sets`.
    """
    pairs, half, residues = _pairs(modulus), modulus // 2, np.arange(modulus)
    difference = (residues - residues[:, None]) % modulus
    classes = _triple_classes(modulus)
    above = _words(residues > residues[:, None])
    below_mirrored = _words(residues <= modulus + 2 - residues[:, None])
    seen = 0
    for c in np.unique(classes[1, classes[1] < modulus]):
        earlier = classes < c  # [second - first, third - first]
        forbidden = _words(earlier[difference[:, :, None], difference[:, None, :]])
        free = _words(~np.isin(residues, [0, 1, c]))
        free = free & ~forbidden[0, 1] & ~forbidden[0, c] & ~forbidden[1, c]
        # Sets [n, elements], their differences [n], the residues that may come yet [n, words].
        start = np.array([[0, 1, c]]), pairs[0, 1] | pairs[0, c] | pairs[1, c], free
        stack = [(start[0], start[1][None], start[2][None])]
        while stack:
            sets, covered, free = stack.pop()
            if len(sets) > _AT_ONCE:
                stack.append((sets[_AT_ONCE:], covered[_AT_ONCE:], free[_AT_ONCE:]))
                sets, covered, free = sets[:_AT_ONCE], covered[:_AT_ONCE], free[:_AT_ONCE]
            elements = sets.shape[1]
            lacking = size - elements
            row, new = np.nonzero(_residues(free))
            progress(len(row))
            seen += len(row)
            if seen > max_sets:
                raise TooManySets
            if not len(row):
                continue
            grown = covered[row]
            for i in range(elements):
                grown |= pairs[sets[row, i], new]

            missing = half - np.bitwise_count(grown).astype(np.int64)
            starts = np.flatnonzero(np.diff(row, prepend=-1))
            before = half - np.bitwise_count(covered[row[starts]]).astype(np.int64)
            most = before - np.minimum.reduceat(missing, starts)  # new differences by one element
            among = lacking * (lacking - 1) // 2
            reach = half - np.bitwise_count(np.bitwise_or.reduceat(grown, starts))
            bound = np.where(reach <= among, (lacking - 1) * most + among, -1)
            keep = missing <= np.repeat(bound, np.diff(starts, append=len(row)))
            row, new, grown = row[keep], new[keep], grown[keep]
            if not len(row):
                continue
            if lacking == 1:
                yield from (_normalised([*sets[r], x], modulus) for r, x in zip(row, new))
                continue

            kept = np.zeros((len(sets), modulus), bool)
            kept[row, new] = True  # what is too bad for a set is too bad for its supersets
            free = _words(kept)[row] & above[new]
            if c == 2 and elements == 3:
                free &= below_mirrored[new]
            if earlier.any():
                for i in range(elements):
                    free &= ~forbidden[sets[row, i], new]
            enough = np.bitwise_count(free).sum(axis=1) >= lacking - 1
            if enough.any():
                grown_sets = np.concatenate([sets[row], new[:, None]], axis=1)
                stack.append((grown_sets[enough], grown[enough], free[enough]))


_AT_ONCE = 1 << 14  # sets that grow together


def _pairs(modulus):
    """The difference of two residues, up to its sign, as a bit: uint64 `[modulus, modulus]`."""
    residues = np.arange(modulus)
    distance = np.abs(residues - residues[:, None])
    distance = np.minimum(distance, modulus - distance)
    bits = np.uint64(1) << np.maximum(distance - 1, 0).astype(np.uint64)
    return np.where(distance > 0, bits, np.uint64(0))


def _triple_classes(modulus):
    """Class of the triple 0, x, y at `[x, y]`: its least c such that {0, 1, c} is an image of it.

    `modulus` where no two of them differ by a unit, and where two of them are equal.
    """
    residues = np.arange(modulus)
    units = [u for u in range(1, modulus) if math.gcd(u, modulus) == 1]
    inverse = np.zeros(modulus, int)
    inverse[units] = [pow(u, -1, modulus) for u in units]
    x, y = np.broadcast_arrays(residues[:, None], residues)
    classes = np.full((modulus, modulus), modulus)
    for a, b, third in itertools.permutations((np.zeros_like(x), x, y)):
        inverted = inverse[(b - a) % modulus]
        image = (third - a) * inverted % modulus
        classes = np.where(inverted > 0, np.minimum(classes, image), classes)
    classes[(x == 0) | (y == 0) | (x == y)] = modulus
    return classes


def _words(member):
    """Sets of residues, bool `[..., modulus]`, as uint64 `[..., 2]`."""
    whole = np.zeros((*member.shape[:-1], LARGEST), bool)
    whole[..., : member.shape[-1]] = member
    return np.packbits(whole, axis=-1, bitorder="little").view(np.uint64)


def _residues(words):
    """The other way: bool `[..., 128]`."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    return np.unpackbits(octets, axis=-1, bitorder="little").view(bool)


def _normalised(residues, modulus):
    """Sorted, moved so that it begins with 0."""
    least = min(residues)
    return tuple(sorted(int(x - least) % modulus for x in residues))
