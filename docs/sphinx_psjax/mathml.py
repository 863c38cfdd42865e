"""Mathematics as MathML, made at build time by docutils: no script, no font, no network.

Every current browser draws MathML itself. docutils' converter names what it does not know, and
that is a warning here, so a formula that is not drawn ends a build with `-W`.
"""

import html
import re
from xml.etree import ElementTree

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What docutils does not know. A bracket of MathML grows by itself.
SPELLINGS = {r"\texttt": r"\mathtt", r"\dots": r"\ldots", r"\Big": "", r"\big": ""}

ENTITY = re.compile(r"&(?!lt;|gt;|amp;|quot;|#)\w+;")  # those that XML itself does not know
ACCENTS = {"ˆ", "^", "~", "˜", "¯"}

ElementTree.register_namespace("", "http://www.w3.org/1998/Math/MathML")


def setup(app):
    """Register the renderer `mathml`."""
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(_inline, None),
        block_renderers=(_block, None),
    )
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def convert(text: str, as_block: bool) -> str:
    """LaTeX to a `<math>` element; ValueError where a command is not known."""
    lines = text.strip()
    for ours, known in SPELLINGS.items():
        lines = re.sub(rf"{re.escape(ours)}(?![A-Za-z])", lambda _, known=known: known, lines)
    if as_block and r"\\" in lines and r"\begin" not in lines:
        lines = rf"\begin{{aligned}}{lines}\end{{aligned}}"
    text = latex2mathml.tex2mathml(lines, as_block=as_block)
    text = ENTITY.sub(lambda match: html.unescape(match[0]), text)
    tree = ElementTree.fromstring(text)
    for parent in list(tree.iter()):
        for i, child in enumerate(parent):
            parent[i] = _accented(child)
    return ElementTree.tostring(tree, encoding="unicode")


def _accented(node):
    """An accented letter with a subscript, which docutils writes below the letter."""
    if not node.tag.endswith("}munderover") or (node[2].text or "") not in ACCENTS:
        return node
    letter, subscript, accent = node
    tag = node.tag.removesuffix("munderover")
    both = ElementTree.Element(f"{tag}msub")
    over = ElementTree.SubElement(both, f"{tag}mover", {"accent": "true"})
    over.extend([letter, accent])
    both.append(subscript)
    return both


def _inline(self, node):
    self.body.append(f'<span class="math-inline">{_or_warning(node, as_block=False)}</span>')
    raise nodes.SkipNode


def _block(self, node):
    number = f' id="{node["ids"][0]}"' if node["ids"] else ""
    self.body.append(f'<div class="math-block"{number}>{_or_warning(node, as_block=True)}</div>\n')
    raise nodes.SkipNode


def _or_warning(node, as_block):
    try:
        return convert(node.astext(), as_block)
    except Exception as error:  # docutils raises several kinds
        logger.warning("no MathML of %r: %s", node.astext(), error, location=node)
        return f"<code>{node.astext()}</code>"
