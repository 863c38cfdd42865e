"""Examples of public names whose docstring has none: `docs/api/examples/<module>.md`.

A file begins with the code that all its examples need. Each heading names what the code below it
is an example of; text between the two describes what can have no docstring.
"""

import functools
import pathlib
import re
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "api" / "examples"
BLOCK = re.compile(r"^```(?:python|pycon)\n(.*?)\n```", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    """Text and code of a heading."""

    text: str
    code: str


class Examples(NamedTuple):
    """What a file holds."""

    setup: str
    by_name: dict[str, Example]


@functools.cache
def read(module: str) -> Examples:
    """The examples of a public module."""
    path = FOLDER / f"{module.rpartition('.')[2]}.md"
    head, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for section in sections:
        names, _, body = section.partition("\n")
        match = BLOCK.search(body)
        own = Example(body[: match.start()].strip(), match[1])
        found |= {f"{module}.{name.strip()}": own for name in names.split(",")}
    return Examples(BLOCK.search(head)[1], found)


def of(name: str) -> Example | None:
    """The example of a public name, or None."""
    module = name.rpartition(".")[0]
    if not module or not (FOLDER / f"{module.rpartition('.')[2]}.md").exists():
        return None
    return read(module).by_name.get(name)
