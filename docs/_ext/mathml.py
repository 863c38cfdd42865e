"""Mathematics as MathML, made at build time by docutils: no script, no font, no network.

Every current browser draws MathML itself. docutils' converter names what it does not know, and
that is a warning here, so a formula that is not drawn ends a build with `-W`.
"""

import re

from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.util import logging

logger = logging.getLogger(__name__)

# What docutils does not know. A bracket of MathML grows by itself.
SPELLINGS = {r"\texttt": r"\mathtt", r"\dots": r"\ldots", r"\Big": "", r"\big": ""}


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
    return latex2mathml.tex2mathml(lines, as_block=as_block)


def _inline(self, node):
    self.body.append(_or_warning(node, as_block=False))
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
