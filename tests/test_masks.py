"""Section 6.1: weights and layers that no element sees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import structure
from tests import reference
from tests import separable_model as model
from tests.masks import (
    AXES,
    KEEP,
    LIKE,
    SELECTIONS,
    TRUNK,
    UNORDERED,
    C,
    batch_by_label,
    close,
    element,
    full,
    masked,
    pairs_of,
    same_bits,
    whole,
)
from tests.over_devices import divided, over_devices

pytestmark = pytest.mark.usefixtures("x64")


def those(tree, keep, kept):
    """Of every leaf the entries that are kept, or those that are dropped."""
    return {n: np.asarray(tree[n])[full(keep)[n] == kept] for n in LIKE}


@functools.cache
def expected(mask):
    """Value and gradient of the whole network with zeros for what is dropped."""
    return jax.jit(jax.value_and_grad(lambda w: whole(masked(KEEP[mask], w))))(model.init(C))


# ----------------------------------------------------------------------------- the selection


def make(kind):
    if kind == "partition":
        return psjax.random_partition(jax.random.key(0), AXES, {"class": C}, num_elements=3)
    index = SELECTIONS[kind]
    return psjax.select(AXES, index, like=LIKE) if index else psjax.replicas(LIKE, 3)


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("kind", "mask"),
    [("overlap", mask) for mask in KEEP]
    + [(kind, "weights") for kind in SELECTIONS if kind != "overlap"]
    + [("row dropped", "rows and columns"), ("replicas", "rows and columns")],
)
def test_nobody_sees_or_holds_a_dropped_weight(kind, mask):
    """Gather, its transpose, its pseudo-inverse and counts, against the reference's matrices."""
    plain, keep = make(kind), full(KEEP[mask])
    selection = plain.drop(KEEP[mask])
    specs = dict.fromkeys(AXES, P()) if kind == "replicas" else AXES
    elements = [{n: i[e] for n, i in plain.indices.items()} for e in range(3)]
    w = {name: np.random.default_rng(1).normal(size=x.shape) for name, x in LIKE.items()}
    nan = {name: np.where(keep[name], x, np.nan) for name, x in w.items()}
    y = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape),
        jax.eval_shape(selection.gather, LIKE),
    )

    @jax.jit
    def everything(selection, w, y):
        return (
            selection.gather(w),
            selection.scatter_add(y, w),
            jax.linear_transpose(selection.gather, LIKE)(y)[0],
            selection.scatter_mean(y, w),
            selection.counts(w),
        )

    seen, add, transpose, mean, counts = everything(selection, nan, y)
    for name, x in w.items():
        rows = [reference.gather(np.where(keep[name], x, 0), specs[name], e) for e in elements]
        np.testing.assert_array_equal(seen[name], np.stack(rows))
        total = reference.scatter_add(y[name], x.shape, specs[name], elements)
        np.testing.assert_allclose(add[name], np.where(keep[name], total, 0), 1e-12)
        held = reference.counts(x.shape, specs[name], elements)
        np.testing.assert_array_equal(counts[name], np.where(keep[name], held, 0))
        inverse = reference.scatter_mean(y[name], x, specs[name], elements)
        inverse = np.where(keep[name], inverse, np.nan)
        np.testing.assert_allclose(mean[name], inverse, 1e-12, 1e-13)
    close(add, transpose)
    assert jax.tree.map(jnp.shape, seen) == jax.tree.map(jnp.shape, y)


def test_the_mean_keeps_dropped_weights_bit_for_bit_over_devices_too():
    keep, w = KEEP["weights"], model.init(C)
    selection = make("partition").drop(keep)
    y = jax.tree.map(lambda x: np.asarray(x) + 1, jax.jit(selection.gather)(w))
    one = jax.jit(selection.scatter_mean)(y, w)
    close(mean_over_two_devices(selection.split(2), divided(y, 2), w), one)
    same_bits(those(one, keep, False), those(w, keep, False))


def mean_over_two_devices(split, y, w):
    fn = lambda s, y, w: s.scatter_mean(y, w, axis_name="d")
    devices = jax.devices()[:2]
    return jax.pmap(fn, "d", in_axes=(0, 0, None), out_axes=None, devices=devices)(split, y, w)


