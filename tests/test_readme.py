"""The README's code runs, every block by itself, as a reader would paste it."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

README = pathlib.Path(__file__).resolve().parent.parent / "README.md"


def python_blocks(text):
    """`(line of the first statement, source)` of every fenced block that is marked python."""
    fence = re.compile(r"^```python[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [(text.count("\n", 0, m.start(1)) + 1, m[1]) for m in fence.finditer(text)]


def run_block(path, line, source):
    """Run a block as a fresh process would; line numbers in a traceback are the file's."""
    code = f"exec(compile({chr(10) * (line - 1) + source!r}, {str(path)!r}, 'exec'))"
    # Eight devices are the tests' setting; a reader has one, unless a block says otherwise.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path.parent)


BLOCKS = python_blocks(README.read_text(encoding="utf-8")) if README.exists() else []


@pytest.mark.parametrize(("line", "source"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_a_block_of_the_readme_runs_by_itself_and_prints(line, source):
    done = run_block(README, line, source)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_readme_has_at_most_130_lines_and_every_file_it_links_to():
    if not README.exists():
        pytest.skip("there is no README.md beside the tests")
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [link for link in links if "://" not in link]
    assert local
    assert [link for link in local if not (README.parent / link).exists()] == []


SMALL = """\
# A small file

```bash
this is no Python
```

```python
x = 2
print(x)
```

Text between.

```python
def double(x):
    return 2 * x

y = double(x)
print(y)
```
"""


def test_blocks_are_those_marked_python_and_do_not_share_names(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(SMALL)
    first, second = python_blocks(SMALL)
    assert run_block(path, *first).stdout == "2\n"
    done = run_block(path, *second)
    assert (done.returncode, done.stdout) == (1, "")
    assert "NameError: name 'x' is not defined" in done.stderr


def test_a_block_that_fails_is_named_by_its_line(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(SMALL)
    line = SMALL.splitlines().index("y = double(x)") + 1
    assert f'"{path}", line {line}, in <module>' in run_block(path, *python_blocks(SMALL)[1]).stderr


def test_text_without_a_block_has_none():
    assert python_blocks("```bash\nls\n```\n`python`\n") == []
