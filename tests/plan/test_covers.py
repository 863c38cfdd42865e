"""Difference covers against the definition written out."""

import itertools
import math
import re

import numpy as np
import pytest

from psjax.plan import _covers
from psjax.plan._covers import difference_cover

TABLE = range(1, 129)


def differences(residues, modulus):
    found = set()
    for a in residues:
        for b in residues:
            found.add((a - b) % modulus)
    return found


def differences_by_fft(residues, modulus):
    """The same as a circular correlation."""
    indicator = np.zeros(modulus)
    indicator[list(residues)] = 1
    counts = np.fft.irfft(np.abs(np.fft.rfft(indicator)) ** 2, modulus)
    return set(np.flatnonzero(counts > 0.5).tolist())


def lower_bound(modulus):
    """The smallest size whose pairs are enough for every residue but 0."""
    return next(k for k in itertools.count(1) if k * (k - 1) >= modulus - 1)


def colbourn_ling(modulus):
    """Marks and length of the ruler of their theorem."""
    r = next(r for r in itertools.count() if modulus <= 24 * r**2 + 36 * r + 13)
    gaps = [1] * r + [r + 1] + [2 * r + 1] * r + [4 * r + 3] * (2 * r + 1)
    gaps += [2 * r + 2] * (r + 1) + [1] * r
    return len(gaps) + 1, sum(gaps)


def test_differences_in_the_table_are_all_residues():
    for modulus in TABLE:
        assert differences(difference_cover(modulus), modulus) == set(range(modulus)), modulus


def test_differences_beyond_the_table_are_all_residues():
    for modulus in [*range(129, 601), 5000, 20_011]:
        assert differences(difference_cover(modulus), modulus) == set(range(modulus)), modulus


def test_differences_are_all_residues_up_to_3000_by_fft():
    for modulus in [*range(1, 3001), 65_536]:
        found = differences_by_fft(difference_cover(modulus), modulus)
        assert found == set(range(modulus)), modulus


@pytest.mark.parametrize("modulus", [1, 2, 7, 128, 129, 600])
def test_a_cover_is_ascending_python_integers_from_zero(modulus):
    cover = difference_cover(modulus)
    assert isinstance(cover, tuple)
    assert all(type(residue) is int for residue in cover)
    assert cover[0] == 0
    assert list(cover) == sorted(set(cover))
    assert cover[-1] < modulus


def test_beyond_the_table_a_cover_is_no_larger_than_colbourn_and_lings():
    for modulus in range(129, 5000):
        size, (marks, length) = len(difference_cover(modulus)), colbourn_ling(modulus)
        assert modulus <= 2 * length + 1
        assert size <= marks <= math.sqrt(1.5 * modulus) + 6


def test_in_the_table_a_cover_is_no_larger_than_a_rulers():
    for modulus in TABLE:
        assert len(difference_cover(modulus)) <= colbourn_ling(modulus)[0]


def test_small_covers_are_smallest_by_brute_force():
    for modulus in range(2, 21):
        size = len(difference_cover(modulus))
        for rest in itertools.combinations(range(1, modulus), size - 2):  # with 0 one too few
            assert differences((0, *rest), modulus) != set(range(modulus))


def test_a_cover_has_a_pair_for_every_residue_but_0():
    for modulus in TABLE:
        size = len(difference_cover(modulus))
        assert size * (size - 1) >= modulus - 1
        assert size >= lower_bound(modulus)


def test_perfect_difference_sets_are_found():
    """Of the projective planes of order q, one a prime power: no residue twice."""
    for q in (2, 3, 4, 5, 7, 8, 9):
        assert len(difference_cover(q * q + q + 1)) == q + 1


def test_what_is_not_proved_is_above_the_bound():
    for modulus in _covers._UNPROVED:
        assert len(difference_cover(modulus)) > lower_bound(modulus)


def test_any_integer_is_one():
    for modulus in (7, 200):
        cover = difference_cover(np.prod([1, modulus]))
        assert cover == difference_cover(modulus)
        assert all(type(residue) is int for residue in cover)


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("num_groups", [0, -3, np.int64(0), 7.0, np.float32(7), "7", None])
def test_anything_but_a_positive_integer_is_refused(num_groups):
    message = re.escape(f"difference_cover(num_groups={num_groups}): pass a positive integer.")
    with pytest.raises(ValueError, match=message):
        difference_cover(num_groups)