@pytest.mark.parametrize("kind", ["overlap", "partition"])
def test_of_a_weight_that_one_device_drops_the_others_are_the_holders(kind):
    w, split = model.init(C), make(kind).split(2)
    masks = [
        {n: np.random.default_rng(s).random(x.shape) < 0.5 for n, x in LIKE.items()} for s in (1, 2)
    ]
    parts = [jax.tree.map(lambda x, d=d: x[d], split).drop(masks[d]) for d in range(2)]
    y = jax.tree.map(
        lambda x: np.random.default_rng(x.size).normal(size=x.shape),
        jax.eval_shape(parts[0].gather, w),
    )
    y = jax.tree.map(lambda x: np.stack([x, 2 * x]), y)
    row = lambda d: jax.tree.map(lambda x: x[d], y)
    both = jax.jit(lambda part, y: (part.scatter_add(y, w), part.counts(w)))
    totals, counts = zip(*(both(part, row(d)) for d, part in enumerate(parts)))
    want = {
        n: np.where(
            counts[0][n] + counts[1][n] == 0,
            x,
            (totals[0][n] + totals[1][n]) / np.maximum(counts[0][n] + counts[1][n], 1),
        )
        for n, x in w.items()
    }
    both = jax.tree.map(lambda *x: np.stack(x), *parts)
    close(mean_over_two_devices(both, y, w), want)


def test_drops_compose_in_any_order():
    a, b = KEEP["weights"], KEEP["rows and columns"]
    selection = pairs_of(UNORDERED)
    both = {name: full(a)[name] & full(b)[name] for name in LIKE}
    counts = jax.jit(lambda s: s.counts(LIKE))
    want = counts(selection.drop(both))
    same_bits(counts(selection.drop(a).drop(b)), want)
    same_bits(counts(selection.drop(b).drop(a)), want)
    same_bits(jax.jit(lambda a: selection.drop(b).drop(a).counts(LIKE))(a), want)


def test_a_selection_that_drops_nothing_has_no_mask_among_its_leaves():
    selection = pairs_of(UNORDERED)
    assert selection.keep is None
    assert len(jax.tree.leaves(selection)) == 3
    assert len(jax.tree.leaves(selection.drop(KEEP["nothing"]))) == 3


# --------------------------------------------------------------------------- value and gradient


@pytest.mark.parametrize(
    ("mask", "chunk_size"), [(mask, 4) for mask in KEEP] + [("weights", 1), ("weights", 10)]
)
def test_the_sum_over_elements_is_the_network_with_zeros(mask, chunk_size):
    selection = pairs_of(UNORDERED).drop(KEEP[mask])
    fn = jax.jit(psjax.value_and_grad(element, P("label"), chunk_size))
    close(fn(model.init(C), selection, batch_by_label()), expected(mask))


def test_gradients_of_the_elements_are_zero_for_what_is_dropped():
    mask = "weights"
    selection, w = pairs_of(UNORDERED).drop(KEEP[mask]), model.init(C)
    home = jax.jit(lambda grads: pairs_of(UNORDERED).scatter_add(grads, LIKE))
    seen = jax.jit(pairs_of(UNORDERED).gather)(full(KEEP[mask]))
    for chunk_size in (1, 3):
        fn = jax.jit(psjax.element_value_and_grad(element, P("label"), chunk_size))
        values, grads = fn(w, selection, batch_by_label())
        close((values.sum(), home(grads)), expected(mask))
        assert not any(np.any(np.asarray(g)[~np.asarray(seen[n])]) for n, g in grads.items())


def test_a_row_that_is_taken_has_its_own_mask():
    """Indices of rank 1: the element's arrays lack the axis, and so does what it sees of masks."""
    keep, w = KEEP["weights"], model.init(C)
    selection = psjax.select(AXES, {"class": [3, 0, 3]}, like=LIKE).drop(keep)
    fn = lambda w: sum(jnp.sum(jnp.sin(x)) for x in w.values())
    _, grads = jax.jit(psjax.element_value_and_grad(fn, chunk_size=2))(w, selection)
    same = jax.vmap(jax.grad(fn))(selection.gather(w))
    seen = psjax.select(AXES, {"class": [3, 0, 3]}, like=LIKE).gather(full(keep))
    close(grads, {n: jnp.where(seen[n], g, 0) for n, g in same.items()})


