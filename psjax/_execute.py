"""The same gradient function over many devices: split the elements, map, psum."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P


def shard(fn: Callable[..., Any], mesh: jax.sharding.Mesh, in_axes: Any = None):
    """Spread a gradient function's elements over a mesh of one axis, by `jax.shard_map`.

    `shard(fn, mesh)(params, selection, *args)` equals `fn(params, selection, *args)`: the elements
    are split evenly, every device sums its own, one psum adds. Parameters and arguments are
    replicated. Call it inside your `jax.jit`.

    Args:
      fn: `(params, selection, *args) -> tree of this device's sums`, such as
        `psjax.value_and_grad(element_fn)` or `psjax.partially_separable(element_fn)`.
      mesh: a `jax.sharding.Mesh` of one axis.
      in_axes: those of `fn`, where an argument is mapped with 0; its rows go with their elements.

    Raises:
      ValueError: a mesh of several axes.
    """
    if len(mesh.axis_names) != 1:
        msg = f"shard(fn, mesh): the mesh has axes {mesh.axis_names}; write a mesh of one axis."
        raise ValueError(msg)
    (axis,) = mesh.axis_names

    def sharded(params, selection, *args):
        by_device = _split_args(args, in_axes, mesh.size)
        mapped = [P(axis) if rows else P() for rows in _mapped(args, in_axes)]

        def body(params, selection, *args):
            own = lambda tree: jax.tree.map(lambda x: x[0], tree)  # noqa: E731
            args = [own(a) if spec == P(axis) else a for a, spec in zip(args, mapped)]
            return jax.lax.psum(fn(params, own(selection), *args), axis)

        return jax.shard_map(
            body, mesh=mesh, in_specs=(P(), P(axis), *mapped), out_specs=P()
        )(params, selection.split(mesh.size), *by_device)

    return sharded


def pmap(fn: Callable[..., Any], devices: Any = None, in_axes: Any = None):
    """Spread a gradient function's elements over devices by `jax.pmap`, which compiles by itself.

    Args:
      fn: as in `shard`.
      devices: a list of devices; None for all local ones.
      in_axes: as in `shard`.

    Returns:
      A function like `fn`, to be called outside `jit`; in a training loop put the whole step into
      your own `jax.pmap`, as the README shows.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    compiled = {}

    def pmapped(params, selection, *args):
        mapped = tuple(_mapped(args, in_axes))
        if mapped not in compiled:
            axes = (None, 0, *(0 if rows else None for rows in mapped))
            body = lambda *operands: jax.lax.psum(fn(*operands), "psjax")  # noqa: E731
            compiled[mapped] = jax.pmap(
                body, axis_name="psjax", in_axes=axes, out_axes=None, devices=devices
            )
        by_device = _split_args(args, in_axes, len(devices))
        return compiled[mapped](params, selection.split(len(devices)), *by_device)

    return pmapped


def _mapped(args, in_axes):
    """Which arguments go row by row with the elements."""
    if not isinstance(in_axes, tuple) or isinstance(in_axes, P):
        in_axes = (in_axes,) * len(args)
    return [isinstance(axis, int) and axis == 0 for axis in in_axes]


def _split_args(args, in_axes, n):
    def divide(x):
        each = -(-x.shape[0] // n)
        x = jnp.pad(x, [(0, n * each - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(n, each, *x.shape[1:])

    rows = _mapped(args, in_axes)
    return [jax.tree.map(divide, a) if row else a for a, row in zip(args, rows)]
