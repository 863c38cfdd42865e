r"""Local training: gather, J optimizer steps on one's own batches, scatter the mean.

Disjoint index sets make it independent subnet training: Algorithms 1 and 2 of B. Yuan,
A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent Subnet
Training*, arXiv:1910.02120. Replicas make it local SGD.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from psjax._elements import check_chunk_size, over_chunks, vary, view
from psjax._masks import kept
from psjax._state import state_owners


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
    check_chunk_size("local_update", chunk_size)
    mutable = tuple(mutable)
    optimizer = optax.with_extra_args_support(optimizer)

    def update(params, opt_state, selection, batches):
        _check_mutable(mutable, params)
        seen = view("local_update", selection, in_axes, params, (batches,))
        _check_steps(seen, len(selection.specs), in_axes, batches)
        opt_state = jax.tree.map(jnp.asarray, opt_state)
        held = selection.of(*_with_state(selection, params, opt_state))  # what goes home
        filled = _filled(selection)
        masks = _masks_seen(selection, params)
        trees = (params, batches, opt_state, filled, masks)
        state_specs = held.specs[len(selection.specs) :]
        mask_specs = [spec for spec, k in zip(selection.specs, _keep(selection)) if k is not None]
        specs = [*seen.specs, *state_specs, *(P(name) for name in filled), *mask_specs]
        start = jax.tree.map(jnp.asarray, held.masked((params, opt_state)))
        leaves, treedef = jax.tree.flatten((start[0], batches, start[1], filled, masks))
        leaves = vary([jnp.asarray(x) for x in leaves], (selection, leaves))

        def train(*leaves):
            params, batches, opt_state, filled, masks = treedef.unflatten(leaves)
            clean = _cleaner(params, selection.specs, filled, masks)
            step = _step(loss_fn, optimizer, mutable, clean)
            (params, opt_state), loss = jax.lax.scan(step, (params, opt_state), batches)
            finite = jnp.all(jnp.isfinite(loss)) & all_finite((params, opt_state))
            return (params, opt_state), loss, finite

        body = lambda _, part: (None, part.map(train, leaves))
        _, (new, loss, finite) = over_chunks(seen.of(specs, trees), chunk_size, body, None)
        params, opt_state = _home(held, (params, opt_state), new, finite, axis_name)
        return params, opt_state, LocalMetrics(loss, finite)

    return update


def _with_state(selection, params, opt_state):
    """Specs, tree and masks of `(params, opt_state)`: a moment has those of its parameter."""
    owners = state_owners(params, opt_state)
    specs = [*selection.specs, *(P() if i is None else selection.specs[i] for i in owners)]
    keep = _keep(selection)
    keep = [*keep, *(None if i is None else keep[i] for i in owners)]
    return specs, (params, opt_state), keep


def _keep(selection):
    return selection.keep or (None,) * len(selection.specs)


def _filled(selection):
    """Of every divided axis, which slots of an element are rows and not padding: seen as `True`."""
    return {
        name: jnp.ones(selection.sizes[name], bool)
        for name, index in sorted(selection.indices.items())
        if index.ndim == 2 and not _all_filled(selection, name)
    }


def _masks_seen(selection, params):
    """The masks of the weights by leaf, None where nothing is dropped: seen as the weights are."""
    leaves = zip(_keep(selection), jax.tree.leaves(params), strict=True)
    return [None if k is None else kept(k, jnp.ones(jnp.shape(x), bool)) for k, x in leaves]


def _cleaner(params, specs, filled, masks):
    """Zero in the padded slots and the dropped weights of a tree like `params`, or a part of it."""
    own = {}
    found = jax.tree_util.tree_leaves_with_path(params)
    for (path, x), spec, mask in zip(found, specs, masks, strict=True):
        for d, name in enumerate(spec or ()):
            if name in filled:
                along = filled[name].reshape(*[-1 if k == d else 1 for k in range(x.ndim)])
                mask = along if mask is None else mask & along
        own[path] = mask  # a product would keep NaN
    if all(mask is None for mask in own.values()):
        return lambda tree: tree
    return lambda tree: jax.tree_util.tree_map_with_path(lambda p, x: kept(own[p], x), tree)


def _home(held, old, new, finite, axis_name):
    """The mean of what the elements hold; of whole integers, the first finite element's."""
    before, treedef = jax.tree.flatten(old)
    before = [jnp.asarray(x) for x in before]
    after = jax.tree.leaves(new)
    mean = [i for i, (x, spec) in enumerate(zip(before, held.specs)) if goes_home(x, spec)]
    pick = lambda leaves: [leaves[i] for i in mean]
    means = held.only(mean).scatter_mean(pick(after), pick(before), finite, axis_name)
    found = dict(zip(mean, means, strict=True))
    for i, x in enumerate(before):
        if i not in found:
            first = first_good(after[i], x, finite & held.valid, axis_name)
            found[i] = kept(_anywhere(_keep(held)[i], axis_name), first, x)
    return treedef.unflatten([found[i] for i in range(len(before))])


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


def all_finite(tree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _all_filled(selection, name):
    """Whether a partition of an axis is even, known without its values."""
    return name in selection.disjoint and selection.indices[name].size == selection.sizes[name]


def goes_home(x, spec):
    """Whether a leaf is scattered; whole integers, such as counts, are copied from one element."""
    return jnp.issubdtype(x.dtype, jnp.inexact) or any(name is not None for name in spec or ())


def first_good(y, old, good, axis_name):
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


def _check_steps(seen, first, in_axes, batches):
    """Every leaf of the batches that an element sees begins with the same J, 1 or more."""
    leaves, E = jax.tree.leaves(batches), seen.num_elements
    one = seen.only(range(first, len(seen.specs)))[0]
    shapes = jax.eval_shape(lambda xs: one.map(lambda *xs: list(xs), xs), leaves)
    shapes = [x.shape for x in shapes]
    lengths = {shape[0] if shape else None for shape in shapes}
    if not shapes:
        msg = f"local_update: batches has no array; give [{E}, J, ...]."
        raise ValueError(msg)
    if len(lengths) != 1 or None in lengths:
        msg = (
            f"local_update: leaves of batches have shapes {[jnp.shape(x) for x in leaves]}; an "
            f"element sees {shapes} (in_axes={in_axes!r}); all must begin with J, the number of "
            f"local steps: [{E}, J, ...] with in_axes=0."
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
