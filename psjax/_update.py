"""A round of training as an object: what it returns, and which entries somebody held."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from psjax._leaf import selected
from psjax._selection import Selection
from psjax._types import AxisName, Batch, OptState, Params


class LocalMetrics(NamedTuple):
    """What a round reports.

    Attributes:
      loss: `[E, J]`, the loss of every local step; meaningless for elements that are not valid.
      finite: `bool[E]`; False for an element whose loss or weights became NaN or Inf. Its weights
        and state are left out of the mean: entries that no other element holds are unchanged.
      aux: with `has_aux`, the `aux` that `loss_fn` returned, leaves `[E, J, ...]`; else None.
    """

    loss: jax.Array
    finite: jax.Array
    aux: Any = None


class Held(NamedTuple):
    """Which entries of the parameters somebody held in a round.

    Attributes:
      entries: a tree of bools like the parameters; a leaf `bool[]` stands for all its entries.
      anybody: `bool[]`, whether any element took part. Leaves of `entries` that are this very
        array are as the whole round.
    """

    entries: Any
    anybody: jax.Array

    @property
    def uniform(self) -> bool:
        """Whether either all entries were held or none, known while tracing."""
        return all(x is self.anybody for x in jax.tree.leaves(self.entries))


class Update:
    """A round: `(params, opt_state, selection, batches) -> (params, opt_state, LocalMetrics)`.

    What `psjax.local_update`, `psjax.ist.exchange`, `psjax.codec.compress` and `psjax.outer` return
    is one, so that each can go around another.
    """

    mutable: tuple[str, ...] = ()

    def init(self, params: Any, num_workers: int | None = None) -> Any:
        """The state for the first round; with `num_workers`, what is each worker's own `[n, ...]`.

        Args:
          params: the parameters.
          num_workers: of the mapped axis.
        """
        state = self.init_one(params)
        if num_workers is None:
            return state
        parts, treedef = jax.tree.flatten(self.layout(True, False))
        repeat = lambda x: jnp.broadcast_to(x, (num_workers, *jnp.shape(x)))
        trees = [
            jax.tree.map(repeat, tree) if own else tree
            for own, tree in zip(parts, treedef.flatten_up_to(state), strict=True)
        ]
        return treedef.unflatten(trees)

    def init_one(self, params: Any) -> Any:
        """The state of one worker."""
        raise NotImplementedError

    def layout(self, own: Any, shared: Any) -> Any:
        """A prefix of the state: `own` for what is each worker's own, `shared` for the rest.

        `layout(P("workers"), P())` are specs for `jax.shard_map`, `layout(0, None)` are `in_axes`
        for `jax.vmap` and `jax.pmap`.
        """
        raise NotImplementedError

    def with_held(self, params: Any, opt_state: Any, selection: Any, batches: Any) -> Any:
        """A round, and which entries somebody held: `(params, opt_state, metrics, Held)`."""
        raise NotImplementedError

    def __call__(
        self, params: Any, opt_state: Any, selection: Any, batches: Any
    ) -> tuple[Any, Any, LocalMetrics]:
        return self.with_held(params, opt_state, selection, batches)[:3]

    def trained(self, params: Any) -> Any:
        """The parameters without the entries that are overwritten and not trained."""
        return split_mutable(params, self.mutable)[0]


class LocalUpdate(Update):
    """The function that `local_update` returns: `(params, opt_state, selection, batches) -> ...`.

    Attributes:
      optimizer: the optimizer that was given.
      mutable: the names that were given.
      axis_name: the mapped axis that was given.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        optimizer: Any,
        mutable: tuple[str, ...],
        axis_name: str | None = None,
    ):
        self._fn = fn
        self.optimizer = optimizer
        self.mutable = mutable
        self.axis_name = axis_name

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, LocalMetrics]:
        return self._fn(*args, **kwargs)

    def init_one(self, params: Any) -> Any:
        """The optimizer's state for the parameters that are trained."""
        return self.optimizer.init(self.trained(params))

    def layout(self, own: Any, shared: Any) -> Any:
        """The state is shared with `axis_name`, and the worker's own without."""
        return own if self.axis_name is None else shared

    def with_held(self, params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        """A round, and which entries a finite element held, over the devices of `axis_name`."""
        new, state, metrics = self._fn(params, opt_state, selection, batches)
        return new, state, metrics, held_by(selection, params, metrics.finite, self.axis_name)


def unwrapped(call: str, update: Any) -> Update:
    """The `Update` itself, where `jax.jit` of it was passed.

    Raises:
      TypeError: a function that is none, and so cannot say which entries were held.
    """
    found = getattr(update, "__wrapped__", update)
    if not isinstance(found, Update):
        msg = (
            f"{call}(update={update!r}): pass what psjax.local_update, psjax.ist.exchange, "
            "psjax.codec.compress or psjax.outer returns, or jax.jit of it; it says which entries "
            "were held."
        )
        raise TypeError(msg)
    return found


def check_state(call: str, kind: type, state: Any) -> None:
    """Raise unless a state is that of the update `call`, such as "outer(update, optimizer)"."""
    if not isinstance(state, kind):
        msg = (
            f"{call.partition('(')[0]}: the state is a {type(state).__name__}; pass {call}"
            ".init(params), and after a round the state that it returned."
        )
        raise TypeError(msg)


def holders(
    selection: Selection,
    params: Params,
    finite: Bool[Array, " E"],
    axis_name: AxisName | None = None,
):
    """How many valid and finite elements hold each entry.

    Returns:
      `(number, counts)`: of all elements, int32[]; and of every leaf, flat, int32 like the leaf, or
      `number` itself where every element holds all of it.
    """
    leaves = jax.tree.leaves(params)
    number = jnp.sum(jnp.asarray(selection.valid) & finite, dtype=jnp.int32)
    number = number if axis_name is None else jax.lax.psum(number, axis_name)
    masks = selection.keep or (None,) * len(leaves)
    own = [
        selected(spec, selection.indices) or mask is not None
        for spec, mask in zip(selection.specs, masks, strict=True)
    ]
    counts = selection.counts(params, finite, axis_name) if any(own) else params
    pairs = zip(own, jax.tree.leaves(counts), strict=True)
    return number, [count if mine else number for mine, count in pairs]


def held_by(
    selection: Selection,
    params: Params,
    finite: Bool[Array, " E"],
    axis_name: AxisName | None = None,
):
    """Which entries a valid and finite element holds."""
    number, counts = holders(selection, params, finite, axis_name)
    anybody = number > 0
    entries = [anybody if count is number else count > 0 for count in counts]
    return Held(jax.tree.structure(params).unflatten(entries), anybody)


def split_mutable(params: Params, mutable: tuple[str, ...]):
    """What is trained and what is overwritten."""
    if not mutable:
        return params, {}
    fixed = {name: params[name] for name in mutable}
    return {name: x for name, x in params.items() if name not in mutable}, fixed
