"""The code of every page of the site runs, block after block, as a reader would paste it."""

import doctest
import math
import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).resolve().parent.parent.parent / "docs"
FENCE = re.compile(r"^```(python|pycon)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
NUMBER = re.compile(r"[-+]?\d+\.\d*(?:e[-+]?\d+)?")
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if FENCE.search(path.read_text("utf-8"))]


class Near(doctest.OutputChecker):
    """Decimal numbers need to agree to four digits only: compilers round differently."""

    def check_output(self, want, got, optionflags):
        if super().check_output(want, got, optionflags):
            return True
        ours, theirs = NUMBER.findall(want), NUMBER.findall(got)
        same_text = super().check_output(NUMBER.sub("#", want), NUMBER.sub("#", got), optionflags)
        near = [math.isclose(float(a), float(b), rel_tol=1e-4) for a, b in zip(ours, theirs)]
        return same_text and len(ours) == len(theirs) and all(near)


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
        failed, _ = doctest.DocTestRunner(Near(), optionflags=FLAGS).run(
            test, out=report.append, clear_globs=False
        )
        namespace.update(test.globs)
        assert not failed, "".join(report)
    return namespace


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_code_of_a_page_runs(path):
    try:
        run_page(path)
    except ModuleNotFoundError as error:
        if error.name != "equinox":
            raise
        pytest.skip("the rest of the page needs equinox")


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


@pytest.mark.parametrize(
    ("want", "got", "same"),
    [
        ("Array([1.0, 2.])", "Array([1.00001,  2.])", True),
        ("1.0", "1.001", False),
        ("1.0 a", "1.0 b", False),
        ("12", "13", False),
        ("1.0, ...", "1.0, 2.5 and 3", True),
    ],
)
def test_decimal_numbers_agree_to_four_digits(want, got, same):
    assert Near().check_output(want, got, FLAGS) == same


def test_a_block_that_fails_is_named_by_its_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("Text.\n\n```python\nx = 1\nmissing\n```\n")
    with pytest.raises(NameError, match="missing") as error:
        run_page(path)
    line = error.traceback[-1].lineno + 1
    assert path.read_text().splitlines()[line - 1] == "missing"
