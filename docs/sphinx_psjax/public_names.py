"""Every public name of psjax, and the directive that documents those of one module.

A name is public if `dir` of a public module lists it. `psjax.select` is defined in a file whose
name begins with an underscore; the site knows the public name alone.
"""

import importlib
import inspect
import types

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList

from sphinx_psjax import examples

MODULES = (
    "psjax",
    "psjax.axes",
    "psjax.codec",
    "psjax.ist",
    "psjax.plan",
    "psjax.losses",
    "psjax.quasi_newton",
    "psjax.structure",
    "psjax.cost",
    "psjax.data",
    "psjax.baselines",
    "psjax.metrics",
    "psjax.models",
    "psjax.nn",
)


def names(module: str) -> list[str]:
    """What `dir` of a module lists, without modules and dunders."""
    found = importlib.import_module(module)
    return [
        name
        for name in dir(found)
        if not name.startswith("_") and not isinstance(getattr(found, name), types.ModuleType)
    ]


def submodules(module: str) -> list[str]:
    """The public modules that a module lists."""
    found = importlib.import_module(module)
    return [
        f"{module}.{name}"
        for name in dir(found)
        if isinstance(getattr(found, name), types.ModuleType)
    ]


def public() -> dict[str, object]:
    """`{"psjax.select": function, ...}`: every public name and what it is."""
    return {
        f"{module}.{name}": getattr(importlib.import_module(module), name)
        for module in MODULES
        for name in names(module)
    }


def entry(name: str) -> str:
    """Where a public name is described: its own entry, or the first of several for one object."""
    known = public()
    return next(other for other, value in known.items() if value is known[name])


def aliases() -> dict[str, str]:
    """`{"psjax._select.select": "psjax.select"}`: the entry of what a private file defines."""
    found = {}
    for name, value in public().items():
        if inspect.isclass(value) or inspect.isfunction(value):
            found.setdefault(f"{value.__module__}.{value.__qualname__}", name)
    return found


def resolve(text: str, name: str) -> str | None:
    """The public name that `text` means in the docstring of `name`, or None."""
    known = public()
    owner = entry(name) if name in known else name
    for prefix in ("", *_prefixes(owner)):
        full = f"{prefix}{text}"
        head, _, member = full.rpartition(".")
        if full in known and full != owner:
            return entry(full)
        if full in MODULES:
            return full
        if head in known and inspect.isclass(known[head]) and _is_documented(known[head], member):
            full = f"{entry(head)}.{member}"
            return None if full == name else full
    return None


def _prefixes(name):
    parts = name.split(".")
    return [".".join(parts[:n]) + "." for n in range(len(parts), 0, -1)]


def _is_documented(cls, member):
    value = inspect.getattr_static(cls, member, None)
    method = inspect.isfunction(value) or isinstance(value, property)
    return method and member in vars(cls) and not member.startswith("_")


class PublicNames(Directive):
    """`.. public-names:: psjax.losses`: the module's docstring, a list of names, each entry."""

    required_arguments = 1

    def run(self):
        """Parse what autodoc is asked for."""
        node = nodes.section()
        node.document = self.state.document
        lines = StringList(list(_lines(self.arguments[0])), source=self.state.document["source"])
        self.state.nested_parse(lines, self.content_offset, node)
        return node.children


def _lines(module):
    found = importlib.import_module(module)
    yield from (f".. automodule:: {module}", "")
    yield from (f".. currentmodule:: {module}", "")
    yield from (".. autosummary::", "   :nosignatures:", "")
    own = [name for name in names(module) if entry(f"{module}.{name}") == f"{module}.{name}"]
    yield from (f"   {name}" for name in own)
    yield ""
    yield from ("The short examples on this page begin with:", "", ".. code-block:: python", "")
    yield from (f"   {line}" for line in examples.read(module).setup.split("\n"))
    yield ""
    for name in own:
        value = getattr(found, name)
        if inspect.isclass(value):
            yield from (f".. autoclass:: {name}", "   :members:", "")
        elif inspect.isfunction(value) or hasattr(value, "__wrapped__"):
            yield from (f".. autofunction:: {name}", "")
        else:
            yield from (f".. autodata:: {name}", "   :no-value:", "")
    for name in names(module):
        other = entry(f"{module}.{name}")
        if name not in own:
            kind = "class" if inspect.isclass(getattr(found, name)) else "function"
            yield from (f".. py:{kind}:: {name}", "", f"   See :py:obj:`{other}`.", "")


def _missing(app, env, node, contnode):
    """A reference to what a private file defines goes to the public name."""
    target = node.get("reftarget", "")
    known = aliases().get(target)
    if known is None or node.get("refdomain") != "py":
        return None
    node["reftarget"] = known
    domain = env.get_domain("py")
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, node["reftype"], known, node, contnode
    )


def setup(app):
    """Register the directive, and references by the place of definition."""
    app.add_directive("public-names", PublicNames)
    app.connect("missing-reference", _missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
