"""How elements get an optimizer's state: entry by entry like a parameter, or whole.

The optimizer itself gives the answer. `optimizer.init` is traced for parameters of other sizes, one
bit of every dimension's number at a time. A dimension of the state that changes with a dimension of
a parameter is that dimension. Names, paths and equal shapes play no part.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath, keystr
from jaxtyping import PyTree

from psjax._select import flat_specs
from psjax._types import Mask, OptState, Params, Spec

Dim: TypeAlias = tuple[int, int] | int | str  # the origin of a dimension of the state
_MIXED = "mixed"  # a dimension of the state made of several, such as a flattened one


class Route(NamedTuple):
    """How elements get one leaf of an optimizer's state, and how it is put back.

    Attributes:
      spec: its axis names.
      keep: the mask of its parameter, or None.
      copied: True if the value of one element is put back, False if the mean of all is.
    """

    spec: P
    keep: Any
    copied: bool


def state_axes(optimizer: Any, axes: Any, like: Any) -> Any:
    """The axis names of an optimizer's state: a moment has the axes of its parameter.

    Args:
      optimizer: an `optax.GradientTransformation`.
      axes: tree of `PartitionSpec`s of the parameters.
      like: the parameters, or `jax.ShapeDtypeStruct`s of them.

    Returns:
      A tree of `PartitionSpec`s like the optimizer's state. It is `P()` for leaves that every
      element gets whole: counts, keys, constants and other scalars.

    Raises:
      ValueError: a state is reduced over a named axis.
    """
    state = jax.eval_shape(optimizer.init, like)
    specs = flat_specs("state_axes", axes, like)[0]
    found = state_routes(
        "state_axes", optimizer, like, state, specs, divided=lambda name: name is not None
    )
    return jax.tree.structure(state).unflatten([route.spec for route in found])


def extra_arguments(value: Any, grad: Any, fn: Callable[[Any], Any]) -> dict[str, Any]:
    """Further arguments that an optimizer may use, by the names of optax.

    Args:
      value: the loss.
      grad: its gradient.
      fn: the loss as a function of the parameters.
    """

    def value_fn(
        params: Params, obj_fn: Any = None
    ):  # a line search passes on arguments that it does not know
        del obj_fn
        return fn(params)

    return dict(value=value, grad=grad, value_fn=value_fn, obj_fn=fn)


def state_routes(
    call: str,
    optimizer: Any,
    params: Any,
    opt_state: Any,
    specs: Any,
    keep: Any = None,
    *,
    divided: Callable[[Any], bool],
    like: Any = None,
) -> list[Route]:
    """How elements get each leaf of an optimizer's state.

    Args:
      call: the name of the public function, for messages.
      optimizer: an `optax.GradientTransformation`.
      params: the parameters that it trains.
      opt_state: its state.
      specs: the `PartitionSpec` of every parameter, flat.
      keep: the mask of every parameter, flat, or None.
      divided: whether an entry of a `PartitionSpec` names an axis that is divided.
      like: the parameters that `optimizer.init` got; None: `params`. Only shapes count; a worker
        with a shard passes the whole shapes.

    Raises:
      ValueError: a state is reduced over a divided axis, or is not that of the parameters.
    """
    leaves = [jnp.shape(x) for x in jax.tree.leaves(params)]
    found = jax.tree_util.tree_leaves_with_path(opt_state)
    keep = keep or [None] * len(leaves)
    cut = [any(divided(name) for name in spec or ()) for spec in specs]
    if any(cut) or any(mask is not None for mask in keep):
        origins = _origins(call, optimizer, params if like is None else like)
        _check_state(call, origins, leaves, found)
        dims = [dims for _, dims in origins]
    else:  # nothing is divided: every element gets everything whole
        dims = [tuple(jnp.shape(x)) for _, x in found]
    whole = [not any(isinstance(d, tuple) for d in own) for own in dims]
    floats = [jnp.issubdtype(_dtype(x), jnp.inexact) for _, x in found]
    reached = _reached(optimizer, params, opt_state, [w and f for w, f in zip(whole, floats)])
    names = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    routes = []
    for i, ((path, x), own) in enumerate(zip(found, dims, strict=True)):
        owners = sorted({d[0] for d in own if isinstance(d, tuple)})
        complete = len(owners) == 1 and _is_complete(own, owners[0], leaves)
        over = [] if complete else _reduced_over(own, owners, specs, leaves, keep, divided, names)
        if not over and whole[i] and len(own) and i in reached and any(cut):
            over = ["all entries (it depends on the gradients and has no entry per weight)"]
        if over:
            raise ValueError(_refusal(call, keystr(path), jnp.shape(x), over))
        one = specs[owners[0]] if len(owners) == 1 else None
        entries = [_entry(one, d) for d in own]
        spec = P(*entries) if any(map(divided, entries)) else P()
        mask = keep[owners[0]] if complete else None
        routes.append(Route(spec, mask, whole[i] and (not floats[i] or i not in reached)))
    return routes


def where_held(
    call: str, optimizer: Any, params: Any, old: Any, new: Any, held: Any, anybody: Any
) -> Any:
    """The state after an update in which only some entries of the parameters took part.

    Args:
      call: the name of the public function, for messages.
      optimizer: an `optax.GradientTransformation`.
      params: the parameters that it trains.
      old: its state before.
      new: its state after an update of all entries.
      held: which entries took part, flat; `bool[]` for all entries of a parameter.
      anybody: whether any did: for what has no entry per weight, such as Adam's count.

    Raises:
      ValueError: a state that is reduced over entries of which some took part and some did not.
    """
    leaves = [jnp.shape(x) for x in jax.tree.leaves(params)]
    names = [keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    found = jax.tree_util.tree_leaves_with_path(new)
    origins = _origins(call, optimizer, params)
    _check_state(call, origins, leaves, found)
    before, chosen = jax.tree.leaves(old), []
    for (path, x), (_, own), was in zip(found, origins, before, strict=True):
        owners = sorted({d[0] for d in own if isinstance(d, tuple)})
        owners = range(len(leaves)) if _MIXED in own else owners
        mask = anybody
        if len(owners) == 1 and _is_complete(own, owners[0], leaves):
            mask = jnp.asarray(held[owners[0]])
        elif partly := [names[i] for i in owners if jnp.ndim(held[i])]:
            msg = (
                f"{call}(optimizer=...): the optimizer's state {keystr(path)}, of shape "
                f"{jnp.shape(x)}, is reduced over {', '.join(partly[:3])}, of which a round may "
                "hold a part; the rest must keep its state. Pass an optimizer with a state per "
                "entry, such as optax.sgd with momentum, or optax.adam."
            )
            raise ValueError(msg)
        elif len(owners) == 1:
            mask = jnp.asarray(held[owners[0]])
        chosen.append(jnp.where(mask, x, was))
    return jax.tree.structure(new).unflatten(chosen)


def check_element_state(call: str, optimizer: Any, params: Any, opt_state: Any) -> None:
    """Raise unless `optimizer.init` on an element's parameters gives the state it sees."""
    shapes = lambda tree: [
        (keystr(path), jnp.shape(x)) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]
    own, want = shapes(opt_state), shapes(jax.eval_shape(optimizer.init, params))
    if own != want:
        (path, shape), (_, other) = _first_difference(own, want)
        msg = (
            f"{call}(optimizer=...): the optimizer decides by shapes. An element's state "
            f"{path} has shape {shape}, but optimizer.init of its parameters gives "
            f"{other}. Pass an option that does not depend on sizes, such as "
            "optax.adafactor(factored=False), or other index sets."
        )
        raise ValueError(msg)


