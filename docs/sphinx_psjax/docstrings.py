"""Docstrings as psjax writes them: Google's sections, `code` in single backticks, $mathematics$.

Sphinx reads reStructuredText, where a name in single backticks is a role and a dollar is a dollar.
"""

import re

from sphinx_psjax import examples
from sphinx_psjax.public_names import resolve

CODE = re.compile(r"(?<![`:\w])`(?!`)([^`\n]+(?:\n[^`\n]+)?)`(?![`_])(\w?)")
INLINE = re.compile(r"(?<![\\$`])\$(?!\$)((?:[^$\\]|\\.)+?)\$(?!\$)", re.DOTALL)
BLOCK = re.compile(r"^([ \t]*)\$\$(.+?)\$\$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"^[ \t]*\|.*\|[ \t]*\n[ \t]*\|[ :|-]*-[ :|-]*\|[ \t]*\n")
LINK = re.compile(r"\[([^\]]+)\]\s?\((https?://[^)\s]+)\)")


def setup(app):
    """Before napoleon, which is connected with the standard priority of 500."""
    app.connect("autodoc-process-docstring", _process, priority=100)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _process(app, what, name, obj, options, lines):
    text, own = "\n".join(lines), examples.of(name)
    if what == "data":  # its docstring is that of its type
        text = "" if own is None else own.text
    text = converted(text, name)
    if own is not None and ">>>" not in text:
        code = "".join(f"   {line}\n" for line in own.code.split("\n"))
        text = f"{text}\n\n.. rubric:: Example\n\n.. code-block:: pycon\n\n{code}"
    lines[:] = text.split("\n")


def _signature(app, what, name, obj, options, signature, returned):
    """Without what every Flax module takes, its parent and its name."""
    if what == "class" and signature and ", parent: " in signature:
        return signature[: signature.index(", parent: ")] + ")", returned
    return None


def _skip(app, what, name, obj, skip, options):
    """The fields of a NamedTuple, which its docstring lists."""
    alias = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if alias else None


def converted(text: str, name: str) -> str:
    """The reStructuredText of a docstring; `name` is that of the object, for references."""
    return "\n\n".join(
        block if is_literal else _prose(block, name) for block, is_literal in _blocks(text)
    )


def _blocks(text):
    """Paragraphs, and whether each is to be left as it is: a doctest, or code after `::`."""
    literal = None  # the indentation of the paragraph that announced code
    for block in re.split(r"\n[ \t]*\n", text):
        lines = [line for line in block.split("\n") if line.strip()]
        indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
        if literal is not None and indent <= literal:
            literal = None
        yield block, literal is not None or ">>>" in block
        if literal is None and block.rstrip().endswith("::"):
            literal = indent


def _prose(block, name):
    if TABLE.match(block):
        return _table(block, name)
    block = CODE.sub(lambda m: _code(_one_line(m[1]), name) + (m[2] and rf"\ {m[2]}"), block)
    block = LINK.sub(lambda m: f"`{_one_line(m[1])} <{m[2]}>`_", block)
    block = BLOCK.sub(_display, block)
    return INLINE.sub(lambda m: f":math:`{_one_line(m[1])}`", block)


def _one_line(text):
    return re.sub(r"\s*\n\s*", " ", text).strip()


def _code(text, name):
    target = resolve(text, name)
    return f"``{text}``" if target is None else f":py:obj:`{text} <{target}>`"


def _table(block, name):
    """A Markdown table."""
    indent = block[: len(block) - len(block.lstrip())]
    rows = [line.strip().strip("|").split("|") for line in block.strip().split("\n")]
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [rows[0], *rows[2:]]:
        first, *rest = [_prose(cell.strip(), name) for cell in row]
        lines += [f"   * - {first}", *(f"     - {cell}" for cell in rest)]
    return "\n".join(indent + line for line in lines)


def _display(match):
    indent, formula = match[1], match[2]
    body = "\n".join(f"{indent}   {line.strip()}" for line in formula.strip().split("\n"))
    return f"\n{indent}.. math::\n\n{body}\n"
