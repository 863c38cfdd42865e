"""The line of the user's code that made an equation."""

import pathlib
from typing import Any

import flax
import jax
import jaxlib

_LIBRARIES = [
    str(pathlib.Path(str(module.__file__)).parent) + "/" for module in (jax, jaxlib, flax)
]


def source_of(eqn: Any) -> str:
    """`file:line` of the innermost frame outside JAX and Flax; empty if unknown."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback is not None else ():
        if not any(frame.file_name.startswith(library) for library in _LIBRARIES):
            cell = "ipykernel" in frame.file_name
            name = "notebook cell" if cell else pathlib.Path(frame.file_name).name
            return f"{name}:{frame.line_num}"
    return ""
