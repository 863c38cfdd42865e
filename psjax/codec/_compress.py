"""A round whose changes are encoded on their way between workers, whole or by fragments."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from jaxtyping import Array

from psjax._fragments import Fragments
from psjax._leaf import selected
from psjax._local import first_good
from psjax._masks import kept
from psjax._placement import vary
from psjax._selection import Selection
from psjax._sums import wide
from psjax._types import Batch, OptState, Params
from psjax._update import Held, LocalUpdate, Update, check_state, holders, unwrapped
from psjax.codec._codecs import Codec, ErrorFeedback
from psjax.codec._reduce import Wire
from psjax.ist._exchange import Exchange


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inner", "rounds", "residual", "own", "sent", "arrives"),
    meta_fields=("codec",),
)
@dataclasses.dataclass(frozen=True)
class CompressState:
    """The state of `psjax.codec.compress`.

    Each worker has `inner`, `residual` and `own` of its own, except that under
    `psjax.ist.exchange` they are shards of one; all share `rounds`, `sent` and `arrives`.

    Attributes:
      inner: the state of the update inside.
      rounds: how many have been, int32; it makes the key of a round.
      residual: with error feedback, what has not been delivered, like the parameters; else None.
      own: with fragments, the worker's own weights; else None.
      sent: with a delay, what the fragments on their way add to the weights; else None.
      arrives: with a delay, `bool[F]`, whether anybody took part in sending it; else None.
      codec: what it was made for; a round with another codec is refused.
    """

    inner: Any
    rounds: Any
    residual: Any
    own: Any
    sent: Any
    arrives: Any
    codec: str


_DATA = ("inner", "rounds", "residual", "own", "sent", "arrives")


def _to_dict(state: CompressState):
    tree = {name: getattr(state, name) for name in _DATA}
    return {**serialization.to_state_dict(tree), "codec": state.codec}


def _from_dict(state: CompressState, found: dict[str, Any]):
    _check_codec(found["codec"], state.codec)
    tree = {name: getattr(state, name) for name in _DATA}
    found = {name: found[name] for name in _DATA}
    return dataclasses.replace(state, **serialization.from_state_dict(tree, found))


serialization.register_serialization_state(CompressState, _to_dict, _from_dict)


class Compress(Update):
    """A round, as `compress` returns it.

    Attributes:
      update: the update that was given.
      codec: the codec.
      axis_name: of the workers.
      fragments: `psjax.fragments`, or None.
      seed: of stochastic rounding.
    """

    def __init__(
        self,
        update: LocalUpdate | Exchange,
        codec: Codec,
        axis_name: str,
        fragments: Fragments | None,
        seed: int,
    ):
        self.update = update
        self.mutable = update.mutable
        self.codec = codec
        self.axis_name = axis_name
        self.fragments = fragments
        self.seed = seed

    @property
    def _about(self):
        return f"{self.codec!r}, {self.fragments!r}" if self.fragments else repr(self.codec)

    def init_one(self, params: Any) -> CompressState:
        """One worker's state; under `psjax.ist.exchange` all workers' together."""
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        late = self.fragments is not None and self.fragments.delay > 0
        return CompressState(
            self.update.init_one(params),
            jnp.zeros((), jnp.int32),
            zeros() if isinstance(self.codec, ErrorFeedback) else None,
            None if self.fragments is None else jax.tree.map(jnp.asarray, params),
            zeros() if late else None,
            jnp.zeros(self.fragments.num_fragments, bool) if late and self.fragments else None,
            self._about,
        )

    def layout(self, own: Any, shared: Any) -> CompressState:
        """The number of rounds and what is on its way are shared."""
        state = CompressState(
            self.update.layout(own, shared), shared, own, own, shared, shared, self._about
        )
        empty = {} if isinstance(self.codec, ErrorFeedback) else {"residual": None}
        if self.fragments is None:
            empty["own"] = None
        if self.fragments is None or not self.fragments.delay:
            empty |= {"sent": None, "arrives": None}
        return dataclasses.replace(state, **empty)

    def with_held(self, params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        """A round, and which entries somebody held."""
        check_state("compress(update, codec)", CompressState, opt_state)
        _check_codec(opt_state.codec, self._about)
        state = opt_state
        key = jax.random.fold_in(jax.random.key(self.seed), state.rounds)
        wire = Wire(self.codec, self.axis_name, key)
        more = {"rounds": state.rounds + 1}
        if isinstance(self.update, Exchange):
            new, inner, metrics, held, residual = self.update.over(
                None if self.codec.exact else wire,
                params,
                state.inner,
                selection,
                batches,
                state.residual,
            )
        else:
            params = jax.tree.map(jnp.asarray, params)
            run = self._whole if self.fragments is None else self._fragment
            new, inner, metrics, held, residual, moved = run(
                wire, params, state, selection, batches
            )
            more |= moved
        return (
            new,
            dataclasses.replace(state, inner=inner, residual=residual, **more),
            metrics,
            held,
        )

    # ------------------------------------------------------------------ all weights in every round

    def _whole(
        self,
        wire: Wire,
        params: Params,
        state: CompressState,
        selection: Selection,
        batches: Batch,
    ):
        own = vary(params, (selection, batches, state.inner))
        new, inner, metrics = self.update(own, state.inner, selection, batches)
        before, treedef = jax.tree.flatten(params)
        after = jax.tree.leaves(new)
        mine = holders(selection, params, metrics.finite)[1]
        number, all_of_them = holders(selection, params, metrics.finite, wire.axis_name)
        anybody = number > 0
        held = [anybody if n is number else n > 0 for n in all_of_them]
        coded = set() if self.codec.exact else self._coded(params)
        found = {}
        for i in set(range(len(before))) - coded:
            some = jnp.any(metrics.finite & jnp.asarray(selection.valid))
            whole = not selected(selection.specs[i], selection.indices)
            counts = mine[i], all_of_them[i]
            found[i] = _mean(before[i], after[i], *counts, some, whole, wire.axis_name)
        order = sorted(coded)
        shares = [_share(before[i], after[i], mine[i], all_of_them[i]) for i in order]
        residual = None if state.residual is None else jax.tree.leaves(state.residual)
        late = residual and [residual[i] for i in order]
        sums, left = _sent(wire, shares, late, [held[i] for i in order])
        for i, y in zip(order, sums):
            found[i] = kept(held[i], (before[i] + y).astype(before[i].dtype), before[i])
        moved = dict(zip(order, left))
        residual = residual and [moved.get(i, e) for i, e in enumerate(residual)]
        out = treedef.unflatten([found[i] for i in range(len(before))])
        residual = None if residual is None else treedef.unflatten(residual)
        return out, inner, metrics, Held(treedef.unflatten(held), anybody), residual, {}

    def _coded(self, params: Params):
        """Numbers of the leaves that the codec gets: those of floats that are trained."""
        leaves, treedef = jax.tree.flatten(params)
        trained = jax.tree.leaves(self.trained(treedef.unflatten(range(len(leaves)))))
        return {i for i in trained if jnp.issubdtype(leaves[i].dtype, jnp.floating)}

    # ------------------------------------------------------------------- a fragment in every round

    def _fragment(
        self,
        wire: Wire,
        params: Params,
        state: CompressState,
        selection: Selection,
        batches: Batch,
    ):
        plan: Any = self.fragments
        _check_fragments(plan, params, selection)
        F, d = plan.num_fragments, plan.delay
        now = state.rounds
        before, treedef = jax.tree.flatten(params)
        own = jax.tree.leaves(vary(state.own, (selection, batches, state.inner)))
        arrived = jnp.where(now > d, (now - 1 - d) % F, -1)  # in the round before, at its end
        for i, group in enumerate(plan.groups):
            mixed = (
                before[i]
                if plan.mixing == 0
                else (plan.mixing * own[i] + (1 - plan.mixing) * before[i])
            )
            own[i] = jnp.where(arrived == group, mixed.astype(own[i].dtype), own[i])
        new, inner, metrics = self.update(treedef.unflatten(own), state.inner, selection, batches)
        after = jax.tree.leaves(new)

        mine = holders(selection, params, metrics.finite)[0]
        number = holders(selection, params, metrics.finite, wire.axis_name)[0]
        anybody = number > 0
        shares = [_share(w, y, mine, number) for w, y in zip(before, after)]
        residual = None if state.residual is None else jax.tree.leaves(state.residual)

        def send(fragment: int, shares: list[Array], residual: Any):
            order = plan.leaves(fragment)
            pick = lambda xs: [xs[i] for i in order]
            late = None if residual is None else pick(residual)
            sums, left = _sent(wire, pick(shares), late, [anybody] * len(order))
            found = [jnp.zeros(x.shape, x.dtype) for x in shares]
            for i, y in zip(order, sums):
                found[i] = y
            moved = dict(zip(order, left))
            residual = residual and [moved.get(i, e) for i, e in enumerate(residual)]
            return found, residual

        branches = [functools.partial(send, fragment) for fragment in range(F)]
        sums, residual = jax.lax.switch(now % F, branches, shares, residual)

        fragment, there = now % F, anybody
        moved: dict[str, Any] = {"own": new}
        if d:
            sent = jax.tree.leaves(state.sent)
            fragment = jnp.where(now >= d, (now - d) % F, -1)
            there = state.arrives[fragment]
            waiting = [
                jnp.where(now % F == group, y.astype(x.dtype), x)
                for group, x, y in zip(plan.groups, sent, sums)
            ]
            moved["sent"] = treedef.unflatten(waiting)
            moved["arrives"] = state.arrives.at[now % F].set(anybody)
            sums = sent
        held = [there & (fragment == group) for group in plan.groups]
        out = [jnp.where(h, (w + y).astype(w.dtype), w) for h, w, y in zip(held, before, sums)]
        residual = None if residual is None else treedef.unflatten(residual)
        held = Held(treedef.unflatten(held), there & (fragment >= 0))
        return treedef.unflatten(out), inner, metrics, held, residual, moved


def compress(
    update: Callable[..., Any],
    codec: Codec,
    axis_name: str | None = None,
    *,
    fragments: Fragments | None = None,
    seed: int = 0,
) -> Compress:
    r"""A round in which workers exchange, encoded, what their local steps changed.

    Around `psjax.local_update`, every worker trains its own elements from the shared parameters
    $w$ to $y$, and $y - w$ is sent as `psjax.codec.mean` does. The mean of an entry is taken over
    those who held it. The inner optimizer's state stays with its worker, as in DiLoCo
    (arXiv:2311.08105), and differs between workers; with subnets that change, moments do not follow
    their entries here, as they do under `psjax.ist.exchange`. `identity()` sends weights by one
    `psum` and gives the bits of `local_update(..., axis_name=...)`.

    Around `psjax.ist.exchange`, weights are fetched as they are, and what a subnet changed is
    encoded on its way back to the owners. Moments are not encoded: a rounded second moment may be
    negative.

    With `error_feedback`, a worker keeps what its encoding has lost, entry by entry, and adds it
    the next time that anybody holds the entry. Under `psjax.ist.exchange` the residual lies with
    the entry's owner and travels with the entry, unrounded, as a moment does. That costs more bytes
    than the codec saves.

    An entry that nobody held keeps its bits. What is not trained (`mutable` of `local_update`) and
    integers are sent as they are.

    Args:
      update: `psjax.local_update(loss_fn, optimizer)` without `axis_name`, or what
        `psjax.ist.exchange` returns.
      codec: such as `psjax.codec.int4(64)`.
      axis_name: name of the mapped axis (`pmap`, `shard_map`, `vmap`) of the workers; None under
        `psjax.ist.exchange`, which has its own.
      fragments: `psjax.fragments(axes, F)`: every round exchanges one of F parts of the weights,
        for workers that hold all weights; None: all of them.
      seed: of stochastic rounding; a round's key is that of the seed, the round's number and the
        worker's.

    Returns:
      A round `(params, state, selection, batches) -> (params, state, LocalMetrics)` for the inside
      of the mapped axis: `selection`, `batches` and the metrics are this worker's own, `params` are
      shared. Of the `CompressState`, `compress(...).layout(P("workers"), P())` says what is the
      worker's own and what is shared, and `compress(...).init(params, num_workers)` makes it, the
      former `[n, ...]`; `psjax.outer` around has both methods too. Under `psjax.ist.exchange`
      `init(params)` makes it, and all but `rounds` lies in shards.

    Raises:
      TypeError: an `update` that is a function of your own; at the call, a state of another kind.
      ValueError: `local_update(..., axis_name=...)`, no `axis_name`, fragments under
        `psjax.ist.exchange`; at the call, the state of another codec, or fragments of parameters
        or selections that do not fit.

    Example:
      Two workers, simulated on one device. Each takes one step towards its own batch.

      >>> import jax, jax.numpy as jnp, optax, psjax
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> local = psjax.local_update(loss_fn, optax.sgd(0.5))
      >>> update = psjax.codec.compress(local, psjax.codec.int8(block=2), "workers")
      >>> w, batches = jnp.zeros(2), jnp.array([1.0, 3.0]).reshape(2, 1, 1, 1)
      >>> state, where = update.init(w, num_workers=2), update.layout(0, None)
      >>> mine = psjax.replicas(w, 1)  # of each worker
      >>> axes = {"in_axes": (None, where, None, 0), "out_axes": (None, where, 0)}
      >>> jax.vmap(update, **axes, axis_name="workers")(w, state, mine, batches)[0]
      Array([1., 1.], dtype=float32)
    """
    found: Any = unwrapped("compress", update)
    if isinstance(found, LocalUpdate):
        if found.axis_name is not None or axis_name is None:
            msg = (
                f"compress(axis_name={axis_name!r}): the workers' axis is compress's; pass "
                "psjax.local_update(loss_fn, optimizer) without axis_name, and the name here."
            )
            raise ValueError(msg)
    elif not isinstance(found, Exchange):
        msg = (
            f"compress(update={found!r}): pass psjax.local_update(...) or psjax.ist.exchange(...); "
            "psjax.outer goes around compress."
        )
        raise TypeError(msg)
    elif fragments is not None or axis_name not in (None, found.axis_name):
        msg = (
            f"compress(axis_name={axis_name!r}, fragments={fragments!r}): around "
            f"psjax.ist.exchange, whose workers are on axis {found.axis_name!r}, pass neither."
        )
        raise ValueError(msg)
    own: Any = axis_name or found.axis_name
    return Compress(found, codec, own, fragments, seed)


def _check_codec(found: str, own: str):
    if found != own:
        msg = (
            f"compress: the state was made for {found}, but the codec is now {own}; its residual "
            "and rounding belong to the first. Go on with it, or begin with init(params)."
        )
        raise ValueError(msg)


def _check_fragments(plan: Fragments, params: Params, selection: Selection):
    found = jax.tree_util.tree_leaves_with_path(params)
    paths = tuple(jax.tree_util.keystr(path) for path, _ in found)
    if paths != plan.paths:
        odd = sorted(set(paths) ^ set(plan.paths))
        msg = (
            "compress(fragments=...): the parameters are not those of psjax.fragments(axes, F); "
            f"they differ in {', '.join(odd[:3])}."
        )
        raise ValueError(msg)
    whole = [path for path, x in found if not jnp.issubdtype(x.dtype, jnp.floating)]
    if selection.indices or selection.keep is not None or whole:
        msg = (
            "compress(fragments=...): a worker goes on from weights of its own, so each must hold "
            "all of them, and all must be floats; pass psjax.replicas(params, E), without "
            "Selection.drop."
        )
        raise ValueError(msg)


def _sent(wire: Wire, shares: Sequence[Array], residual: Any, held: Sequence[Array]):
    """The sums of shares, and the residual after them; an entry that nobody held keeps its own."""
    if residual is None:
        return wire.total(shares)[0], []
    late = [kept(h, e) for h, e in zip(held, residual)]
    sums, lost = wire.total([x + e.astype(x.dtype) for x, e in zip(shares, late)])
    pairs = zip(held, lost, residual)
    return sums, [kept(h, y.astype(e.dtype), e) for h, y, e in pairs]


def _share(w: Array, y: Array, mine: Array, everybody: Array):
    """A worker's part of the mean change of a leaf."""
    dtype = wide(w.dtype)
    number = jnp.maximum(everybody, 1).astype(dtype)
    return kept(mine > 0, (y.astype(dtype) - w.astype(dtype)) * mine.astype(dtype) / number)


def _mean(
    w: Array,
    y: Array,
    mine: Array,
    everybody: Array,
    some: Array,
    whole: bool,
    axis_name: str,
):
    """The mean of a leaf over those who hold it, as `Selection.scatter_mean` takes it."""
    if whole and not jnp.issubdtype(w.dtype, jnp.inexact):
        return first_good(y[None], w, some[None], axis_name)
    dtype = wide(w.dtype)
    total = jax.lax.psum(kept(mine > 0, y.astype(dtype) * mine.astype(dtype)), axis_name)
    number = jnp.maximum(everybody, 1).astype(dtype)
    exact = jnp.issubdtype(dtype, jnp.integer)
    return kept(everybody > 0, (total // number if exact else total / number).astype(w.dtype), w)