def _dtype(x: Any):
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _entry(spec: Spec, dim: Dim):
    names = spec or ()
    return names[dim[1]] if isinstance(dim, tuple) and dim[1] < len(names) else None


def _is_complete(own: Sequence[Dim], owner: int, leaves: Sequence[tuple[int, ...]]):
    """Whether a leaf ends with all dimensions of one parameter, in their order."""
    dims = tuple((owner, d) for d in range(len(leaves[owner])))
    return own[len(own) - len(dims) :] == dims


def _reduced_over(
    own: Sequence[Dim],
    owners: Sequence[int],
    specs: Sequence[Spec],
    leaves: Sequence[tuple[int, ...]],
    keep: Sequence[Mask],
    divided: Callable[[Any], bool],
    names: Sequence[str],
):
    """In words, the divided axes over which a leaf of the state is reduced."""
    if _MIXED in own:
        owners = range(len(specs))
        lost = [(i, d) for i in owners for d in range(len(leaves[i]))]
    else:
        rows = [d for d in own if isinstance(d, tuple)]
        fixed = any(not isinstance(d, tuple) and d != 1 for d in own)
        kept = set() if fixed or len(owners) > 1 or len(set(rows)) < len(rows) else set(rows)
        lost = [(i, d) for i in owners for d in range(len(leaves[i])) if (i, d) not in kept]
    over = [
        f"axis {_entry(specs[i], (i, d))!r} of {names[i]}"
        for i, d in lost
        if divided(_entry(specs[i], (i, d)))
    ]
    return over + [f"dropped weights of {names[i]}" for i in owners if keep[i] is not None]


