"""What `dir` of a public module lists, and so what completion offers."""

import types
from collections.abc import Callable, Mapping
from typing import Any


def listing(namespace: Mapping[str, Any]) -> Callable[[], list[str]]:
    """A `__dir__` for a module: its `__all__`, or what is psjax's and has no underscore.

    Args:
      namespace: `globals()` of the module.
    """

    def names() -> list[str]:
        own = lambda x: not isinstance(x, types.ModuleType) or x.__name__.startswith("psjax")
        public = [name for name, x in namespace.items() if not name.startswith("_") and own(x)]
        dunders = [name for name in ("__doc__", "__file__", "__version__") if name in namespace]
        return sorted([*namespace.get("__all__", public), *dunders])

    return names
