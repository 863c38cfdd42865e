"""A round of training as a user spreads it over devices: by `pmap`, or by `shard_map`."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psjax


def over_devices(inner, wrapper, devices):
    """`inner`, with `axis_name="workers"`, as a call on `split` selections and divided batches.

    Args:
      inner: `(params, state, selection, batches) -> params, state, metrics` of one device.
      wrapper: "pmap", "shard_map" or "shard_map, check_vma=False".
      devices: how many.
    """
    if wrapper == "pmap":
        return jax.pmap(
            inner,
            axis_name="workers",
            in_axes=(None, None, 0, 0),
            out_axes=(None, None, 0),
            devices=jax.devices()[:devices],
        )
    mesh = jax.make_mesh(
        (devices,), ("workers",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )

    def body(params, state, selection, batches):
        drop = functools.partial(jax.tree.map, lambda x: x[0])
        params, state, metrics = inner(params, state, drop(selection), drop(batches))
        return params, state, jax.tree.map(lambda x: x[None], metrics)

    return jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P(), P(), P("workers"), P("workers")),
            out_specs=(P(), P(), P("workers")),
            check_vma="False" not in wrapper,
        )
    )


def divided(batches, devices):
    """`[E, ...] -> [devices, ceil(E / devices), ...]`, the last worker's batches repeated."""
    n = len(jax.tree.leaves(batches)[0])
    each = -(-n // devices)
    rows = np.minimum(np.arange(devices * each), n - 1).reshape(devices, each)
    return jax.tree.map(lambda x: x[rows], batches)


def over_owners(body, mesh, specs, axes, sizes):
    """A jitted round between workers that own the weights in shards, of subnets drawn by number.

    Args:
      body: `(params, state, selection, batches) -> params, state, metrics` of one worker.
      mesh: of one axis, "w".
      specs: of the parameters and of the state.
      axes: of the whole parameters.
      sizes: of the divided axes.
    """

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(*specs, P(), P("w")), out_specs=(*specs, P("w"))
    )
    def round(params, state, number, batches):
        selection = psjax.ist.membership(0, number, axes, sizes, mesh.size, stratified=True)
        return body(params, state, selection, batches)

    return round
