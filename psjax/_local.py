r"""Local training: gather, J optimizer steps on one's own batches, scatter the mean.

Disjoint index sets make it independent subnet training: Algorithms 1 and 2 of B. Yuan,
A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent Subnet
Training*, arXiv:1910.02120. Replicas make it local SGD.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from psjax._leaf import _gather_leaf
from psjax._masks import _kept
from psjax._selection import _with_specs
from psjax._separable import _check_chunk_size, _Elements


class LocalMetrics(NamedTuple):
    """What a round reports.

    Attributes:
      loss: `[E, J]`, loss of every local step; that of an element which is not valid means nothing.
      finite: `bool[E]`; False for an element whose loss or weights became NaN or Inf. Its weights
        and state were left out: the entries it held are as before the round.
    """

    loss: jax.Array
    finite: jax.Array


def local_update(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    in_axes: Any = 0,
    axis_name: str | None = None,
    *,
    mutable: Sequence[str] = (),
    chunk_size: int | None = None,
) -> Callable[..., tuple[Any, Any, LocalMetrics]]:
    r"""One round: every element trains what it sees for J steps; the weights go home.

    Element e starts from $y_e = U_e w$ and the same entries of the optimizer's state, takes J steps
    on its own batches, and $w + U^+(y - U w)$ is the new $w$: an entry held by one element is set,
    one held by several (shared leaves too) is averaged, one that nobody holds keeps its bits. A
    weight that `Selection.drop` dropped is 0 at every local step, and nobody holds it.
    Algorithm 2 of arXiv:1910.02120, with any optax optimizer in the place of SGD.

    Optimizer state travels with the weights: its trees shaped like the parameters (moments, traces)
    entry by entry, everything else whole to every element; of that, floating leaves are averaged
    and integers (Adam's count, a schedule's) come from the first finite element. With one count for
    all, Adam's moments of an entry that was seldom held are corrected for as many steps as the
    others took; see `psjax.ist.scale_by_adam` for a count per entry.

    Args:
      loss_fn: `loss_fn(element_params, batch) -> scalar`, a mean over the element's batch as in
        any training step. Leaves of `element_params` are the selected rows; a module's dropout keys
        are leaves of the batch. No layer may reduce over a divided axis (`psjax.ist.check_subnets`
        finds one that does).
      optimizer: an `optax.GradientTransformation`. It sees one element: `optax.clip_by_global_norm`
        clips the subnet's norm.
      in_axes: which batches an element sees: 0, row e of leaves `[E, J, ...]`; None, all see the
        same `[J, ...]`; or a `PartitionSpec` of axis names of the selection, as in
        `psjax.value_and_grad`. What the element sees has its J batches first.
      axis_name: name of a mapped axis (`pmap`, `shard_map`) over which the elements are spread.
        Parameters and state are then averaged over the devices, and are the same on all.
      mutable: names of top-level entries of the parameters that are not trained but overwritten
        (Flax's mutable collections, `("batch_stats",)` with `params` the whole variables).
        `loss_fn` then returns `(loss, {name: new value})`, and the optimizer's state is that of the
        other entries, `optimizer.init({"params": variables["params"]})`.
      chunk_size: elements trained at once; None: 1 on the CPU, all elsewhere.

    Returns:
      A function `(params, opt_state, selection, batches) -> (params, opt_state, LocalMetrics)`. A
      slot of padding in an uneven share stays zero at every local step.

    Raises:
      ValueError: at the call: batches whose leading shape is not `[E, J]`, J = 0, an optimizer
        state that cannot travel (named), parameters that are not those of the selection.

    Example:
      One element that sees everything, one batch of size 1: a step of SGD.

      >>> import jax.numpy as jnp, optax, psjax
      >>> loss_fn = lambda w, x: 0.5 * jnp.sum((w - x) ** 2)
      >>> w, optimizer = jnp.zeros(2), optax.sgd(0.5)
      >>> update = psjax.local_update(loss_fn, optimizer)
      >>> batches = jnp.ones((1, 1, 2))  # [elements, local steps, ...]
      >>> update(w, optimizer.init(w), psjax.replicas(w, 1), batches)[0]
      Array([0.5, 0.5], dtype=float32)
    """
    _check_chunk_size("local_update", chunk_size)
    mutable = tuple(mutable)
    optimizer = optax.with_extra_args_support(optimizer)

    def update(params, opt_state, selection, batches):
        _check_mutable(mutable, params)
        elements = _Elements("local_update", loss_fn, in_axes, chunk_size, selection)
        operands, specs, treedef = elements._operands(params, (batches,))
        num_params = len(selection.specs)
        _check_steps(elements, operands[num_params:], specs[num_params:])
        state, state_def = jax.tree.flatten(jax.tree.map(jnp.asarray, opt_state))
        owners = _state_owners(params, opt_state)
        state_specs = [P() if i is None else selection.specs[i] for i in owners]
        keep = selection.keep or (None,) * num_params
        keep = [*keep, *(None if i is None else keep[i] for i in owners)]
        filled = {  # which slots of an element are rows and not padding
            name: jnp.ones(selection.sizes[name], bool)
            for name, index in selection.indices.items()
            if index.ndim == 2 and not _all_filled(selection, name)
        }
        old = [*operands[:num_params], *state]
        start = [_kept(k, x) for k, x in zip(keep, old, strict=True)]
        kept = {  # the masks of the weights, which their elements see as they see the weights
            i: _kept(keep[i], jnp.ones(operands[i].shape, bool))
            for i in range(num_params)
            if keep[i] is not None
        }
        operands = [*start[:num_params], *operands[num_params:], *start[num_params:]]
        operands = [*operands, *filled.values(), *kept.values()]
        own_specs = (selection.specs[i] for i in kept)
        specs = [*specs, *state_specs, *(P(name) for name in filled), *own_specs]

        def train(*seen):
            seen = iter(seen)
            take = lambda n: list(itertools.islice(seen, n))
            params, batches = treedef.unflatten(take(treedef.num_leaves))
            opt_state = state_def.unflatten(take(state_def.num_leaves))
            masks = dict(zip(filled, take(len(filled)), strict=True))
            own = dict(zip(kept, take(len(kept)), strict=True))
            clean = lambda tree: _zero_dropped(
                _zero_padding(tree, params, selection.specs, masks), params, own
            )
            step = _step(loss_fn, optimizer, mutable, clean)
            (params, opt_state), loss = jax.lax.scan(step, (params, opt_state), batches)
            finite = jnp.all(jnp.isfinite(loss)) & _all_finite((params, opt_state))
            return (params, opt_state), loss, finite

        varying = elements._varying(operands, operands)

        def body(_, xs):
            indices, valid = xs
            return None, elements._map(train, varying, specs, indices, valid)

        stacked, loss, finite = elements._rows(elements._loop(body, None)[1])
        new = jax.tree.leaves(stacked)
        specs = [*selection.specs, *state_specs]
        home = [_goes_home(x, spec) for x, spec in zip(old, specs)]
        those = lambda leaves: [x for x, yes in zip(leaves, home) if yes]
        seen = _with_specs(selection, those(old), those(specs), those(keep))
        mean = iter(seen.scatter_mean(those(new), those(old), where=finite, axis_name=axis_name))
        good = finite & selection.valid
        leaves = [
            next(mean) if yes else _kept(_anywhere(k, axis_name), _first(y, x, good, axis_name), x)
            for yes, k, x, y in zip(home, keep, old, new)
        ]
        params = jax.tree.structure(params).unflatten(leaves[:num_params])
        return params, state_def.unflatten(leaves[num_params:]), LocalMetrics(loss, finite)

    return update


def _step(loss_fn, optimizer, mutable, clean):
    """One local step of one element, as a body of `lax.scan`."""

    def step(carry, batch):
        params, opt_state = carry
        if not mutable:
            loss, grads = jax.value_and_grad(loss_fn)(params, batch)
            updates, opt_state = optimizer.update(clean(grads), opt_state, params)
            return (optax.apply_updates(params, clean(updates)), opt_state), loss
        fixed: dict[str, Any] = {name: params[name] for name in mutable}
        trained = {name: x for name, x in params.items() if name not in mutable}
        fn = lambda trained: loss_fn({**trained, **fixed}, batch)
        (loss, new), grads = jax.value_and_grad(fn, has_aux=True)(trained)
        updates, opt_state = optimizer.update(clean(grads), opt_state, trained)
        trained: Any = optax.apply_updates(trained, clean(updates))
        moved = clean({name: new[name] for name in mutable})
        return ({**trained, **moved}, opt_state), loss

    return step


def _zero_padding(tree, params, specs, masks):
    """Zero in the padded slots of a tree like `params`, or like some of its top-level entries."""
    if not masks:
        return tree
    spec_of = {
        path: spec
        for (path, _), spec in zip(jax.tree_util.tree_leaves_with_path(params), specs, strict=True)
    }

    def leaf(path, x):
        for d, name in enumerate(spec_of[path] or ()):
            if name in masks:
                mask = masks[name].reshape(*[-1 if k == d else 1 for k in range(x.ndim)])
                x = jnp.where(mask, x, jnp.zeros_like(x))  # a product would keep NaN
        return x

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _zero_dropped(tree, params, masks):
    """Zero in the dropped weights of a tree like `params`, or like some of its top-level entries.

    `masks` are those of the leaves by number, of the shapes of what the element sees.
    """
    if not masks:
        return tree
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    mask_of = {paths[i]: mask for i, mask in masks.items()}
    return jax.tree_util.tree_map_with_path(lambda path, x: _kept(mask_of.get(path), x), tree)


def _state_specs(params, specs, opt_state):
    """How each leaf of the optimizer's state travels: as the parameter it belongs to, or whole."""
    return [P() if i is None else specs[i] for i in _state_owners(params, opt_state)]


def _state_owners(params, opt_state):
    """Number of the parameter that each leaf of the optimizer's state belongs to, or None.

    A leaf belongs to the parameter whose path its own path ends with, and whose shape it has.
    """
    owners = {
        path: (i, jnp.shape(x))
        for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(params))
    }
    found_owners = []
    for path, x in jax.tree_util.tree_leaves_with_path(opt_state):
        x = x if hasattr(x, "dtype") else jnp.asarray(x)
        tails = [path[i:] for i in range(len(path) + 1)]
        found = [owners[tail][0] for tail in tails if owners.get(tail, (0, None))[1] == x.shape]
        if not found and x.ndim:
            msg = (
                f"local_update(optimizer=...): the optimizer's state {keystr(path)} has shape "
                f"{x.shape} and no parameter it belongs to has it; only trees shaped like the "
                "parameters and scalars can travel with the weights. Write an optimizer "
                "whose state is per entry, such as optax.sgd or optax.adam."
            )
            raise ValueError(msg)
        found_owners.append(found[0] if found else None)
    return found_owners


