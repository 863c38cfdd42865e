"""Tables of committed results, read when the site is built: nobody types a number twice."""

import csv
import pathlib

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective


class Results(SphinxDirective):
    """Chosen columns and rows of a CSV.

    ```{results} ../../experiments/benchmarks/results/psl.csv
    :columns: figure = what, ratio, goal
    :where: unit == ms, figure ~ batch 100
    :digits: 3
    ```

    A column may be renamed, `old = new`. `==`, `!=` and `~` (contains) choose rows. Numbers have
    `digits` significant digits, 3 by default.
    """

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {
        "columns": directives.unchanged_required,
        "where": directives.unchanged,
        "digits": directives.positive_int,
    }

    def run(self):
        """Read the file, and parse it as a Markdown table."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        pairs = [part.partition("=") for part in self.options["columns"].split(",")]
        columns = {old.strip(): new.strip() or old.strip() for old, _, new in pairs}
        missing = [name for name in columns if name not in rows[0]]
        if missing:
            msg = f"{pathlib.Path(path).name} has no column {missing[0]!r}"
            raise self.error(msg)
        tests = [part for part in self.options.get("where", "").split(", ") if part]
        rows = [row for row in rows if all(_holds(test, row) for test in tests)]
        if not rows:
            msg = f"no row of {pathlib.Path(path).name} is left"
            raise self.error(msg)
        digits = self.options.get("digits", 3)
        cells = [[_number(row[name], digits) for name in columns] for row in rows]
        rule = ["--:" if _is_number(rows[0][name]) else "---" for name in columns]
        lines = ["| " + " | ".join(row) + " |" for row in (columns.values(), rule, *cells)]
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=path), 0, node)
        return node.children


class RowsOf(SphinxDirective):
    """A committed Markdown file, of whose tables only the rows with one first cell are shown."""

    required_arguments = 1
    option_spec = {"first-cell": directives.unchanged_required}

    def run(self):
        """Read the file, leave rows out, and parse it."""
        _, path = self.env.relfn2path(self.arguments[0])
        self.env.note_dependency(path)
        wanted = self.options["first-cell"].strip('"')
        lines, in_table = [], 0
        for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
            in_table = in_table + 1 if line.startswith("|") else 0  # 1: the header, 2: its rule
            if in_table <= 2 or line.split("|")[1].strip() == wanted:
                lines.append(line)
        node = nodes.Element()
        self.state.nested_parse(StringList(lines, source=path), 0, node)
        return node.children


def _holds(test, row):
    for sign, holds in (
        ("==", str.__eq__),
        ("!=", str.__ne__),
        ("~", lambda cell, part: part in cell),
    ):
        name, found, value = test.partition(sign)
        if found:
            return holds(row[name.strip()], value.strip())
    msg = f"results: {test!r} is no condition; write a == b, a != b or a ~ b."
    raise ValueError(msg)


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


def _number(text, digits):
    if not _is_number(text):
        return text.replace("|", r"\|")
    value = float(text)
    if abs(value) >= 1e6:
        return f"{value:,.0f}".replace(",", "\N{NO-BREAK SPACE}")
    if value == int(value):
        return str(int(value))
    short = f"{value:.{digits}g}"
    return short if "e" not in short else f"{value:.0f}"


def setup(app):
    """Register the directives."""
    app.add_directive("results", Results)
    app.add_directive("rows-of", RowsOf)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
