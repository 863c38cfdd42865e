"""The list of programs, and that they alone are run."""

import ast
import pathlib
import subprocess
import sys

import pytest

from experiments.__main__ import HERE, programs

HELPERS = [
    path
    for path in sorted(HERE.rglob("*.py"))
    if ".".join(path.relative_to(HERE.parent).with_suffix("").parts).removesuffix(".__main__")
    not in (*programs(), "experiments")
]


def test_the_list_has_every_program_with_a_line_of_its_own():
    command = [sys.executable, "-m", "experiments"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    names = [line.split()[-1] for line in said.stdout.splitlines() if line.startswith("python -m")]
    assert names == list(programs())
    assert {"experiments.psl.train", "experiments.faults", "experiments.covers"} <= set(names)
    lines = list(programs().values())
    assert all(lines)
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("path", HELPERS, ids=lambda path: str(path.relative_to(HERE)))
def test_a_helper_is_not_run(path):
    assert "__main__" not in path.read_text()


def test_programs_that_write_results_ask_before_they_write_over_those_in_git():
    """Whoever knows the folder `results` beside itself has `--commit-results`, and asks where."""
    for path in sorted(HERE.rglob("*.py")):
        text = path.read_text()
        if '/ "results"' in text and path.name not in ("figures.py", "drops.py"):
            names = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name)}
            assert "results_folder" in names, path
            assert "commit_results" in text, path


def test_without_being_asked_results_go_to_a_copy_that_git_ignores(tmp_path, monkeypatch, capsys):
    from experiments._lib.folder import results_folder

    tracked = tmp_path / "paper" / "results"
    tracked.mkdir(parents=True)
    (tracked / "rows.csv").write_text("epoch\n1\n")
    monkeypatch.chdir(tmp_path)
    copy = results_folder(tracked, commit=False)
    assert copy == pathlib.Path("runs/results/paper")
    assert (copy / "rows.csv").read_text() == "epoch\n1\n"
    (copy / "rows.csv").write_text("epoch\n1\n2\n")
    assert results_folder(tracked, commit=False) == copy
    assert (copy / "rows.csv").read_text() == "epoch\n1\n2\n"  # what is measured stays
    assert results_folder(tracked, commit=True) == tracked
    assert results_folder(tracked, commit=True, asked=tmp_path / "mine") == tmp_path / "mine"
    assert f"results: {copy}" in capsys.readouterr().err
