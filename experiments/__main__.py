"""Lists the programs: what `python -m` takes, and the first line that each says of itself."""

import ast
import pathlib

HERE = pathlib.Path(__file__).parent


def programs() -> dict[str, str]:
    """Name and first line of every module that is run by itself; none is imported."""
    found = {}
    for path in sorted(HERE.rglob("*.py")):
        module = ast.parse(path.read_text())
        runs = any(isinstance(x, ast.If) and "__main__" in ast.unparse(x.test) for x in module.body)
        if runs and path != HERE / "__main__.py":
            name = ".".join(path.relative_to(HERE.parent).with_suffix("").parts)
            line = (ast.get_docstring(module) or "").splitlines()[0]
            found[name.removesuffix(".__main__")] = line
    return found


def listed(prefix: str = "") -> str:
    """The programs whose names begin so, two lines each."""
    chosen = {name: line for name, line in programs().items() if name.startswith(prefix)}
    return "\n".join(f"python -m {name}\n    {line}" for name, line in chosen.items())


if __name__ == "__main__":
    print(f"Programs; --help after a name says more.\n\n{listed()}")