def _all_finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _all_filled(selection, name):
    """Whether a partition of an axis is even, known without its values."""
    return name in selection.disjoint and selection.indices[name].size == selection.sizes[name]


def _goes_home(x, spec):
    """Whether a leaf is scattered; whole integers, such as counts, are copied from one element."""
    return jnp.issubdtype(x.dtype, jnp.inexact) or any(name is not None for name in spec or ())


def _first(y, old, good, axis_name):
    """Of `[E, ...]` the row of the first good element, over all devices; `old` if none is."""
    found, value = jnp.any(good), y[jnp.argmax(good)]
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        first = jax.lax.pmin(jnp.where(found, device, jnp.iinfo(jnp.int32).max), axis_name)
        own = found & (device == first)
        as_int = value.astype(jnp.int32) if value.dtype == bool else value
        value = jax.lax.psum(jnp.where(own, as_int, jnp.zeros_like(as_int)), axis_name)
        value, found = value.astype(y.dtype), jax.lax.pmax(found.astype(jnp.int32), axis_name) > 0
    return jnp.where(found, value, old)


def _anywhere(keep, axis_name):
    """What some device keeps."""
    if keep is None or axis_name is None:
        return keep
    return jax.lax.pmax(jnp.asarray(keep).astype(jnp.int32), axis_name) > 0


