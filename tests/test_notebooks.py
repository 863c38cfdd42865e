"""Every notebook runs from top to bottom, and its outputs are kept, small."""

import os
import pathlib
import sys

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from jupyter_client import AsyncKernelManager  # noqa: E402
from jupyter_client.kernelspec import KernelSpec  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
LARGEST = 200_000  # bytes; a page that a reader opens, and a file that git keeps for ever

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


class ThisInterpreter(AsyncKernelManager):
    """A kernel of the Python that runs the tests, whichever kernels are installed."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(notebook):
    """Run a notebook in place, at the root of the checkout; an error in a cell raises."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path}
    env.pop("MPLBACKEND", None)  # that of the tests draws nothing into a notebook
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_manager_class=ThisInterpreter,
        resources={"metadata": {"path": str(ROOT)}},
    )
    client.execute(env=env)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figures(notebook):
    outputs = [out for cell in code_cells(notebook) for out in cell.outputs]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def test_there_are_notebooks():
    assert NOTEBOOKS


@each
def test_runs_without_error_and_draws_what_was_kept(path):
    notebook = nbformat.read(path, as_version=4)
    kept = figures(notebook)
    for cell in code_cells(notebook):
        cell.outputs = []
    execute(notebook)
    assert figures(notebook) == kept


@each
def test_outputs_are_kept_and_small(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    assert notebook.metadata.kernelspec.name == "python3"
    cells = code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1))  # one run, from the top
    outputs = [out for cell in cells for out in cell.outputs]
    assert figures(notebook) > 0
    assert not [out for out in outputs if out.output_type == "error"]
    assert not [out for out in outputs if out.get("name") == "stderr"]


def test_an_error_in_a_cell_fails():
    bad = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="ZeroDivisionError"):
        execute(bad)


def test_the_kernel_is_this_interpreter_and_this_checkout():
    source = "import sys, psjax; print(sys.executable, psjax.__file__)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    execute(notebook)
    printed = notebook.cells[0].outputs[0].text.split()
    assert printed == [sys.executable, str(ROOT / "psjax" / "__init__.py")]