def test_a_partially_separable_function_has_the_derivatives_of_the_network_with_zeros():
    mask = "weights"
    selection, w = pairs_of(UNORDERED).drop(KEEP[mask]), model.init(C)
    f = psjax.partially_separable(element, P("label"), chunk_size=5)
    v = model.init(C, seed=9)
    product = lambda f: jax.jit(lambda w: jax.jvp(jax.grad(f), (w,), (v,)))(w)
    got = product(lambda w: f(w, selection, batch_by_label()))
    close(got, product(lambda w: whole(masked(KEEP[mask], w))))
    close(got[0], expected(mask)[1])


@pytest.mark.parametrize("wrapper", ["shard", "pmap"])
def test_dropped_weights_are_dropped_on_every_device(wrapper):
    devices = 3
    fn = psjax.value_and_grad(element, P("label"))
    selection = pairs_of(UNORDERED).drop(KEEP["rows and columns"])
    if wrapper == "shard":
        mesh = jax.sharding.Mesh(jax.devices()[:devices], "d")
        spread = jax.jit(psjax.shard(fn, mesh, P("label")))
    else:
        spread = psjax.pmap(fn, jax.devices()[:devices], P("label"))
    close(spread(model.init(C), selection, batch_by_label()), expected("rows and columns"))


def test_a_dropped_nan_reaches_nothing():
    keep = KEEP["weights"]
    w = {n: jnp.where(full(keep)[n], x, jnp.nan) for n, x in model.init(C).items()}
    selection = pairs_of(UNORDERED).drop(keep)
    f = psjax.partially_separable(element, P("label"))
    both = jax.jit(psjax.value_and_grad(element, P("label")))
    close(both(w, selection, batch_by_label()), expected("weights"))
    got = jax.jit(jax.value_and_grad(f))(w, selection, batch_by_label())
    close(got, expected("weights"))


def test_twenty_masks_are_one_trace():
    traces = []

    def counting(w, batch):
        traces.append(1)
        return element(w, batch)

    fn, plain = psjax.value_and_grad(counting, P("label")), pairs_of(UNORDERED)
    drawn = jax.jit(
        lambda w, key: fn(
            w, plain.drop(psjax.dropout_mask(key, w, 0.2, {"trunk": 0.5})), batch_by_label()
        )
    )
    given = jax.jit(lambda w, selection: fn(w, selection, batch_by_label()))
    w, values = model.init(C), set()
    for i in range(20):
        if i == 1:
            once = len(traces)
        values.add(float(drawn(w, jax.random.key(i))[0]))
        keep = {n: np.random.default_rng(i).random(x.shape) < 0.5 for n, x in LIKE.items()}
        given(w, plain.drop(keep))
    assert len(traces) == once
    assert drawn._cache_size() == given._cache_size() == 1
    assert len(values) > 15


def test_with_inverted_scaling_the_mean_over_masks_of_a_linear_function_is_that_of_the_whole():
    """What `dropout_mask` says of scaling, over all 2^4 masks of one rate, weighed."""
    w, x, rate = jnp.array([1.0, -2.0, 3.0, 5.0]), jnp.array([2.0, 1.0, 0.5, 1.5]), 0.25
    fn = psjax.value_and_grad(lambda w: x @ (w / (1 - rate)))
    mean, total = jnp.zeros(4), 0.0
    for bits in np.ndindex(2, 2, 2, 2):
        keep = np.array(bits, bool)
        p = np.prod(np.where(keep, 1 - rate, rate))
        value, grad = fn(w, psjax.replicas(w, 1).drop(keep))
        mean, total = mean + p * grad, total + p * value
    close((total, mean), (x @ w, x))


# ------------------------------------------------------------------------------- local training


def local_loss(w, batch):
    return model.whole_loss(w, batch["x"], batch["y"])


def local_batches(n, steps=3, num_classes=C):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(n, steps, 6, model.INPUTS))
    return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, num_classes, (n, steps, 6)))}