def _check_steps(elements, batches, specs):
    """Every leaf of the batches that an element sees begins with the same J, 1 or more."""
    indices = {name: jnp.zeros(x.shape[1:], jnp.int32) for name, x in elements._indices().items()}
    see = lambda *xs: [_gather_leaf(x, spec, indices, 0) for x, spec in zip(xs, specs)]
    shapes = [x.shape for x in jax.eval_shape(see, *batches)]
    lengths = {shape[0] if shape else None for shape in shapes}
    if not shapes:
        msg = f"local_update: batches has no array; give [{elements.num_elements}, J, ...]."
        raise ValueError(msg)
    if len(lengths) != 1 or None in lengths:
        msg = (
            f"local_update: leaves of batches have shapes {[x.shape for x in batches]}; an "
            f"element sees {shapes} (in_axes={elements.in_axes!r}); all must begin with J, the "
            f"number of local steps: [{elements.num_elements}, J, ...] with in_axes=0."
        )
        raise ValueError(msg)
    if lengths == {0}:
        msg = "local_update: batches has J = 0 local steps; give one or more."
        raise ValueError(msg)


def _check_mutable(mutable, params):
    missing = [name for name in mutable if not isinstance(params, dict) or name not in params]
    if missing:
        have = sorted(params) if isinstance(params, dict) else type(params).__name__
        msg = (
            f"local_update(mutable={mutable}): the parameters have no {missing}; they are {have}. "
            "Give the whole variables, such as {'params': ..., 'batch_stats': ...}."
        )
        raise ValueError(msg)
