"""Errors as a user sees them: `raises` runs a mistake and shows it; `messages` lists them all."""

import ast
import pathlib

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

PACKAGE = pathlib.Path(__file__).resolve().parent.parent.parent / "psjax"


class Raises(SphinxDirective):
    """Code that must raise, followed by what it says; names are shared by the blocks of a page."""

    has_content = True

    def run(self):
        """Execute the block. One that raises nothing ends the build."""
        code = "\n".join(self.content)
        namespace = self.env.temp_data.setdefault("raises_namespace", {})
        block = nodes.literal_block(code, code, language="python")
        try:
            exec(compile(code, self.env.docname, "exec"), namespace)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        else:
            msg = "this block raises nothing"
            raise self.error(msg)
        return [block, nodes.literal_block(said, said, language="text", classes=["said"])]


class Setup(SphinxDirective):
    """Code that is run and shown, for the `raises` blocks after it."""

    has_content = True

    def run(self):
        """Execute the block."""
        code = "\n".join(self.content)
        namespace = self.env.temp_data.setdefault("raises_namespace", {})
        exec(compile(code, self.env.docname, "exec"), namespace)
        return [nodes.literal_block(code, code, language="python")]


class Messages(SphinxDirective):
    """Every message of the library, file by file, with `<name>` where a value stands."""

    def run(self):
        """Read the source."""
        lines = []
        for title, found in messages():
            lines += [f"**{title}**", ""]
            lines += [line for text in found for line in (f"- {_escaped(text)}", "")]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source="psjax"), 0, node)
        return node.children


def messages() -> list[tuple[str, list[str]]]:
    """`[("psjax.losses", [message, ...]), ...]`, those of private files by their package."""
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        title = ".".join(part for part in parts if not part.startswith("_"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "msg":
                found.setdefault(title, []).append(_template(node.value))
    return [(title, sorted(set(texts))) for title, texts in sorted(found.items())]


def _template(node):
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_template(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _template(node.left) + _template(node.right)
    if isinstance(node, ast.FormattedValue):
        name = ast.unparse(node.value)
        return f"<{name}>" if name.isidentifier() else "<...>"
    return "<...>"


def _escaped(text):
    return f"`` {' '.join(text.split())} ``"


def setup(app):
    """Register the directives."""
    app.add_directive("raises", Raises)
    app.add_directive("setup-code", Setup)
    app.add_directive("messages", Messages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
