r"""Local training: gather, J optimizer steps per element, scatter the mean.

With disjoint index sets this is independent subnet training: Algorithms 1 and 2 of B. Yuan,
A. Kyrillidis, C. Jermaine, *Distributed Learning of Neural Networks using Independent Subnet
Training*, arXiv:1910.02120. With replicas it is local SGD.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, PyTree, Shaped

from psjax._elements import check_chunk_size, over_chunks, view
from psjax._masks import kept
from psjax._notation import mask_along
from psjax._placement import placed, vary, whole
from psjax._selection import Selection, selected
from psjax._state import Route, check_element_state, extra_arguments, state_routes
from psjax._traps import (
    check_axis_name,
    check_low_precision,
    check_mutable,
    check_padding,
    check_steps,
)
from psjax._types import AxisName, Batch, Mask, OptState, Params
from psjax._update import LocalMetrics, LocalUpdate, split_mutable


def local_update(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    in_axes: Any = 0,
    axis_name: str | None = None,
    *,
    mutable: Sequence[str] = (),
    has_aux: bool = False,
    chunk_size: int | None = None,
) -> LocalUpdate:
    r"""One round: every element trains what it sees for J steps, and the weights are put back.

    Element e starts from $y_e = U_e w$ and the same entries of the optimizer's state, and takes J
    steps on its own batches. The new $w$ is $w + U^+(y - U w)$: an entry that one element has is
    set, one that several have (shared leaves, too) is averaged, and any other keeps its bits. A
    weight that `Selection.drop` dropped is 0 at every local step and unchanged afterwards. This is
    Algorithm 2 of arXiv:1910.02120 with any optax optimizer in place of SGD.

    Optimizer state is gathered and put back with the weights. psjax traces the optimizer's own
    `init` for other sizes to learn which dimensions of the state are dimensions of a parameter:

    - Moments and traces are gathered entry by entry; they may have extra leading dimensions.
    - A state that is reduced over some dimensions of a parameter (the rows and columns of
      `optax.adafactor`) is gathered along the remaining ones. It is refused if a divided dimension
      was reduced over; so are arrays of inner products of gradients (`optax.lbfgs`).
    - Everything else is copied whole to every element. Integers (Adam's count), keys and whatever
      no gradient reaches (a learning rate, the coefficients of muon) come back from the first
      finite element; floats that depend on gradients or losses (the scale of `reduce_on_plateau`)
      are averaged.

    Adam has one step count for all entries, so its bias correction is wrong for an entry that few
    rounds selected; `psjax.ist.scale_by_adam` has a count per entry.

    Args:
      loss_fn: `loss_fn(element_params, batch) -> scalar`, a mean over the element's batch as in
        any training step. Leaves of `element_params` are the selected rows. Pass a module's dropout
        keys as leaves of the batch. No layer may reduce over a divided axis
        (`psjax.ist.check_subnets` finds one that does).
      optimizer: an `optax.GradientTransformation`. It sees one element: `optax.clip_by_global_norm`
        clips the subnet's norm. It gets `value=`, `grad=` and `value_fn=` (`obj_fn=` in
        `optax.contrib.sophia`) of the element's loss on the step's batch.
      in_axes: how the batches are mapped. 0: element e gets row e of leaves `[E, J, ...]`. None:
        all get the same `[J, ...]`. A `PartitionSpec`: indexed by the selection, as in
        `psjax.value_and_grad`. What an element gets begins with J, one batch per step.
      axis_name: name of a mapped axis (`pmap`, `shard_map`) over which the elements are spread.
        Parameters and state are then averaged over the devices, and are equal on all. Without it,
        every device keeps its own result: `jax.shard_map` then raises if the parameters are
        replicated and the batches are not; in `jax.pmap`, and with `check_vma=False`, nothing is
        raised.
      mutable: names of top-level entries of the parameters that are not trained but overwritten
        (Flax's mutable collections, `("batch_stats",)` with `params` the whole variables).
        `loss_fn` then returns `(loss, {name: new value})`, and the optimizer's state is that of the
        other entries, `optimizer.init({"params": variables["params"]})`.
      has_aux: whether `loss_fn` returns `(loss, aux)`; with `mutable`, it returns
        `(loss, ({name: new value}, aux))`. They are stacked in `LocalMetrics.aux`, `[E, J, ...]`.
      chunk_size: number of elements trained at once; None: 1 on the CPU, all elsewhere.

    Returns:
      A function `(params, opt_state, selection, batches) -> (params, opt_state, LocalMetrics)`.
      Means are computed in float32 or wider and cast to the leaf's dtype. Padded rows of an uneven
      share stay zero at every local step.

    Raises:
      ValueError: at the call: the batches do not begin with `[E, J]`, J is 0, a state of the
        optimizer cannot be divided (the message names it), the parameters are not those of the
        selection, or the optimizer's epsilon is 0 in float16. With uneven shares, also: the
        optimizer counts the entries of a leaf (`optax.centralize`, `optax.clip_by_block_rms`). That
        is read off the constants of its traced update, and goes unnoticed where index sets are
        traced and not known to be disjoint.

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

    def update(params: Params, opt_state: OptState, selection: Selection, batches: Batch):
        check_mutable(mutable, params)
        given = params, opt_state
        params, opt_state, batches = whole((params, opt_state, batches))
        seen = view("local_update", selection, in_axes, params, (batches,))
        check_axis_name("local_update", axis_name, params, (selection, batches))
        check_steps(seen, len(selection.specs), in_axes, batches)
        opt_state = jax.tree.map(jnp.asarray, opt_state)
        routes = routes_home("local_update", optimizer, selection, params, opt_state, mutable)
        held = _of_routes(selection, (params, opt_state), routes)
        filled = _filled(selection)
        _check_optimizer(optimizer, held, params, opt_state, mutable, _padded(selection))
        masks = _masks_seen(selection, params)
        trees = (params, batches, opt_state, filled, masks)
        state_specs = held.specs[len(selection.specs) :]
        mask_specs = [spec for spec, k in zip(selection.specs, _keep(selection)) if k is not None]
        specs = [*seen.specs, *state_specs, *(P(name) for name in filled), *mask_specs]
        start = jax.tree.map(jnp.asarray, held.masked((params, opt_state)))
        leaves, treedef = jax.tree.flatten((start[0], batches, start[1], filled, masks))
        leaves = vary([jnp.asarray(x) for x in leaves], (selection, leaves))

        def train(*leaves: Array):
            params, batches, opt_state, filled, masks = treedef.unflatten(leaves)
            clean = _cleaner(params, selection, filled, masks)
            step = _step(loss_fn, optimizer, mutable, has_aux, clean)
            (params, opt_state), (loss, aux) = jax.lax.scan(step, (params, opt_state), batches)
            finite = jnp.all(jnp.isfinite(loss)) & all_finite((params, opt_state))
            return (params, opt_state), LocalMetrics(loss, finite, aux)

        body = lambda _, part: (None, part.map(train, leaves))
        _, (new, metrics) = over_chunks(seen.of(specs, trees), chunk_size, body, None)
        new = _home(held, routes, (params, opt_state), new, metrics.finite, axis_name)
        params, opt_state = placed(new, given)
        return params, opt_state, metrics

    return LocalUpdate(update, optimizer, mutable, axis_name)


def routes_home(
    call: str,
    optimizer: Any,
    selection: Any,
    params: Any,
    opt_state: Any,
    mutable: tuple[str, ...] = (),
    like: Any = None,
) -> list[Route]:
    """How every leaf of `(params, opt_state)` is put back; the state is of what is trained."""
    keep = _keep(selection)
    leaves, treedef = jax.tree.flatten(params)
    numbers = split_mutable(treedef.unflatten(range(len(leaves))), mutable)[0]
    own = lambda spec: selected(spec, selection.indices)
    routes = [
        Route(spec, k, not (jnp.issubdtype(jnp.result_type(x), jnp.inexact) or own(spec)))
        for spec, k, x in zip(selection.specs, keep, leaves, strict=True)
    ]
    trained = jax.tree.leaves(numbers)
    return routes + state_routes(
        call,
        optimizer,
        split_mutable(params, mutable)[0],
        opt_state,
        [selection.specs[i] for i in trained],
        [keep[i] for i in trained],
        divided=lambda name: own(P(name)),
        like=None if like is None else split_mutable(like, mutable)[0],
    )


def _of_routes(selection: Selection, tree: PyTree, routes: Sequence[Route]):
    """The same elements, and what they see of `(params, opt_state)`."""
    specs, keep, _ = zip(*routes)
    return selection.of(specs, tree, keep)


def _check_optimizer(
    optimizer: optax.GradientTransformation,
    held: Selection,
    params: Params,
    opt_state: OptState,
    mutable: tuple[str, ...],
    padded: Sequence[str],
):
    """Check, on the host, what the optimizer does on the shapes that an element sees."""
    check_low_precision("local_update", optimizer, split_mutable(params, mutable)[0])
    if not any(selected(spec, held.indices) for spec in held.specs):
        return
    leaves, treedef = jax.tree.flatten((params, opt_state))

    def element(selection: Selection):
        see = lambda xs: selection.map(lambda *ys: list(ys), xs)
        params, opt_state = treedef.unflatten(jax.eval_shape(see, leaves))
        return split_mutable(params, mutable)[0], opt_state

    one = dataclasses.replace(held, keep=None)[0]
    own = element(one)
    check_element_state("local_update", optimizer, *own)
    if padded:
        resize = lambda x: x[:-1] if len(x) > 2 else jnp.concatenate([x, x[:1]])
        indices = {k: resize(x) if k in padded else x for k, x in one.indices.items()}
        other = element(dataclasses.replace(one, indices=indices))
        check_padding("local_update", optimizer, own[0], other[0])


def _keep(selection: Selection):
    return selection.keep or (None,) * len(selection.specs)


def _filled(selection: Selection):
    """Per divided axis with padding, an array of True: an element sees True at its real rows."""
    return {
        name: jnp.ones(selection.sizes[name], bool)
        for name, index in sorted(selection.indices.items())
        if index.ndim == 2 and not _all_filled(selection, name)
    }


def _padded(selection: Selection):
    """The axes that have padding, as far as known: the values of traced indices are not."""
    found = []
    for name, index in selection.indices.items():
        host, size = isinstance(index, np.ndarray), selection.sizes[name]
        more = name in selection.disjoint and index.size > size
        if index.ndim == 2 and (more or (host and bool((index >= size).any()))):
            found.append(name)
    return found


def _masks_seen(selection: Selection, params: Params):
    """One mask per leaf, gathered like the weights; None where nothing is dropped."""
    leaves = zip(_keep(selection), jax.tree.leaves(params), strict=True)
    return [None if k is None else kept(k, jnp.ones(jnp.shape(x), bool)) for k, x in leaves]


def _cleaner(
    params: Params,
    selection: Selection,
    filled: Mapping[str, Bool[Array, "..."]],
    masks: Sequence[Mask],
):
    """A function that zeroes padded rows and dropped weights in `params`, or in a part of it."""
    own = {}
    found = jax.tree_util.tree_leaves_with_path(params)
    lengths = {**selection.sizes, **_lengths(selection)}
    for (path, x), spec, mask in zip(found, selection.specs, masks, strict=True):
        kept_dims = [entry for entry in spec or () if not _dropped(entry, selection)]
        for d, entry in enumerate(kept_dims):
            along = mask_along(entry, filled, lengths)
            if along is not None:
                along = along.reshape([-1 if k == d else 1 for k in range(x.ndim)])
                mask = along if mask is None else mask & along
        own[path] = mask  # a product would keep NaN
    if all(mask is None for mask in own.values()):
        return lambda tree: tree
    return lambda tree: jax.tree_util.tree_map_with_path(lambda p, x: kept(own[p], x), tree)


def _lengths(selection: Selection):
    """How many rows an element sees of every axis that is indexed."""
    return {
        name: index.shape[-1] if index.ndim > selection.valid.ndim else 1
        for name, index in selection.indices.items()
    }


def _dropped(entry: str | None, selection: Selection):
    """Whether an index of one row removes the dimension."""
    index = None if entry is None else selection.indices.get(entry)
    return index is not None and index.ndim == selection.valid.ndim


def _home(
    held: Selection,
    routes: Sequence[Route],
    old: PyTree,
    new: PyTree,
    finite: Bool[Array, " E"],
    axis_name: AxisName | None,
):
    """The mean over the holders; where a leaf is copied, the value of the first finite element."""
    before, treedef = jax.tree.flatten(old)
    before = [jnp.asarray(x) for x in before]
    after = jax.tree.leaves(new)
    mean = [i for i, route in enumerate(routes) if not route.copied]
    pick = lambda leaves: [leaves[i] for i in mean]
    means = held.only(mean).scatter_mean(pick(after), pick(before), finite, axis_name)
    found = dict(zip(mean, means, strict=True))
    for i, x in enumerate(before):
        if i not in found:
            first = first_good(after[i], x, finite & held.valid, axis_name)
            found[i] = kept(_anywhere(routes[i].keep, axis_name), first, x)
    return treedef.unflatten([found[i] for i in range(len(before))])


def _step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    mutable: tuple[str, ...],
    has_aux: bool,
    clean: Callable[[PyTree], PyTree],
):
    """One local step of one element, as a body of `lax.scan`."""

    def step(carry: tuple[Params, OptState], batch: Batch):
        params, opt_state = carry
        trained, fixed = split_mutable(params, mutable)

        def fn(trained: Params):
            out: Any = loss_fn({**trained, **fixed} if mutable else trained, batch)
            if mutable and has_aux:
                loss, (moved, aux) = out
            elif mutable:
                (loss, moved), aux = out, None
            else:
                (loss, aux), moved = out if has_aux else (out, None), {}
            return loss, (moved, aux)

        value_fn = lambda trained: fn(clean(trained))[0]
        (loss, (moved, aux)), grads = jax.value_and_grad(fn, has_aux=True)(trained)
        grads = clean(grads)
        options = extra_arguments(loss, grads, value_fn)
        updates, new_state = optimizer.update(grads, opt_state, trained, **options)
        trained: Any = optax.apply_updates(trained, clean(updates))
        if mutable:
            trained = {**trained, **clean({name: moved[name] for name in mutable})}
        return (trained, new_state), (loss, aux)

    return step


