"""Placement of values: mapped axes of `shard_map` they vary over, and explicit mesh axes."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import PyTree


def varying(tree: PyTree) -> frozenset[str]:
    """The mapped axes of `shard_map(check_vma=True)` that any leaf varies over."""
    found = frozenset()
    for x in jax.tree.leaves(tree):
        found |= getattr(getattr(jax.typeof(x), "manual_axis_type", None), "varying", frozenset())
    return found


def vary(tree: PyTree, over: PyTree):
    """Make every leaf vary over the mapped axes that any leaf of `over` varies over.

    Under `shard_map(check_vma=True)`, JAX sums the derivative with respect to a replicated value
    over the devices, but psjax promises this device's sum. Therefore shared leaves must vary before
    they are differentiated, and the carry of a loop must vary from the start. A `where` with a
    varying mask makes them vary, and XLA removes it. In other contexts nothing is done.
    """
    axes, mask, covered = varying((tree, over)), jnp.asarray(True), frozenset()
    for x in jax.tree.leaves(over):
        if jnp.size(x) and not varying(x) <= covered:
            covered |= varying(x)
            x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            mask = mask | jnp.any(x)  # XLA removes it with the `where`
    return jax.tree.map(lambda x: x if axes <= varying(x) else jnp.where(mask, x, x), tree)


def whole(tree: PyTree):
    """Gather every leaf that is sharded over explicit mesh axes onto every device.

    JAX refuses to index a sharded dimension of such a leaf.
    """

    def leaf(x: ArrayLike):
        where = _sharding(x)
        return x if where is None else jax.reshard(x, NamedSharding(where.mesh, P()))

    return jax.tree.map(leaf, tree)


def placed(tree: PyTree, like: PyTree):
    """Lay out the leaves of a tree like those of another one, from before `whole`."""

    def leaf(x: ArrayLike, like: ArrayLike | jax.ShapeDtypeStruct):
        where = _sharding(like)
        return x if where is None else jax.reshard(x, where)

    return jax.tree.map(leaf, tree, like)


def _sharding(x: object):
    """The sharding of a value that is sharded over explicit mesh axes, else None."""
    if not isinstance(x, jax.Array):
        return None
    where = jax.typeof(x).sharding
    return None if all(entry is None for entry in where.spec) else where
