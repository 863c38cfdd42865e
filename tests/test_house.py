"""What holds of the source of the library, read with `ast`, without importing it."""

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "psjax"
FILES = sorted(PACKAGE.rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
MOST_LINES = 450
# Calls that change a list, a dictionary or a set.
CHANGES = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "popitem"}
CHANGES |= {"remove", "discard", "clear", "sort", "reverse"}


@functools.cache
def tree(path):
    return ast.parse(path.read_text(), str(path))


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}
private = lambda name: name.startswith("_") and not name.startswith("__")


def functions(node):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    return [x for x in ast.walk(node) if isinstance(x, kinds)]


def lines(found):
    """`[(line, what), ...]`, sorted; what a failing test shows."""
    return sorted(set(found))


def imported(path, top_level=False):
    """`(line, module, name)` of every import; names None where a module itself is imported."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path.parent)
    inner = {id(x) for f in functions(tree(path)) for x in ast.walk(f)} if top_level else ()
    for node in ast.walk(tree(path)):
        if id(node) in inner:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join([*(base if node.level else []), *filter(None, [node.module])])
            yield from ((node.lineno, module, alias.name) for alias in node.names)


@each_file
def test_no_name_that_begins_with_an_underscore_leaves_its_module(path):
    """A module may: an underscore belongs to a file."""
    found = [
        (line, f"{module}.{name}")
        for line, module, name in imported(path)
        if name is not None and private(name) and f"{module}.{name}" not in MODULES
    ]
    assert not lines(found)


@each_file
def test_no_private_member_of_another_class_is_used(path):
    """`self._x` and `cls._x`, and `x._x` of what a class or module of this file defines itself."""
    own = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        if isinstance(node, ast.ClassDef):
            for x in node.body:
                targets = [x.target] if isinstance(x, ast.AnnAssign) else getattr(x, "targets", [])
                own |= {t.id for t in targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                own.add(node.attr)
    named_tuple = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of their names
    modules = {m.split(".")[-1] for m in MODULES if private(m.split(".")[-1])}
    found = [
        (node.lineno, ast.unparse(node))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and private(node.attr)
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        if node.attr not in own | named_tuple | modules
    ]
    assert not lines(found)


@each_file
def test_the_library_prints_nothing(path):
    """Neither by `print` nor on the standard streams."""
    calls = [
        (node.lineno, ast.unparse(node.func))
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
    ]
    silent = ("print", "breakpoint", "sys.stdout.write", "sys.stderr.write", "jax.debug.print")
    assert not lines((line, name) for line, name in calls if name in silent)


@each_file
def test_no_function_writes_to_the_state_of_its_module(path):
    """No `global`, no change of a list, dictionary or set of the module, no attribute of one set.

    A cache of a pure function (`functools.cache`) is none.
    """
    top = set()
    for node in tree(path).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        top |= {x.id for t in targets if t for x in ast.walk(t) if isinstance(x, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            top |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    found = []
    for function in functions(tree(path)):
        local = {x.arg for x in ast.walk(function) if isinstance(x, ast.arg)}
        local |= {
            x.id
            for x in ast.walk(function)
            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)
        }

        def of_module(node, local=local):
            while isinstance(node, ast.Attribute | ast.Subscript):
                node = node.value
            return isinstance(node, ast.Name) and node.id in top - local

        for node in ast.walk(function):
            if isinstance(node, ast.Global):
                found.append((node.lineno, ast.unparse(node)))
            written = isinstance(node, ast.Attribute | ast.Subscript)
            if written and isinstance(node.ctx, ast.Store | ast.Del) and of_module(node):
                found.append((node.lineno, ast.unparse(node)))
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if called and node.func.attr in CHANGES and isinstance(node.func.value, ast.Name):
                if of_module(node.func.value) and node.func.value.id not in modules_of(path):
                    found.append((node.lineno, ast.unparse(node)))
    assert not lines(found)


def modules_of(path):
    """Names under which modules are imported: `optax.update` is a function, no change."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@each_file