@pytest.mark.parametrize("mask", ["weights", "rows and columns"])
def test_a_round_of_one_element_is_plain_training_of_the_network_with_zeros(mask):
    """Plain Adam leaves a weight of gradient 0 where it is, if its moments are 0."""
    keep, w, optimizer = KEEP[mask], model.init(C), optax.adam(0.05)
    batches = local_batches(1)

    def step(carry, batch):
        w, state = carry
        grads = jax.grad(lambda w: local_loss(masked(keep, w), batch))(w)
        updates, state = optimizer.update(grads, state, w)
        return (optax.apply_updates(w, updates), state), None

    start = (w, optimizer.init(w))
    own = jax.tree.map(lambda x: x[0], batches)
    want = jax.jit(lambda start: jax.lax.scan(step, start, own)[0])(start)
    update = jax.jit(psjax.local_update(local_loss, optimizer))
    got = update(*start, psjax.replicas(w, 1).drop(keep), batches)
    close(got[:2], want)
    same_bits(those(got[0], keep, False), those(w, keep, False))
    assert all(np.any(got[0][n] != w[n]) for n in w if full(keep)[n].any())


def masked_loss(w, batch):
    return local_loss(masked(batch["keep"], w), batch)


def repeated(own, steps=3):
    """The elements' masks as leaves of their batches, `[E, J, ...]`."""
    return {n: jnp.repeat(x[:, None], steps, axis=1) for n, x in own.items()}


@pytest.mark.parametrize("wrapper", [None, "shard_map"])
def test_a_round_leaves_dropped_weights_and_their_moments_alone(wrapper):
    """Even NaN; and even where momentum and weight decay would move a weight of gradient 0."""
    keep, optimizer = KEEP["weights"], optax.adamw(0.05, weight_decay=0.1)
    gone = lambda tree: those(tree, keep, False)
    w = {n: jnp.where(full(keep)[n], x, jnp.nan) for n, x in model.init(C).items()}
    state = jax.tree.map(
        lambda x: x + 1.0 if jnp.issubdtype(x.dtype, jnp.floating) else x,
        optimizer.init(model.init(C)),
    )
    index = {"class": [[0, 2, 4], [1, 2, 3]]}
    selection, batches = psjax.select(AXES, index, like=LIKE).drop(keep), local_batches(2, 3, 3)
    if wrapper is None:
        update = jax.jit(psjax.local_update(local_loss, optimizer, chunk_size=2))
        new, new_state, metrics = update(w, state, selection, batches)
    else:
        inner = psjax.local_update(local_loss, optimizer, axis_name="workers")
        run = over_devices(inner, wrapper, 2)
        new, new_state, metrics = run(w, state, selection.split(2), divided(batches, 2))
    assert np.all(metrics.finite)
    same_bits(gone(new), gone(w))
    for name in ("mu", "nu"):
        before, after = (getattr(s[0], name) for s in (state, new_state))
        same_bits(gone(after), gone(before))
        assert any(np.any(after[n] != before[n]) for n in LIKE)
    # What is kept is trained as if the rest were 0 and without moments.
    zero = masked(keep, model.init(C))
    moments = lambda s: masked(keep, s) if isinstance(s, dict) else s
    clean = jax.tree.map(moments, state, is_leaf=lambda s: isinstance(s, dict))
    alone = psjax.local_update(masked_loss, optimizer, chunk_size=1)
    plain = psjax.select(AXES, index, like=LIKE)
    everywhere = dict.fromkeys(LIKE, np.array(True))
    own = plain.gather(full(keep))
    want = jax.jit(alone)(zero, clean, plain.drop(everywhere), batches | {"keep": repeated(own)})
    close(those(new, keep, True), those(want[0], keep, True))


def test_weights_in_shards_refuse_masks():
    axes, w = {"w": P("h")}, {"w": jnp.ones(4)}
    selection = psjax.ist.membership(0, 0, axes, {"h": 4}, 1, stratified=True)
    selection = selection.drop({"w": False})
    optimizer = optax.sgd(0.1)
    update = psjax.local_update(lambda w, x: jnp.sum(w["w"]) * x, optimizer)
    round = psjax.ist.exchange(update, "d")
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        round, mesh=mesh, in_specs=(P("d"), P(), P(), P("d")), out_specs=(P("d"), P(), P("d"))
    )
    with pytest.raises(ValueError, match="exchange: the selection drops weights"):
        spread(w, optimizer.init(w), selection, jnp.ones((1, 1)))


