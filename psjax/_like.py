"""Whether parameters are those that a selection was made for."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr

from psjax._masks import broadcasts
from psjax._notation import size_of
from psjax._types import Params


def check_like(call: str, selection: Any, params: Params):
    """The parameters must be those that `select` was given: a wrong size would gather zeros."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = tuple(keystr(path) for path, _ in leaves)
    if paths != selection.paths:
        odd = sorted(set(paths) ^ set(selection.paths)) or list(paths)
        msg = (
            f"{call}: the parameters are not the tree that select(like=...) was given; they differ "
            f"in {', '.join(odd[:3])}{' ...' if len(odd) > 3 else ''}."
        )
        raise ValueError(msg)
    for (path, x), spec in zip(leaves, selection.specs):
        for d, entry in enumerate(spec or ()):
            size = size_of(entry, selection.sizes) if entry is not None else None
            if size is not None and (d >= jnp.ndim(x) or jnp.shape(x)[d] != size):
                msg = (
                    f"{call}: {keystr(path)} has shape {tuple(jnp.shape(x))}, but axis {entry!r} "
                    f"(dimension {d}) had size {size} in select(like=...)."
                )
                raise ValueError(msg)
    for (path, x), keep in zip(leaves, selection.keep or ()):
        if keep is not None and not broadcasts(keep.shape, x.shape):
            msg = (
                f"{call}: the mask that Selection.drop got for {keystr(path)} has shape "
                f"{tuple(keep.shape)}, which does not broadcast to the leaf's {tuple(x.shape)}."
            )
            raise ValueError(msg)