def test_a_module_is_short_enough_to_be_read(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def dependencies(path):
    """Modules of the library that a module imports while it is being imported itself.

    A package's `__init__` runs first, but what is imported from a module of the package does not
    wait for the rest of it.
    """
    for _, module, name in imported(path, top_level=True):
        inner = f"{module}.{name}"
        found = inner if inner in MODULES else module
        if found in MODULES and found != module_name(path):
            yield found


def test_no_modules_import_each_other_in_a_circle():
    edges = {name: set(dependencies(path)) for name, path in MODULES.items()}
    assert edges["psjax"] >= {"psjax.plan", "psjax._selection"}
    assert not behind_a_circle(edges)


def behind_a_circle(edges):
    """What is left when modules are taken away that import none of those left."""
    while free := {name for name, others in edges.items() if not others & set(edges)}:
        edges = {name: others for name, others in edges.items() if name not in free}
    return edges


# ----------------------------------------------------------------- the rules find what they forbid

WRONG = {
    test_no_name_that_begins_with_an_underscore_leaves_its_module: [
        "from psjax._selection import _map",
        "from psjax.plan._plan import Plan, _x as x",
        "def f():\n    from optax._src.base import _y",
    ],
    test_no_private_member_of_another_class_is_used: [
        "def f(x): return x._hidden",
        "import jax\njax._src.core",
        "class A:\n    def f(self, other): return other._g()",
    ],
    test_the_library_prints_nothing: ["def f(): print(1)", "import sys\nsys.stdout.write('a')"],
    test_no_function_writes_to_the_state_of_its_module: [
        "a = 0\ndef f():\n    global a\n    a = 1",
        "a = {}\ndef f(): a[1] = 2",
        "a = []\ndef f(): a.append(1)",
        "import jax\ndef f(): jax.config.x = 1",
        "a = {}\ndef f():\n    del a[1]",
        "a = [0]\ndef f():\n    a[0] += 1",
    ],
    test_a_module_is_short_enough_to_be_read: ["a = 1\n" * (MOST_LINES + 1)],
}
RIGHT = {
    test_no_name_that_begins_with_an_underscore_leaves_its_module: [
        "from psjax import _selection",
        "from psjax._selection import Selection\nfrom __future__ import annotations",
    ],
    test_no_private_member_of_another_class_is_used: [
        "class A:\n    def _f(self): return self._g\n    def h(self, other): return other._f()",
        "def f(state): return state._replace(a=1).__class__",
    ],
    test_the_library_prints_nothing: ["def f(print_it): return 'print(1)'"],
    test_no_function_writes_to_the_state_of_its_module: [
        "a = {}\na[1] = 2\ndef f(a): a[1] = 2",
        "def f():\n    a = []\n    a.append(1)\n    return a",
        "import optax\ndef f(x): return optax.update(x)",
    ],
    test_a_module_is_short_enough_to_be_read: ["a = 1\n" * MOST_LINES],
}


def cases(table):
    return pytest.mark.parametrize(
        ("rule", "source"), [(rule, source) for rule in table for source in table[rule]]
    )


def test_a_circle_is_found():
    assert behind_a_circle({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": set()}).keys() == {"a", "b"}


@cases(WRONG)
def test_a_rule_finds_what_it_forbids(rule, source, monkeypatch):
    with pytest.raises(AssertionError):
        rule(written(source, monkeypatch))


@cases(RIGHT)
def test_a_rule_lets_pass_what_it_allows(rule, source, monkeypatch):
    rule(written(source, monkeypatch))


def written(source, monkeypatch):
    """A file of the library with this source, which is not on the disk."""
    path = PACKAGE / "_written.py"
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: source)
    tree.cache_clear()
    return path


@pytest.fixture(autouse=True)
def _forget():
    yield
    tree.cache_clear()


def test_slow_tests_exist():
    """Every name in `tests/slow.txt` is that of a file or a test, and stands there once."""
    names = (ROOT / "tests" / "slow.txt").read_text().split()
    assert names == sorted(set(names))
    for name in names:
        path, _, function = name.partition("::")
        assert (ROOT / path).exists()
        assert not function or function in {
            f.name for f in ast.walk(tree(ROOT / path)) if hasattr(f, "name")
        }
