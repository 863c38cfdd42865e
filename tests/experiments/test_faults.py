"""One cell of each kind of `experiments.faults`: it ends, says who, and goes on unharmed.

The whole matrix is `python -m experiments.faults`.
"""

import os

import pytest

from experiments.faults import matrix as faults
from experiments.faults import namespaces
from experiments.hosts import launch


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A folder, and the parameters of a training that nothing happens to."""
    scratch = tmp_path_factory.mktemp("faults")
    with pytest.MonkeyPatch.context() as patch:  # half of a process's time is compilation
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        patch.setenv("XLA_FLAGS", flags)
        yield scratch, faults.uninterrupted(scratch, 2)


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
    if kind == "cut" and namespaces.unavailable():
        pytest.skip(namespaces.unavailable())
    row = faults.one(kind, process, place, scratch, params)
    assert row["verdict"] == "ok", row
    assert float(row["seconds"]) <= faults.STATED
    assert "others" in row["named"]
    assert f"process {process}" in row["message"]
    assert row["difference"] == 0


def test_with_elastic_the_launcher_goes_on_with_fewer_processes_by_itself(expected):
    row = faults.one("elastic", 1, "collective", *expected)
    assert row["verdict"] == "ok", row
    assert row["message"] == "launch: restart 1 of at most 3, with 2 processes."  # and no other
    assert float(row["seconds"]) <= faults.RESTARTED


def test_how_a_process_ended_is_said_in_words():
    assert launch.how(-9) == "was killed by SIGKILL."
    assert launch.how(launch.MISSING) == "ended with 75: another process is missing."
    assert launch.how(launch.FAILED) == "failed by itself, with exit code 78."
    assert launch.how(3) == "failed with exit code 3."


def test_a_cell_that_hangs_is_killed_and_said(monkeypatch, tmp_path):
    wait = tmp_path / "wait.sh"
    wait.write_text("exec sleep 600\n")
    monkeypatch.setattr(faults, "HANGS", 2)
    found = faults.start(["--prefix", f"sh {wait}"], ["--out", str(tmp_path / "run")], {})
    assert faults._judge(*found, guilty=1)["verdict"] == "HANGS"


def test_a_fault_that_only_the_launcher_names_is_not_named():
    launcher = "launch: process 1 was killed by SIGKILL."
    other = "[0] error: process 0: process 1 has not been heard of for 3 s."
    assert faults._judge([other, launcher], 1, 2, 1, guilty=1)["verdict"] == "ok"
    named = faults._judge([launcher], 1, 2, 1, guilty=1)
    assert (named["named"], named["verdict"]) == ("launcher", "NOT NAMED BY THE OTHERS")


def test_the_matrix_has_every_kind_in_every_place_in_both_processes():
    cells = [cell for cell in faults.cells() if cell[0] in faults.KINDS]
    assert len(set(cells)) == len(cells) == 5 * 2 * 3
