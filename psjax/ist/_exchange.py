"""Weights in shards over the workers: fetch a subnet, train it, return it to the owners."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree

from psjax._leaf import selected
from psjax._local import first_good, routes_home
from psjax._select import replicas
from psjax._selection import Selection, is_spec
from psjax._types import Batch, OptState, Params
from psjax._update import Held, LocalUpdate, Update

_HOME = " at home"  # suffix of the name of the axis along which a leaf is sharded


def store_specs(axes: Any, sizes: Mapping[str, int], axis_name: str) -> Any:
    """How each leaf is sharded: along the first of its divided axes, with one shard per worker.

    Args:
      axes: tree of `PartitionSpec`s of axis names, of the parameters or (`state_axes`) of an
        optimizer's state.
      sizes: `{axis name: size}` of the divided axes.
      axis_name: name of the mesh axis of the workers.

    Returns:
      A tree of `PartitionSpec`s for `jax.device_put` or `jax.shard_map`. It is `P()` for shared
      leaves, of which every worker has a copy.
    """

    def leaf(spec: P):
        home = _home(spec, sizes)
        return P() if home is None else P(*[None] * home, axis_name)

    return jax.tree.map(leaf, axes, is_leaf=is_spec)


class Exchange(Update):
    """A round, as `exchange` returns it.

    Attributes:
      update: the local update, or `jax.jit` of it.
      axis_name: of the workers.
    """

    def __init__(self, update: Callable[..., Any], local: LocalUpdate, axis_name: str):
        self.update = update
        self.mutable = local.mutable
        self.axis_name = axis_name
        self._local = local

    def init_one(self, params: Any) -> Any:
        """The optimizer's state for the parameters that are trained."""
        return self._local.init_one(params)

    def layout(self, own: Any, shared: Any) -> Any:
        """Not known here: the state lies as `store_specs` says, shard by shard."""
        msg = (
            "layout: under psjax.ist.exchange the state lies in shards; pass "
            "psjax.ist.store_specs(psjax.ist.state_axes(optimizer, axes, like), sizes, axis_name)."
        )
        raise ValueError(msg)

    def with_held(self, params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        """A round, and which entries of this worker's shards somebody held."""
        return self.over(None, params, opt_state, selection, batches)[:4]

    def over(
        self,
        wire: Any,
        params: Params,
        opt_state: OptState,
        selection: Selection,
        batches: Batch,
        residual: PyTree = None,
    ):
        """A round whose changes of weights go over a wire that encodes them; None: as they are.

        Args:
          wire: a `psjax.codec` wire, or None.
          params: as in a round.
          opt_state: likewise.
          selection: likewise.
          batches: likewise.
          residual: shards like the parameters of what the wire has not delivered, or None. It
            travels with its entry as a moment does.

        Returns:
          `(params, opt_state, metrics, Held, residual)`.
        """
        axis_name = self.axis_name
        n, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
        _check(selection, n)
        opt_state = jax.tree.map(jnp.asarray, opt_state)
        leaves, treedef = jax.tree.flatten((params, opt_state, residual))
        _check_shards(params, selection, n)
        like = _whole(params, selection)
        local = self._local
        routes = routes_home(
            "exchange", local.optimizer, selection, params, opt_state, local.mutable, like
        )
        copied = [route.copied for route in routes] + [False] * (len(leaves) - len(routes))
        specs = [route.spec for route in routes]
        specs += selection.specs if residual is not None else ()
        homes: Any = [_home(spec, selection.indices) for spec in specs]
        part = _part(selection, me, n)
        divided = selection.indices
        split = [i for i, home in enumerate(homes) if home is not None]
        names = [_at_home(specs[i], homes[i]) for i in split]
        part = part.of(names, [leaves[i] for i in split])

        # Leaves whose divided axes are only parts of products lie whole with every worker.
        mixed = [i for i, home in enumerate(homes) if home is None and selected(specs[i], divided)]
        pick = lambda xs: [xs[i] for i in mixed]
        mine = selection[jnp.asarray(me)[None]].of(pick(specs), pick(leaves))

        def by_owner(y: Array, home: int):  # [..., rows of all owners, ...] -> [owner, ..., ...]
            return jnp.moveaxis(y.reshape(*y.shape[:home], n, -1, *y.shape[home + 1 :]), home, 0)

        def together(y: Array, home: int):
            y = jnp.moveaxis(y, 0, home)
            return y.reshape(*y.shape[:home], -1, *y.shape[home + 2 :])

        seen = list(leaves)
        for i, y in zip(mixed, mine.gather(pick(leaves))):
            seen[i] = y[0]
        sent = dict(zip(split, part.gather([leaves[i] for i in split])))
        for i, y in sent.items():  # [subnet, ...] to [owner, ...]
            seen[i] = together(jax.lax.all_to_all(y, axis_name, 0, 0), homes[i])
        subnet, state, waiting = treedef.unflatten(seen)
        subnet, state, metrics = self.update(subnet, state, replicas(subnet, 1), batches)

        finite, new = metrics.finite[0], jax.tree.leaves((subnet, state, waiting))
        holders = jax.lax.psum(finite.astype(jnp.int32), axis_name)
        back, totals = {}, {}
        if wire is not None:
            weights = range(len(selection.specs))
            own = [i for i in weights if not copied[i] and i not in mixed]
            first = len(leaves) - len(weights)  # of the residual
            change = {}
            for i in own:
                late = 0 if residual is None else seen[first + i]
                change[i] = jnp.where(finite, new[i] - seen[i] + late, jnp.zeros_like(new[i]))
                if homes[i] is None:
                    change[i] = change[i] / jnp.maximum(holders, 1).astype(change[i].dtype)
            apart = [i for i in own if homes[i] is not None]
            shared = [i for i in own if homes[i] is None]
            received, decoded = wire.to_owners([by_owner(change[i], homes[i]) for i in apart])
            back = {i: sent[i] + y for i, y in zip(apart, received)}
            kept_of = {i: together(y, homes[i]) for i, y in zip(apart, decoded)}
            summed, left = wire.total([change[i] for i in shared])
            totals = {i: leaves[i] + y for i, y in zip(shared, summed)}
            rest = {i: change[i] - kept_of[i] for i in apart}
            rest |= {i: y * holders.astype(y.dtype) for i, y in zip(shared, left)}
            for i, y in rest.items() if residual is not None else ():
                new[first + i] = jnp.where(finite, y, seen[first + i])
        for i in split:
            if i not in back:
                back[i] = jax.lax.all_to_all(by_owner(new[i], homes[i]), axis_name, 0, 0)
        back = [back[i] for i in split]  # [subnet, ..., rows of mine, ...]
        for i, y in zip(split, part.scatter_mean(back, [leaves[i] for i in split])):
            new[i] = y
        stacked = [y[None] for y in pick(new)]
        means = mine.scatter_mean(stacked, pick(leaves), finite[None], axis_name)
        for i, y in zip(mixed, means):
            new[i] = y
        alike = {i for i, home in enumerate(homes) if home is None} - set(mixed)
        for i in sorted(alike):
            if i in totals:
                new[i] = jnp.where(holders > 0, totals[i], leaves[i])
            elif copied[i]:
                new[i] = first_good(new[i][None], leaves[i], finite[None], axis_name)
            else:
                wide = jnp.promote_types(leaves[i].dtype, jnp.float32)
                mine_alone = jnp.where(finite, new[i], jnp.zeros_like(new[i])).astype(wide)
                mean = jax.lax.psum(mine_alone, axis_name) / jnp.maximum(holders, 1).astype(wide)
                new[i] = jnp.where(holders > 0, mean.astype(leaves[i].dtype), leaves[i])

        anybody = holders > 0
        entries = {i: anybody for i in alike}
        everyone = jax.lax.all_gather(finite, axis_name)
        counts = part.counts([leaves[i] for i in split], everyone)
        entries |= {i: count > 0 for i, count in zip(split, counts)}
        counts = mine.counts(pick(leaves), finite[None], axis_name)
        entries |= {i: count > 0 for i, count in zip(mixed, counts)}
        ordered = [entries[i] for i in range(len(selection.specs))]
        held = Held(jax.tree.structure(params).unflatten(ordered), anybody)
        params, opt_state, residual = treedef.unflatten(new)
        return params, opt_state, metrics, held, residual


def exchange(update: Callable[..., Any], axis_name: str) -> Exchange:
    r"""A round of independent subnet training between workers that own the weights in shards.

    There is no coordinator (section 4.4 of arXiv:1910.02120): each weight matrix is sharded over
    the workers, and all workers draw the same subnets from `(seed, round_number)`. Worker s fetches
    subnet s from its owners with one `all_to_all` per leaf, trains it, and returns it with another;
    shared leaves are averaged. `psjax.cost.independent_subnets` gives the traffic, to the byte.
    `psjax.codec.compress` around it encodes what is returned; `psjax.outer` keeps its own state in
    the same shards.

    Args:
      update: `psjax.local_update(loss_fn, optimizer)`, without `axis_name`. The optimizer
        determines how its state is exchanged.
      axis_name: name of the mapped axis, whose size is the number of subnets.

    Returns:
      A function `(params, opt_state, selection, batches) -> (params, opt_state, LocalMetrics)` for
      the inside of your `jax.shard_map`: `params` and `opt_state` are this worker's shards, as
      `store_specs` lays them out; `selection` is the whole selection, replicated and drawn with
      `stratified=True`; `batches` `[1, J, ...]` and the metrics are those of this worker.

    Raises:
      TypeError: `update` is not from `psjax.local_update`.
      ValueError: at the call, the numbers of subnets and workers differ, the shards do not fit, or
        a state of the optimizer cannot be divided.
    """
    local = getattr(update, "__wrapped__", update)
    if not isinstance(local, LocalUpdate):
        msg = (
            f"exchange(update={update!r}): pass psjax.local_update(loss_fn, optimizer) or jax.jit "
            "of it; its optimizer determines how the state is exchanged."
        )
        raise TypeError(msg)

    return Exchange(update, local, axis_name)


def _whole(params: Params, selection: Selection):
    """The shapes of the whole parameters, from those of one worker's shards."""

    def leaf(spec: P, x: Array):
        names = [*(spec or ()), *[None] * x.ndim]
        shape = [selection.sizes.get(name, n) for name, n in zip(names, x.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), x.dtype)

    leaves, treedef = jax.tree.flatten(params)
    return treedef.unflatten(map(leaf, selection.specs, leaves))


def _home(spec: P, sizes: Mapping[str, Any]):
    """The dimension along which a leaf is sharded: its first divided axis, or None."""
    return next((d for d, name in enumerate(spec or ()) if name in sizes), None)  # not a product


def _at_home(spec: P, home: int | None):
    return P(*[name + _HOME if d == home else name for d, name in enumerate(spec)])


def _part(selection: Selection, me: ArrayLike, n: int):
    """What each subnet sees of this worker's shards: its rows there, and its rows of other axes."""
    indices, sizes = dict(selection.indices), dict(selection.axis_sizes)
    for name, index in selection.indices.items():
        block = selection.sizes[name] // n
        mine = jax.lax.dynamic_index_in_dim(jnp.asarray(index).reshape(n, n, -1), me, 1, False)
        indices[name + _HOME] = (mine - me * block).astype(jnp.int32)
        sizes[name + _HOME] = block
    return dataclasses.replace(
        selection,
        indices=indices,
        axis_sizes=tuple(sorted(sizes.items())),
        disjoint=(*selection.disjoint, *(name + _HOME for name in selection.indices)),
    )


def _check(selection: Selection, n: int):
    if selection.keep is not None:
        msg = (
            "exchange: the selection drops weights (Selection.drop), which does not work with "
            "weights in shards; use psjax.local_update alone, or a selection that drops nothing."
        )
        raise ValueError(msg)
    if selection.num_elements != n or selection.blocks != n:
        msg = (
            f"exchange: {n} workers need a stratified partition into {n} subnets; this selection "
            f"has {selection.num_elements} elements and {selection.blocks} blocks. Pass "
            f"psjax.ist.membership(seed, round_number, axes, sizes, {n}, stratified=True)."
        )
        raise ValueError(msg)


def _check_shards(params: Params, selection: Selection, n: int):
    for (path, x), spec in zip(jax.tree_util.tree_leaves_with_path(params), selection.specs):
        home = _home(spec, selection.indices)
        for d, name in enumerate(spec or ()):
            if name in selection.indices:
                want = selection.sizes[name] // (n if d == home else 1)
                if x.shape[d] != want:
                    msg = (
                        f"exchange: {keystr(path)} has shape {x.shape} on this worker, but "
                        f"dimension {d}, {name!r}, must be {want}; lay the parameters out as "
                        "psjax.ist.store_specs says."
                    )
                    raise ValueError(msg)
