"""A gradient function over many devices: split the elements, map, psum."""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath, keystr
from jaxtyping import PyTree

from psjax._elements import each_in_axes
from psjax._selection import Selection
from psjax._types import AxisName, InAxes, Params


def shard(
    fn: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    in_axes: Any = None,
    axis_name: str | tuple[str, ...] | None = None,
):
    """Spread a gradient function's elements over a mesh, by `jax.shard_map`.

    `shard(fn, mesh)(params, selection, *args)` equals `fn(params, selection, *args)`: the elements
    are split evenly, every device sums over its part, and one psum adds the parts. Call it inside
    your `jax.jit`.

    Parameters and arguments may be laid out over the mesh in any way. Every device gets them whole,
    and every device has the whole result. The axes of the mesh may be Auto or Explicit, and
    `jax.set_mesh` may be used or not.

    Args:
      fn: `(params, selection, *args) -> tree of this device's sums`, such as
        `psjax.value_and_grad(element_fn)` or `psjax.partially_separable(element_fn)`.
      mesh: a `jax.sharding.Mesh`.
      in_axes: the `in_axes` of `fn`. Pass them if an argument is mapped with 0: its rows are then
        split like the elements.
      axis_name: the axis of the mesh over which the elements are spread, or a tuple of axes.
        Devices along the other axes compute the same. None: the only axis.

    Raises:
      ValueError: the mesh does not have the axis, or has several and `axis_name` is None. At the
        call: an argument with `in_axes=0` does not have one row per element, or `jax.set_mesh` set
        another mesh.
    """
    axes = _axes_of(mesh, axis_name)
    n = math.prod(mesh.shape[axis] for axis in axes)

    def sharded(params: Params, selection: Selection, *args: PyTree):
        rows = _mapped("shard", in_axes, args)

        def body(params: Params, selection: Selection, *args: PyTree):
            own = lambda tree: jax.tree.map(lambda x: x[0], tree)
            mine = [own(arg) if row else arg for arg, row in zip(args, rows)]
            return jax.lax.psum(fn(params, own(selection), *mine), axes)

        where = _mesh_of_call(mesh, (params, selection, args))
        parts = _split_args("shard", args, rows, n, selection.num_elements)
        operands = (params, selection.split(n), *parts)
        spread = (False, True, *rows)
        operands = [_laid_out(x, axes if s else (), where) for x, s in zip(operands, spread)]
        specs = tuple(P(axes) if s else P() for s in spread)
        return jax.shard_map(body, mesh=where, in_specs=specs, out_specs=P())(*operands)

    return sharded


def _axes_of(mesh: jax.sharding.Mesh, axis_name: AxisName | None):
    """The names of the axes over which the elements are spread."""
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is None and len(mesh.axis_names) == 1:
        return mesh.axis_names
    if axis_name is None or not axes or not set(axes) <= set(mesh.axis_names):
        msg = (
            f"shard(fn, mesh, axis_name={axis_name!r}): the mesh has axes {mesh.axis_names}; pass "
            "the one over which the elements are spread, or a tuple of several."
        )
        raise ValueError(msg)
    return axes


def _mesh_of_call(mesh: jax.sharding.Mesh, operands: PyTree):
    """The mesh for `jax.shard_map`: of the context, or the user's; Explicit if an operand is."""
    context = jax.sharding.get_abstract_mesh()
    if context.empty:
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(operands)]
        explicit = any(AxisType.Explicit in m.axis_types for m in meshes if not m.empty)
        return mesh if explicit else jax.sharding.Mesh(mesh.devices, mesh.axis_names)
    if dict(context.shape) != dict(mesh.shape):
        msg = (
            f"shard(fn, mesh): the mesh is {dict(mesh.shape)}, but the call is under "
            f"jax.set_mesh of {dict(context.shape)}; pass that mesh."
        )
        raise ValueError(msg)
    return context


def _laid_out(
    tree: PyTree, axes: tuple[Hashable, ...], mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
):
    """Lay rows out over some axes; `jax.shard_map` does it by itself for Auto axes only."""
    types = dict(zip(mesh.axis_names, mesh.axis_types))
    if AxisType.Explicit not in types.values():
        return tree
    explicit = tuple(axis for axis in axes if types[axis] == AxisType.Explicit)
    where = NamedSharding(mesh, P(explicit) if explicit else P())
    return jax.tree.map(lambda x: jax.reshard(x, where), tree)


def pmap(fn: Callable[..., Any], devices: Any = None, in_axes: Any = None):
    """Spread a gradient function's elements over devices, by `jax.pmap`.

    Args:
      fn: as in `shard`.
      devices: a list of devices; None for all local ones.
      in_axes: as in `shard`.

    Returns:
      A function like `fn`. Call it outside `jax.jit`, because `jax.pmap` compiles by itself. In a
      training loop, put the whole step into your own `jax.pmap` instead.
    """
    devices = jax.local_devices() if devices is None else list(devices)
    compiled = {}

    def pmapped(params: Params, selection: Selection, *args: PyTree):
        rows = tuple(_mapped("pmap", in_axes, args))
        if rows not in compiled:
            axes = (None, 0, *(0 if row else None for row in rows))
            body = lambda *operands: jax.lax.psum(fn(*operands), "psjax")
            compiled[rows] = jax.pmap(
                body, axis_name="psjax", in_axes=axes, out_axes=None, devices=devices
            )
        by_device = _split_args("pmap", args, rows, len(devices), selection.num_elements)
        operands = params, selection.split(len(devices)), *by_device
        if jax.sharding.get_abstract_mesh().empty:
            return compiled[rows](*operands)
        with jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ())):  # pmap has its own mesh
            return compiled[rows](*operands)

    return pmapped


def _mapped(call: str, in_axes: InAxes, args: PyTree):
    """Which arguments have one row per element."""
    return [
        axes is not None and not isinstance(axes, P) for axes in each_in_axes(call, in_axes, args)
    ]


def _split_args(call: str, args: PyTree, rows: Sequence[bool], n: int, num_elements: int):
    def divide(i: int, path: KeyPath, x: Any):
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
