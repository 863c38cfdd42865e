"""How an optimizer's state travels: as the parameter that a part of it belongs to, or whole."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._selection import is_spec


def state_axes(optimizer: Any, axes: Any, like: Any) -> Any:
    """Axis names of an optimizer's state: its trees shaped like the parameters have theirs.

    Args:
      optimizer: an `optax.GradientTransformation`.
      axes: tree of `PartitionSpec`s of the parameters.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.
    """
    state = jax.eval_shape(optimizer.init, like)
    specs = jax.tree.leaves(axes, is_leaf=is_spec)
    return jax.tree.structure(state).unflatten(state_specs_of(like, specs, state))


def state_specs_of(params, specs, opt_state):
    """How each leaf of the optimizer's state travels: as the parameter it belongs to, or whole."""
    return [P() if i is None else specs[i] for i in state_owners(params, opt_state)]


def state_owners(params, opt_state):
    """Number of the parameter that each leaf of the optimizer's state belongs to, or None.

    A leaf belongs to the parameter whose path its own path ends with, and whose shape it has.
    """
    owners = {
        path: (i, jnp.shape(x))
        for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    }
    found_owners = []
    for path, x in jax.tree_util.tree_leaves_with_path(opt_state):
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        tails = [path[i:] for i in range(len(path) + 1)]
        found = [owners[tail][0] for tail in tails if owners.get(tail, (0, None))[1] == x.shape]
        if not found and x.ndim:
            msg = (
                f"local_update(optimizer=...): the optimizer's state {keystr(path)} has shape "
                f"{x.shape} and no parameter it belongs to has it; only trees shaped like the "
                "parameters and scalars can travel with the weights. Write an optimizer "
                "whose state is per entry, such as optax.sgd or optax.adam."
            )
            raise ValueError(msg)
        found_owners.append(found[0] if found else None)
    return found_owners