def _refusal(call: str, path: str, shape: tuple[int, ...], over: Sequence[str]):
    return (
        f"{call}(optimizer=...): the optimizer's state {path}, of shape {shape}, is reduced over "
        f"{', '.join(over[:3])}{' ...' if len(over) > 3 else ''}. An element sees only a part of "
        "that, so that its state cannot be put back. Pass an optimizer with a state per entry, "
        "such as optax.adam, optax.sgd or optax.adafactor(factored=False), or choose one for such "
        "parameters by optax.partition."
    )


def _check_state(
    call: str,
    origins: Sequence[tuple[str, tuple[Dim, ...]]],
    leaves: Sequence[tuple[int, ...]],
    found: Sequence[tuple[KeyPath, Any]],
):
    """The state must have the shapes that follow from those of the parameters."""
    size = lambda d: leaves[d[0]][d[1]] if isinstance(d, tuple) else d
    want = [(path, tuple(map(size, dims))) for path, dims in origins]
    own = [(keystr(path), jnp.shape(x)) for path, x in found]
    fits = len(own) == len(want) and all(
        a == b and len(x) == len(y) and all(n == m or m == _MIXED for n, m in zip(x, y))
        for (a, x), (b, y) in zip(own, want)
    )
    if fits:
        return
    (path, shape), (other, expected) = _first_difference(own, want)
    msg = (
        f"{call}(optimizer=...): the optimizer's state has {path} of shape {shape}; by the shapes "
        f"of the parameters it has {other} of shape {expected}. Pass optimizer.init of the "
        "parameters that are trained (with mutable=..., of those alone)."
    )
    raise ValueError(msg)


def _first_difference(
    own: Sequence[tuple[str, tuple[Dim, ...]]], want: Sequence[tuple[str, tuple[Dim, ...]]]
):
    longest = max(len(own), len(want))
    pad = lambda xs: [*xs, *[("nothing", ())] * (longest - len(xs))]
    return next((a, b) for a, b in zip(pad(own), pad(want)) if a != b)