def all_finite(tree: PyTree):
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]))


def _all_filled(selection: Selection, name: str):
    """Whether a partition of an axis is even, known without its values."""
    return name in selection.disjoint and selection.indices[name].size == selection.sizes[name]


def first_good(
    y: Shaped[Array, "E ..."],
    old: Shaped[Array, "..."],
    good: Bool[Array, " E"],
    axis_name: AxisName | None,
):
    """The row of the first good element of `[E, ...]` over all devices; `old` if none is good."""
    if jnp.issubdtype(y.dtype, jax.dtypes.prng_key):
        data = jax.random.key_data
        first = first_good(data(y), data(old), good, axis_name)
        return jax.random.wrap_key_data(first, impl=jax.random.key_impl(y))
    found, value = jnp.any(good), y[jnp.argmax(good)]
    if axis_name is not None:
        device = jax.lax.axis_index(axis_name)
        first = jax.lax.pmin(jnp.where(found, device, jnp.iinfo(jnp.int32).max), axis_name)
        own = found & (device == first)
        as_int = value.astype(jnp.int32) if value.dtype == bool else value
        value = jax.lax.psum(jnp.where(own, as_int, jnp.zeros_like(as_int)), axis_name)
        value, found = value.astype(y.dtype), jax.lax.pmax(found.astype(jnp.int32), axis_name) > 0
    return jnp.where(found, value, old)


def _anywhere(keep: Mask, axis_name: AxisName | None):
    """Which weights any device keeps."""
    if keep is None or axis_name is None:
        return keep
    return jax.lax.pmax(jnp.asarray(keep).astype(jnp.int32), axis_name) > 0
