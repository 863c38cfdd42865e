"""The search behind the table of difference covers, against the definition written out."""

import itertools
import math

import numpy as np
import pytest

from experiments import cover_search as search
from psjax.plan import difference_cover


def differences(residues, modulus):
    return {(a - b) % modulus for a in residues for b in residues}


@pytest.mark.parametrize("modulus", range(1, 129))
def test_the_table_is_not_below_the_bound(modulus):
    assert len(difference_cover(modulus)) >= search.lower_bound(modulus)


@pytest.mark.parametrize("modulus", range(8, 15))
@pytest.mark.parametrize("size", [4, 5])
def test_exhaust_finds_a_cover_just_where_there_is_one(modulus, size):
    exists = any(
        len(differences((0, *rest), modulus)) == modulus
        for rest in itertools.combinations(range(1, modulus), size - 1)
    )
    cover, finished = search.exhaust(modulus, size)
    assert finished
    assert (cover is not None) == exists
    if cover is not None:
        assert len(cover) == size
        assert differences(cover, modulus) == set(range(modulus))


@pytest.mark.parametrize(
    ("modulus", "size"),
    [(8, 4), (9, 4), (12, 5), (13, 4), (14, 5), (15, 6), (18, 6), (19, 5), (21, 6)],
)
def test_covers_are_all_covers_up_to_symmetry(modulus, size):
    all_covers = {
        frozenset((0, *rest))
        for rest in itertools.combinations(range(1, modulus), size - 1)
        if len(differences((0, *rest), modulus)) == modulus
    }
    images = {
        frozenset(u * (x - first) % modulus for x in cover)
        for cover in search.covers(modulus, size)
        for first in cover
        for u in range(modulus)
        if math.gcd(u, modulus) == 1
    }
    assert images == all_covers


@pytest.mark.parametrize(
    "modulus", [15, 16, 18, 19, 20, 21, 24, 28, 31, 37, 39, 51, 57, 65, 73, 91]
)
def test_exhaust_finds_a_cover_of_the_tables_size_and_proves_that_none_is_smaller(modulus):
    """Of 21, 31, 57, 73 and 91 too, whose covers have no difference twice and are very few."""
    size = len(difference_cover(modulus))
    assert search.exhaust(modulus, size - 1) == (None, True)
    cover, finished = search.exhaust(modulus, size)
    assert finished
    assert cover is not None
    assert differences(cover, modulus) == set(range(modulus))


def test_exhaust_gives_up_where_it_is_told_to():
    looked_at = []
    assert search.exhaust(66, 9, max_sets=1e4, progress=looked_at.append) == (None, False)
    assert sum(looked_at) > 1e4


@pytest.mark.parametrize("modulus", [1, 2, 3, 7, 31, 57, 93, 106])
def test_annealing_finds_a_cover_of_the_tables_size(modulus):
    size = len(difference_cover(modulus))
    cover = search.anneal(modulus, size, np.random.default_rng(0), steps=5000)
    assert cover is not None
    assert len(cover) == size
    assert differences(cover, modulus) == set(range(modulus))


def test_annealing_returns_nothing_where_there_is_nothing():
    assert search.anneal(20, 5, np.random.default_rng(0), steps=50) is None