def _origins(call: str, optimizer: optax.GradientTransformation, like: Params):
    """The path of every leaf of the state, and where each of its dimensions comes from.

    A dimension is `(parameter, dimension)`, a number if its size is fixed, or `_MIXED`.
    """
    leaves, treedef = jax.tree.flatten(like)
    base = [_apart(jnp.shape(x)) for x in leaves]
    dims = [(i, d) for i, shape in enumerate(base) for d in range(len(shape))]
    number = {dim: k + 1 for k, dim in enumerate(dims)}
    step = lambda n: -1 if n % 2 and n > 1 else 1  # crosses no even size: optimizers decide there

    def probe(changed: Callable[[int], bool]):
        shapes = [
            tuple(n + step(n) * changed(number[i, d]) for d, n in enumerate(shape))
            for i, shape in enumerate(base)
        ]
        structs = [jax.ShapeDtypeStruct(s, _dtype(x)) for s, x in zip(shapes, leaves)]
        state = jax.eval_shape(optimizer.init, treedef.unflatten(structs))
        found = jax.tree_util.tree_leaves_with_path(state)
        return [(keystr(path), jnp.shape(x)) for path, x in found]

    bits = range(len(dims).bit_length())
    none, every = probe(lambda _: False), probe(lambda _: True)
    one = [probe(lambda number, bit=bit: bool(number >> bit & 1)) for bit in bits]
    ranks = lambda state: [(path, len(shape)) for path, shape in state]
    if any(ranks(state) != ranks(none) for state in (every, *one)):
        msg = (
            f"{call}(optimizer=...): the optimizer's state depends on the sizes of the parameters; "
            "psjax cannot tell how to divide it. Pass an option that does not depend on sizes, "
            "such as optax.adafactor(factored=False)."
        )
        raise ValueError(msg)

    def origin(k: int, d: int) -> Dim:
        size = none[k][1][d]
        code = sum(1 << bit for bit in bits if one[bit][k][1][d] != size)
        if not code and every[k][1][d] == size:
            return size
        if not 1 <= code <= len(dims):
            return _MIXED
        i, own = dims[code - 1]
        alone = base[i][own] == size and every[k][1][d] == size + step(size)
        return (i, own) if alone else _MIXED

    return [
        (path, tuple(origin(k, d) for d in range(len(shape))))
        for k, (path, shape) in enumerate(none)
    ]


def _apart(shape: tuple[int, ...]):
    """Sizes in the same order as in the shape, so far apart that a step of 1 keeps the order."""
    sizes, last = list(shape), None
    for d in sorted(range(len(shape)), key=lambda d: shape[d]):
        sizes[d] = shape[d] if last is None else max(shape[d], last + 3)
        last = sizes[d]
    return tuple(sizes)


def _reached(
    optimizer: optax.GradientTransformation,
    params: Params,
    opt_state: OptState,
    candidates: Sequence[bool],
):
    """Which candidates depend on gradients, weights or losses in an update.

    `jax.vmap` follows the data flow: a result without a batch axis depends on no batched input.
    """
    update = optax.with_extra_args_support(optimizer).update
    state, treedef = jax.tree.flatten(opt_state)
    left = [i for i, candidate in enumerate(candidates) if candidate]
    found: set[int] = set()
    struct = lambda x, lead=(): jax.ShapeDtypeStruct((*lead, *jnp.shape(x)), _dtype(x))
    value = jax.ShapeDtypeStruct((2,), jnp.result_type(float))
    data = jax.tree.map(lambda x: struct(x, (2,)), (params, params)), value

    def reaches(outputs: Sequence[int]):
        def fn(data: Any, state: PyTree):
            (grads, params), value = data
            size = lambda p: sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(p))
            options = extra_arguments(value, grads, lambda p: value * size(p))
            new = update(grads, treedef.unflatten(state), params, **options)[1]
            return [jax.tree.leaves(new)[i] for i in outputs]

        constant = [i in left for i in range(len(state))]
        axes = [None if fixed else 0 for fixed in constant]
        structs = [struct(x, () if fixed else (2,)) for x, fixed in zip(state, constant)]
        try:
            jax.eval_shape(jax.vmap(fn, in_axes=(0, axes), out_axes=None), data, structs)
        except (ValueError, TypeError, NotImplementedError):
            return True  # mapped, or not known
        return False

    while left and reaches(left):  # until the rest depends only on itself
        more = [i for i in left if reaches([i])] or left
        found |= set(more)
        left = [i for i in left if i not in more]
    return found