# ---------------------------------------------------------------------------- drawing the masks


def test_weights_are_dropped_one_by_one_at_their_rate():
    like = {"a": np.zeros((100, 200)), "b": np.zeros(20_000)}
    mask = psjax.dropout_mask(jax.random.key(0), like, 0.3)
    for name, keep in mask.items():
        assert keep.shape == like[name].shape
        assert abs(float(keep.mean()) - 0.7) < 5 * np.sqrt(0.21 / 20_000)
    a, b = (np.asarray(mask[name]).ravel() for name in ("a", "b"))
    assert abs(np.mean(a & b) - 0.49) < 5 * np.sqrt(0.25 / 20_000)  # not the same draw
    same_bits(mask, jax.jit(lambda key: psjax.dropout_mask(key, like, 0.3))(jax.random.key(0)))
    assert not np.array_equal(a, np.ravel(psjax.dropout_mask(jax.random.key(1), like, 0.3)["a"]))


def test_a_layer_is_dropped_by_one_draw_for_all_its_leaves():
    like = {"Conv_0": {"kernel": np.zeros(3), "bias": np.zeros(2)}, "Conv_01": np.zeros(2)}
    draws = []
    for i in range(60):
        mask = psjax.dropout_mask(jax.random.key(i), like, layers={"Conv_0": 0.5})
        assert mask["Conv_01"] is None
        assert mask["Conv_0"]["kernel"].shape == ()
        assert mask["Conv_0"]["kernel"] == mask["Conv_0"]["bias"]
        draws.append(bool(mask["Conv_0"]["bias"]))
    assert 15 < sum(draws) < 45
    never = psjax.dropout_mask(jax.random.key(0), like, layers={"Conv_0": 0.0})
    assert never["Conv_0"]["bias"]
    both = psjax.dropout_mask(jax.random.key(0), like, 0.5, {"Conv_0/bias": 1.0})
    assert not both["Conv_0"]["bias"].any()
    assert both["Conv_0"]["kernel"].shape == (3,)


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("keep", "error", "message"),
    [
        ({"trunk": False}, ValueError, r"not a tree like the parameters; .*\['bias'\]"),
        (TRUNK | {"tronk": False}, ValueError, r"differ in \['tronk'\]"),
        (
            TRUNK | {"bias": np.ones(C)},
            TypeError,
            r"\['bias'\] is float64\[5\]; pass None, a bool",
        ),
        (TRUNK | {"bias": 0}, TypeError, r"\['bias'\] is int64\[\]"),
        (False, ValueError, "not a tree like the parameters"),
    ],
)
def test_masks_that_do_not_fit_are_refused(keep, error, message):
    with pytest.raises(error, match=message):
        pairs_of(UNORDERED).drop(keep)


@pytest.mark.parametrize("shape", [(C + 1,), (2, C), (C, 1)])
def test_a_mask_that_does_not_broadcast_to_its_leaf_is_refused_where_it_is_used(shape):
    selection = pairs_of(UNORDERED).drop(TRUNK | {"bias": np.ones(shape, bool)})
    message = r"mask that Selection.drop got for \['bias'\] has shape .* not broadcast .* \(5,\)"
    w, batch = model.init(C), batch_by_label()
    calls = [
        lambda: selection.gather(w),
        lambda: psjax.value_and_grad(element, P("label"))(w, selection, batch),
        lambda: structure.overlap(selection, w),
        lambda: structure.dependence(AXES, w, keep=TRUNK | {"bias": np.ones(shape, bool)}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_masks_that_cannot_be_one_are_refused():
    selection = pairs_of(UNORDERED).drop(TRUNK | {"bias": np.ones(C, bool)})
    with pytest.raises(ValueError, match=r"mask of shape \(3,\), but one of shape \(5,\) already"):
        selection.drop(TRUNK | {"bias": np.ones(3, bool)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 1.5}, "rate is 1.5; pass a probability"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"layers": {"trunk": -0.1}}, r"layers\['trunk'\] is -0.1"),
        ({"layers": {"Conv_0": 1.0}}, "no parameter has the path 'Conv_0'; .*'trunk'"),
    ],
)
def test_probabilities_and_paths_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        psjax.dropout_mask(jax.random.key(0), LIKE, **options)
