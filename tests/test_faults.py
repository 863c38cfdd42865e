"""One cell of each kind of `experiments.hosts.faults`: it ends, says who, and goes on unharmed.

The whole matrix is `python -m experiments.hosts.faults`.
"""

import pytest

from experiments.hosts import _namespaces, faults, launch


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A folder, and the parameters of a training that nothing happens to."""
    scratch = tmp_path_factory.mktemp("faults")
    return scratch, faults.uninterrupted(scratch, 2)


@pytest.mark.parametrize(
    ("kind", "process", "place"),
    [
        ("kill", 1, "collective"),
        ("stop", 0, "saving"),
        ("slow", 1, "compute"),
        ("full", 1, "saving"),
        ("cut", 1, "collective"),
    ],
)
def test_after_a_fault_all_end_in_time_with_a_name_and_the_run_goes_on_bit_for_bit(
    expected, kind, process, place
):
    scratch, params = expected
    if kind == "cut" and _namespaces.unavailable():
        pytest.skip(_namespaces.unavailable())
    row = faults.one(kind, process, place, scratch, params)
    assert row["verdict"] == "ok", row
    assert float(row["seconds"]) <= faults.STATED
    assert f"process {process}" in row["message"]
    assert row["difference"] == 0


def test_with_elastic_the_launcher_goes_on_with_fewer_processes_by_itself(expected):
    row = faults.one("elastic", 1, "collective", *expected)
    assert row["verdict"] == "ok", row
    assert row["message"] == "launch: restart 1 of at most 3, with 2 processes."


def test_how_a_process_ended_is_said_in_words():
    assert launch.how(-9) == "was killed by SIGKILL."
    assert launch.how(launch.MISSING) == "ended with 75: another process is missing."
    assert launch.how(3) == "failed with exit code 3."


def test_the_matrix_has_every_kind_in_every_place_in_both_processes():
    cells = [cell for cell in faults.cells() if cell[0] in faults.KINDS]
    assert len(set(cells)) == len(cells) == 5 * 2 * 3
