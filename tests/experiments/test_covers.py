"""The command that makes the table of difference covers."""

import pytest

from experiments import covers as search
from experiments.cover_search import is_cover
from psjax.plan import difference_cover


def test_the_search_makes_the_tables_sizes_again():
    args = search.Args(steps=300)
    for modulus in range(1, 44):
        cover, proved = search.search(modulus, args)
        assert proved
        assert len(cover) == len(difference_cover(modulus))
        assert is_cover(cover, modulus)


def test_the_command_prints_lines_of_the_table(capsys):
    search.main(search.Args(first=6, last=8, start_from_table=True, steps=10))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"    {difference_cover(6)},  # 6: 3, bound 3",
        f"    {difference_cover(7)},  # 7: 3, bound 3",
        f"    {difference_cover(8)},  # 8: 4, bound 4",
        "_UNPROVED = ()",
    ]


def test_the_command_refuses_moduli_that_it_has_no_bits_for():
    with pytest.raises(ValueError, match=r"write 1 <= first <= last <= 128"):
        search.main(search.Args(last=129))
