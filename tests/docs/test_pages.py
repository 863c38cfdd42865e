"""The code of every page of the site runs, block after block, as a reader would paste it."""

import doctest
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parent.parent.parent / "docs"
FENCE = re.compile(r"^```(python|pycon)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if FENCE.search(path.read_text("utf-8"))]


def run_page(path):
    """Run the blocks in one namespace; a `pycon` block must print what it shows."""
    text = path.read_text(encoding="utf-8")
    namespace = {"__name__": path.stem}
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2))
        if match[1] == "python":
            exec(compile("\n" * line + match[2], str(path), "exec"), namespace)
            continue
        test = doctest.DocTestParser().get_doctest(match[2], namespace, path.name, str(path), line)
        report = []
        failed, _ = doctest.DocTestRunner(optionflags=FLAGS).run(
            test, out=report.append, clear_globs=False
        )
        namespace.update(test.globs)
        assert not failed, "".join(report)
    return namespace


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_code_of_a_page_runs(path):
    if "import equinox" in path.read_text(encoding="utf-8"):
        pytest.importorskip("equinox")
    run_page(path)


def test_there_are_pages_with_code():
    assert PAGES


PAGE = """\
```python
x = 2
```

```pycon
>>> x + 1
{}
```
"""


def test_a_wrong_output_fails(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(PAGE.format(3))
    assert run_page(path)["x"] == 2
    path.write_text(PAGE.format(4))
    with pytest.raises(AssertionError, match="Got:"):
        run_page(path)


def test_a_block_that_fails_is_named_by_its_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Text.\n\n```python\nx = 1\nmissing\n```\n")
    with pytest.raises(NameError, match="missing") as error:
        run_page(path)
    line = error.traceback[-1].lineno + 1
    assert path.read_text().splitlines()[line - 1] == "missing"
