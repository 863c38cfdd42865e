"""The README's code runs, block after block, as a reader would paste it."""

import pathlib
import re

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def python_blocks(text):
    """`(line of the first statement, source)` of every fenced block that is marked python."""
    fence = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in fence.finditer(text)]


def run_blocks(path):
    """Execute the blocks in order in one namespace; line numbers in a traceback are the file's."""
    namespace = {"__name__": "readme"}
    blocks = python_blocks(path.read_text(encoding="utf-8"))
    for line, source in blocks:
        code = compile("\n" * (line - 1) + source, str(path), "exec")
        exec(code, namespace)
    return len(blocks), namespace


def test_the_code_of_the_readme_runs():
    if not README.exists() or not python_blocks(README.read_text(encoding="utf-8")):
        pytest.skip("README.md has no python block")
    run_blocks(README)


SMALL = """\
# A small file

```bash
this is no Python
```

```python
import jax
x = 2
```

Text between.

```python
def double(x):
    return 2 * x

y = double(x)
devices = jax.device_count()
```
"""


def test_blocks_share_one_namespace_and_others_are_left_alone(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(SMALL)
    count, namespace = run_blocks(path)
    assert (count, namespace["y"], namespace["devices"]) == (2, 4, 8)


def test_a_block_that_fails_is_named_by_its_line(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(SMALL + "\n```python\nx = 1\nmissing\n```\n")
    with pytest.raises(NameError, match="missing") as error:
        run_blocks(path)
    line = error.traceback[-1].lineno + 1
    assert path.read_text().splitlines()[line - 1] == "missing"


def test_text_without_a_block_has_none():
    assert python_blocks("```bash\nls\n```\n`python`\n") == []
