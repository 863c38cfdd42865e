"""What `dir` of a public module lists, and so what completion offers."""

from collections.abc import Callable, Mapping
from typing import Any


def listing(namespace: Mapping[str, Any]) -> Callable[[], list[str]]:
    """A `__dir__` for a module: its `__all__`, or every name without an underscore.

    Args:
      namespace: `globals()` of the module.
    """

    def names() -> list[str]:
        public = [name for name in namespace if not name.startswith("_")]
        dunders = [name for name in ("__doc__", "__file__", "__version__") if name in namespace]
        return sorted([*namespace.get("__all__", public), *dunders])

    return names
