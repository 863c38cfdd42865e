"""Models that nobody wrote for `psjax.infer_axes`, by name.

Nothing in them says which axes belong together, and none of them is built before `make` is called.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from tests.axes import (
    models_attention,
    models_conv,
    models_dense,
    models_loops,
    models_objects,
    models_psjax,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function of parameters and inputs.

    Attributes:
      name: of the model.
      make: returns `(apply, params, inputs)`; `apply(params, *inputs)` is an array or several.
      large: one of the few that are allowed more than a second.
      needs: an optional package without which `make` fails.
    """

    name: str
    make: Callable[[], tuple[Callable[..., Any], Any, tuple[Any, ...]]]
    large: bool = False
    needs: str | None = None


LARGE = {*models_conv.RESNETS, "gpt-12-layers", "psjax-vgg11"}
PLAIN = [
    models_psjax.MODELS,
    models_dense.MODELS,
    models_conv.MODELS,
    models_attention.MODELS,
    models_loops.MODELS,
    models_objects.NNX,
]


def _cases(models, needs=None):
    return {name: Case(name, make, name in LARGE, needs) for name, make in models.items()}


CASES: dict[str, Case] = _cases(models_objects.EQUINOX, "equinox")
for _models in PLAIN:
    CASES |= _cases(_models)
