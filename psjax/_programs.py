"""Programs inside a traced program: those of a loop, a condition or a call."""

from typing import Any

import jax


def programs_in(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found = jax.tree.leaves(dict(eqn.params), is_leaf=_is_program)
    return [getattr(x, "jaxpr", x) for x in found if _is_program(x)]


def _is_program(x: object):
    return hasattr(x, "eqns") or hasattr(x, "jaxpr")
