"""The same gradient function over many devices: split the elements, map, psum."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._elements import each_in_axes


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
      ValueError: a mesh of several axes; at the call, an argument with `in_axes=0` whose rows are
        not the elements.
    """
    if len(mesh.axis_names) != 1:
        msg = f"shard(fn, mesh): the mesh has axes {mesh.axis_names}; write a mesh of one axis."
        raise ValueError(msg)
    (axis,) = mesh.axis_names
    mesh = jax.sharding.Mesh(mesh.devices, mesh.axis_names)  # of axes of type Auto, which P() needs

    def sharded(params, selection, *args):
        rows = _mapped("shard", in_axes, args)
        specs = [P(axis) if row else P() for row in rows]

        def body(params, selection, *args):
            own = lambda tree: jax.tree.map(lambda x: x[0], tree)
            args = [own(arg) if row else arg for arg, row in zip(args, rows)]
            return jax.lax.psum(fn(params, own(selection), *args), axis)

        by_device = _split_args("shard", args, rows, mesh.size, selection.num_elements)
        spread = jax.shard_map(body, mesh=mesh, in_specs=(P(), P(axis), *specs), out_specs=P())
        return spread(params, selection.split(mesh.size), *by_device)

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
        rows = tuple(_mapped("pmap", in_axes, args))
        if rows not in compiled:
            axes = (None, 0, *(0 if row else None for row in rows))
            body = lambda *operands: jax.lax.psum(fn(*operands), "psjax")
            compiled[rows] = jax.pmap(
                body, axis_name="psjax", in_axes=axes, out_axes=None, devices=devices
            )
        by_device = _split_args("pmap", args, rows, len(devices), selection.num_elements)
        return compiled[rows](params, selection.split(len(devices)), *by_device)

    return pmapped


def _mapped(call, in_axes, args):
    """Which arguments go row by row with the elements."""
    return [
        axes is not None and not isinstance(axes, P) for axes in each_in_axes(call, in_axes, args)
    ]


def _split_args(call, args, rows, n, num_elements):
    def divide(i, path, x):
        if not jnp.ndim(x) or x.shape[0] != num_elements:
            msg = (
                f"{call}: argument {i}{keystr(path)} has shape {jnp.shape(x)}; with in_axes=0 its "
                f"first dimension must be the {num_elements} elements."
            )
            raise ValueError(msg)
        places = np.arange(n * -(-num_elements // n)).reshape(n, -1)
        return x[np.minimum(places, num_elements - 1)]

    return [
        jax.tree_util.tree_map_with_path(functools.partial(divide, i), a) if row else a
        for i, (a, row) in enumerate(zip(args, rows))
    ]
