r"""An optimizer over rounds: what a round changed is a gradient.

S. Reddi et al., *Adaptive Federated Optimization*, arXiv:2003.00295; with Nesterov momentum and
replicas it is A. Douillard et al., *DiLoCo: Distributed Low-Communication Training of Language
Models*, arXiv:2311.08105.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from psjax._masks import kept
from psjax._selection import Selection
from psjax._state import where_held
from psjax._types import Batch, OptState, Params
from psjax._update import Update, check_state, unwrapped


class OuterState(NamedTuple):
    """The state of `psjax.outer`.

    Attributes:
      inner: the state of the update inside.
      outer: the outer optimizer's, of the parameters that are trained.
    """

    inner: Any
    outer: Any


class Outer(Update):
    """A round, as `outer` returns it.

    Attributes:
      update: the update that was given.
      optimizer: the outer optimizer that was given.
    """

    def __init__(self, update: Update, optimizer: Any):
        self.update = update
        self.optimizer = optimizer
        self.mutable = update.mutable

    def init_one(self, params: Any) -> OuterState:
        """Both states."""
        return OuterState(self.update.init_one(params), self.optimizer.init(self.trained(params)))

    def layout(self, own: Any, shared: Any) -> OuterState:
        """The outer state is shared."""
        return OuterState(self.update.layout(own, shared), shared)

    def with_held(self, params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        """A round, an update by what it changed, and which entries somebody held."""
        check_state("outer(update, optimizer)", OuterState, opt_state)
        params = jax.tree.map(jnp.asarray, params)
        new, inner, metrics, held = self.update.with_held(
            params, opt_state.inner, selection, batches
        )
        trained, entries = self.trained(params), jax.tree.leaves(self.trained(held.entries))
        leaves, treedef = jax.tree.flatten(trained)
        after = jax.tree.leaves(self.trained(new))
        moved = [kept(m, w - y) for m, w, y in zip(entries, leaves, after, strict=True)]
        try:
            updates, state = self.optimizer.update(
                treedef.unflatten(moved), opt_state.outer, trained
            )
        except (TypeError, ValueError) as error:
            _refuse_loss(error)
            raise
        stepped = jax.tree.leaves(optax.apply_updates(trained, updates))
        stepped = [kept(m, y, w) for m, y, w in zip(entries, stepped, leaves, strict=True)]
        if held.uniform:
            choose = lambda x, was: jnp.where(held.anybody, x, was)
            state = jax.tree.map(choose, state, opt_state.outer)
        else:
            old = jax.tree.map(jnp.asarray, opt_state.outer)
            masks = entries, held.anybody
            state = where_held("outer", self.optimizer, trained, old, state, *masks)
        out: Any = treedef.unflatten(stepped)
        if self.mutable:
            out = {**new, **out}
        return out, OuterState(inner, state), metrics, held


def outer(update: Callable[..., Any], optimizer: optax.GradientTransformation) -> Outer:
    r"""A round whose change goes through an optimizer of its own, which lives from round to round.

    A round turns $w$ into $w'$. The outer optimizer takes $w - w'$ as a gradient; `optax.sgd(1.0)`
    gives $w'$ itself, to a rounding. With replicas and `optax.sgd(0.7, momentum=0.9,
    nesterov=True)` it is DiLoCo (arXiv:2311.08105); with independent subnets, the same for subnets.

    An entry that nobody held in a round keeps its bits and its moments: one that was not selected
    or was dropped, or whose only holder became NaN or Inf. What the state has once for all entries,
    such as Adam's count, stays as it is only in a round in which no element took part.

    What is overwritten and not trained (`mutable` of `psjax.local_update`) goes past the outer
    optimizer.

    Args:
      update: what `psjax.local_update`, `psjax.ist.exchange` or `psjax.codec.compress` returns, or
        `jax.jit` of it.
      optimizer: an `optax.GradientTransformation` that needs no loss, for there is none of the
        whole parameters.

    Returns:
      A round `(params, state, selection, batches) -> (params, state, LocalMetrics)` like `update`,
      whose state is an `OuterState`; `outer(update, optimizer).init(params)` makes the first one.
      Under `psjax.ist.exchange` lay its `outer` out as the inner optimizer's state, by
      `psjax.ist.state_axes` and `psjax.ist.store_specs`.

    Raises:
      TypeError: an `update` that is a function of your own; at the call, a state of another kind.
      ValueError: an optimizer that needs a loss, such as `optax.contrib.reduce_on_plateau`,
        `optax.polyak_sgd` or `optax.lbfgs`; at the call, one whose state is reduced over entries
        of which only a part is held, such as `optax.adafactor` over subnets.

    Example:
      One replica, one local step of SGD; the outer step is half of what it changed.

      >>> import jax.numpy as jnp, optax, psjax
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> w, inner = jnp.zeros(2), optax.sgd(0.5)
      >>> update = psjax.outer(psjax.local_update(loss_fn, inner), optax.sgd(0.5))
      >>> batches = jnp.ones((1, 1, 2))  # [elements, local steps, ...]
      >>> update(w, update.init(w), psjax.replicas(w, 1), batches)[0]
      Array([0.25, 0.25], dtype=float32)
    """
    found = unwrapped("outer", update)
    like = {"w": jax.ShapeDtypeStruct((2, 2), jnp.result_type(float))}
    try:
        jax.eval_shape(lambda w: optimizer.update(w, optimizer.init(w), w), like)
    except Exception as error:  # another one may be for this tree alone: it is tried at the call
        _refuse_loss(error)
    return Outer(found, optimizer)


def _refuse_loss(error: Exception):
    """Raise if an optimizer failed for want of a loss."""
    wanted = re.search(r"'(value|grad|value_fn)'|\b(obj_fn) must", str(error))
    if wanted is None:
        return
    name = re.match(r"(\w+)(?=\.<locals>|\(\))", str(error))
    msg = (
        f"outer(optimizer=...): {name[1] if name else 'this optimizer'} needs "
        f"{wanted[1] or wanted[2]}=, which comes from a loss; a round has no loss of the whole "
        "parameters. Pass an optimizer of gradients alone, such as optax.sgd or optax.adam; "
        "inside, psjax.local_update takes this one."
    )
    raise ValueError(msg) from error
