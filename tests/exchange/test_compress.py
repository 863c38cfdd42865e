"""Theorems about rounds with a codec between the workers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from psjax import codec, cost
from tests.exchange import plain
from tests.over_devices import over_owners

H, J, N = 6, 2, 4  # rows, local steps, workers
AXES = {"rows": P("h"), "shared": P()}
INNER = optax.sgd(plain.RATE, momentum=plain.DECAY)
NESTEROV = optax.sgd(0.7, momentum=0.9, nesterov=True)
close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
CODECS = {"int4": (codec.int4(4), plain.int4, 4), "top_k": (codec.top_k(0.3), plain.top_k, 1)}


def quadratic(params, target):
    """The gradient of every entry is its distance from the target."""
    return 0.5 * sum(jnp.sum((x - target) ** 2) for x in jax.tree.leaves(params))


def start(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "rows": jnp.asarray(rng.normal(size=(H, 2)), dtype),
        "shared": jnp.asarray(rng.normal(size=(3,)), dtype),
    }


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def targets_of(number, n=N):
    return np.random.default_rng(number).normal(size=(n, J))


def mapped(update, how, n):
    """A round of n workers; the parameters are shared, and of the state what `layout` says."""
    devices = jax.devices()[:n]
    own = update.layout(0, None)
    axes = dict(in_axes=(None, own, 0, 0), out_axes=(None, own, 0), axis_name="w")
    if how == "vmap":
        return jax.jit(jax.vmap(lambda p, s, sel, b: update(p, s, sel[:], b), **axes))
    if how == "pmap":
        return jax.pmap(update, **axes, devices=devices)
    mesh = jax.make_mesh((n,), ("w",), axis_types=(AxisType.Auto,), devices=devices)
    specs = update.layout(P("w"), P())

    def of_own(fn, state):
        parts, treedef = jax.tree.flatten(update.layout(True, False))
        trees = zip(parts, treedef.flatten_up_to(state), strict=True)
        return treedef.unflatten([jax.tree.map(fn, x) if own else x for own, x in trees])

    def body(params, state, selection, batches):
        drop, add = (lambda x: x[0]), (lambda x: x[None])
        mine = of_own(drop, state), *jax.tree.map(drop, (selection, batches))
        params, state, metrics = update(params, *mine)
        return params, of_own(add, state), jax.tree.map(add, metrics)

    return jax.jit(
        jax.shard_map(
            body,
            mesh=mesh,
            in_specs=(P(), specs, P("w"), P("w")),
            out_specs=(P(), specs, P("w")),
            check_vma="False" not in how,
        )
    )


HOW = ["vmap", "pmap", "shard_map", "shard_map, check_vma=False"]
SUBNETS = [[[0, 1], [2, 3], [4, 0], [1, 5]], [[5, 2], [0, 1], [3, 5], [1, 2]]]  # row 4: nobody

# ---------------------------------------------------------------------------- replicas and subnets


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("subnets", [False, True])
def test_the_identity_gives_the_bits_of_a_round_without_a_codec(how, subnets):
    params = start(np.float32)
    selection = psjax.replicas(params, N)
    if subnets:
        selection = psjax.select(AXES, {"h": SUBNETS[0]}, like=params)
    parts, batches = selection.split(N), jnp.asarray(targets_of(0), jnp.float32)[:, None]
    local = psjax.local_update(quadratic, INNER)
    update = codec.compress(local, codec.identity(), "w")
    state = update.init(params, N)
    new, _, metrics = mapped(update, how, N)(params, state, parts, batches)
    today = psjax.local_update(quadratic, INNER, axis_name="w")
    expected, _, other = mapped(today, how, N)(params, today.init(params, N), parts, batches)
    jax.tree.map(np.testing.assert_array_equal, (new, metrics.loss), (expected, other.loss))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize(
    ("name", "how", "case"),
    [
        ("int4", "vmap", "replicas"),
        ("int4", "shard_map", "subnets"),
        ("top_k", "vmap", "subnets, one NaN"),
        ("top_k", "pmap", "replicas, one NaN"),
    ],
)
def test_rounds_with_error_feedback_are_those_of_plain_loops(name, how, case, outer):
    """Residual and momentum are the worker's own; entries that nobody held keep their bits."""
    own, encode_decode, block = CODECS[name]
    params = start()
    expected = plain.Workers(flat(params), N, encode_decode, block)
    update = codec.compress(psjax.local_update(quadratic, INNER), codec.error_feedback(own), "w")
    update = psjax.outer(update, NESTEROV) if outer else update
    state, step = update.init(params, N), mapped(update, how, N)
    trace = np.zeros_like(expected.w)
    for number in range(4):
        targets, rows = targets_of(number), SUBNETS[number % 2]
        bad = [2] if "NaN" in case and number % 2 else []
        holds = np.ones((N, H * 2 + 3), bool)
        selection = psjax.replicas(params, N)
        if "subnets" in case:
            selection = psjax.select(AXES, {"h": rows}, like=params)
            holds[:, : 2 * H] = [np.repeat(np.isin(np.arange(H), mine), 2) for mine in rows]
        change, held = expected.change(targets, holds, bad)
        for i in np.flatnonzero(held):
            if outer:
                trace[i] = -change[i] + 0.9 * trace[i]
                expected.w[i] -= 0.7 * (-change[i] + 0.9 * trace[i])
            else:
                expected.w[i] += change[i]
        targets[bad] = np.nan
        before = flat(params)
        parts = selection.split(N)
        params, state, metrics = step(params, state, parts, jnp.asarray(targets)[:, None])
        assert metrics.finite[:, 0].tolist() == [e not in bad for e in range(N)]
        close(flat(params), expected.w)
        np.testing.assert_array_equal(flat(params)[~held], before[~held])
    residual = state.inner.residual if outer else state.residual
    for e in range(N):
        close(flat(jax.tree.map(lambda x, e=e: x[e], residual)), expected.residuals[e])


@pytest.mark.usefixtures("x64")
def test_error_feedback_moves_what_the_codec_alone_never_sends():
    """Two workers pull two entries apart by 20; of each shard of two the largest is sent."""
    params, n = {"w": jnp.zeros(4)}, 2
    loss_fn = lambda params, target: 0.5 * jnp.sum((params["w"] - target) ** 2)
    targets = jnp.array([[10.0, 1.0, -10.0, 1.0], [-10.0, 1.0, 10.0, 1.0]])
    batches = jnp.broadcast_to(targets[:, None, None], (n, 1, J, 4))
    parts, far = psjax.replicas(params, n).split(n), []
    for own in (codec.error_feedback(codec.top_k(0.5)), codec.top_k(0.5)):
        update = codec.compress(psjax.local_update(loss_fn, optax.sgd(0.005)), own, "w")
        step, state, w = mapped(update, "vmap", n), update.init(params, n), params
        for _ in range(500):
            w, state, _ = step(w, state, parts, batches)
        far.append(np.abs(w["w"][jnp.array([1, 3])] - 1).max())
    assert far[0] < 0.15
    assert far[1] == 1


@pytest.mark.parametrize("bad", [None, 0])
def test_what_is_not_trained_is_sent_as_it_is(bad):
    """`mutable`: the mean of floats over the finite workers, and the first one's integers."""

    def loss_fn(variables, x):
        moved = {"seen": variables["seen"] + x, "count": variables["count"] + x.astype(int)}
        return 0.5 * jnp.sum((variables["params"] - x * jnp.arange(5.0)) ** 2), moved

    variables = {"params": jnp.zeros(5), "seen": jnp.zeros(()), "count": jnp.array(3)}
    options = dict(mutable=("seen", "count"))
    today = psjax.local_update(loss_fn, INNER, axis_name="w", **options)
    local = psjax.local_update(loss_fn, INNER, **options)
    update = codec.compress(local, codec.error_feedback(codec.int2(4)), "w")
    batches = jnp.arange(1.0, 1 + N * J).reshape(N, 1, J)
    batches = batches if bad is None else batches.at[bad].set(jnp.nan)
    found = []
    for one in (today, update):
        parts = psjax.replicas(variables, N).split(N)
        new, _, _ = mapped(one, "vmap", N)(variables, one.init(variables, N), parts, batches)
        found.append(new)
    for name in ("seen", "count"):
        np.testing.assert_array_equal(found[0][name], found[1][name])
        assert found[0][name].dtype == found[1][name].dtype
    assert (found[0]["params"] != found[1]["params"]).any()


@pytest.mark.parametrize("n", [2, 4, 8])
def test_a_round_sends_the_packed_bits_and_the_scales(n):
    """Beside them, the number of finite workers."""
    params = {"a": jnp.ones((40, 30)), "b": jnp.ones(7)}
    update = codec.compress(psjax.local_update(quadratic, INNER), codec.int4(32), "w")
    arguments = params, update.init(params, n), psjax.replicas(params, n).split(n)
    lowered = mapped(update, "shard_map", n).lower(*arguments, jnp.ones((n, 1, J)))
    ledger = cost.ledger(lowered.compile())
    shard = 32 * (-(-1207 // (32 * n)))
    assert ledger.bytes_per_device == 2 * (n - 1) * (shard // 2 + 4 * shard // 32)
    assert {c.elements for c in ledger.metrics} == {1}


# -------------------------------------------------------------------------- weights in shards

NET = {"in": P("h1", None), "between": P("h1", "h2"), "out": P("h2", None), "bias": P()}
SIZES = {"h1": 16, "h2": 16}
SHAPES = {"in": (16, 3), "between": (16, 16), "out": (16, 2), "bias": (64,)}


def sharded(update, n, like, optimizer):
    """A jitted round over n workers that hold shards, and where its arguments lie."""
    mesh = jax.make_mesh((n,), ("w",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    state = jax.eval_shape(update.init, like)
    specs = psjax.ist.store_specs(NET, SIZES, "w")
    inner = psjax.ist.state_axes(optimizer, NET, like)
    inner = psjax.ist.store_specs(inner, SIZES, "w")
    own = state.inner if isinstance(state, psjax.OuterState) else state
    if isinstance(own, codec.CompressState):
        kept = None if own.residual is None else specs
        inner = codec.CompressState(inner, P(), kept, None, None, None, own.codec)
    if isinstance(state, psjax.OuterState):  # of `optax.sgd(1.0)`, which has none
        inner = psjax.OuterState(inner, P())
    specs = specs, inner

    round = over_owners(update, mesh, specs, NET, SIZES)

    place = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
    return round, lambda *trees: jax.device_put(trees, place)


def net(dtype):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def test_the_identity_between_owners_gives_the_bits_of_an_exchange_without_a_codec():
    params, batches = net(np.float32), jnp.asarray(targets_of(0, 2), jnp.float32)
    exchange = psjax.ist.exchange(psjax.local_update(quadratic, INNER), "w")
    found = []
    for update in (exchange, codec.compress(exchange, codec.identity())):
        round, place = sharded(update, 2, params, INNER)
        new, state, _ = round(*place(params, update.init(params)), 0, batches)
        found.append((new, getattr(state, "inner", state)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.usefixtures("x64")
def test_between_owners_what_was_delivered_and_what_is_kept_are_what_was_to_be_delivered():
    """In each of three rounds with other subnets: residuals travel with their entries."""
    n, params = 2, net(np.float64)
    exchange = psjax.ist.exchange(psjax.local_update(quadratic, optax.sgd(0.1)), "w")
    update = codec.compress(exchange, codec.error_feedback(codec.int4(4)))
    round, place = sharded(update, n, params, optax.sgd(0.1))
    exact, place_exact = sharded(exchange, n, params, optax.sgd(0.1))
    new, state = place(params, update.init(params))
    for number in range(3):
        batches = targets_of(number, n)
        if number == 1:
            batches[1] = np.nan
        old, residual = jax.tree.map(np.asarray, (new, state.residual))
        kept_exact = place_exact(old, exchange.init(params))
        expected, _, other = exact(*kept_exact, number, jnp.asarray(batches))
        new, state, metrics = round(new, state, number, jnp.asarray(batches))
        np.testing.assert_array_equal(metrics.finite, other.finite)
        draw = psjax.ist.membership(0, number, NET, SIZES, n, stratified=True)
        held = jax.tree.map(np.asarray, draw.counts(params, metrics.finite))
        for name in params:
            close(new[name] + state.residual[name], expected[name] + residual[name], atol=1e-11)
            out = held[name] == 0
            np.testing.assert_array_equal(new[name][out], old[name][out])
            np.testing.assert_array_equal(state.residual[name][out], residual[name][out])
    assert max(np.abs(x).max() for x in jax.tree.leaves(state.residual)) > 0
    assert {x.addressable_shards[0].data.shape for x in [state.residual["between"]]} == {(8, 16)}


@pytest.mark.usefixtures("x64")
def test_an_outer_optimizer_goes_around_a_codec_between_owners():
    """Gradient descent of rate 1 is the round itself; entries without a holder keep their bits."""
    params, inner = net(np.float64), optax.sgd(0.1)
    exchange = psjax.ist.exchange(psjax.local_update(quadratic, inner), "w")
    update = codec.compress(exchange, codec.int4(4))
    found = []
    for one in (update, psjax.outer(update, optax.sgd(1.0))):
        round, place = sharded(one, 2, params, inner)
        found.append(round(*place(params, one.init(params)), 0, jnp.asarray(targets_of(0, 2)))[0])
    jax.tree.map(close, *found)
    draw = psjax.ist.membership(0, 0, NET, SIZES, 2, stratified=True)
    out = np.asarray(draw.counts(params)["between"]) == 0
    assert out.any()
    np.testing.assert_array_equal(found[1]["between"][out], params["between"][out])


@pytest.mark.parametrize("n", [2, 4])
def test_between_owners_weights_are_fetched_whole_and_their_changes_return_packed(n):
    params, inner = net(np.float32), optax.sgd(0.1)
    exchange = psjax.ist.exchange(psjax.local_update(quadratic, inner), "w")
    own = codec.int4(8)
    update = codec.compress(exchange, own)
    round, place = sharded(update, n, params, inner)
    arguments = place(params, update.init(params))
    ledger = cost.ledger(round.lower(*arguments, 0, jnp.ones((n, J))).compile())
    subnet = 16 // n * 3 + (16 // n) ** 2 + 16 // n * 2  # entries of the divided leaves
    fetched = 4 * subnet * (n - 1) / n
    row = 8 * (-(-subnet // (n * 8)))
    shard = 64 // n  # of the shared bias
    packed = own.bytes((row,), jnp.float32) * (n - 1)
    bias = 2 * (n - 1) * own.bytes((shard,), jnp.float32)
    assert ledger.bytes_per_device == fetched + packed + bias


# ------------------------------------------------------------------------------ what is refused


def test_a_state_of_another_codec_is_refused_in_a_round_and_when_it_is_restored():
    params = start(np.float32)
    local = psjax.local_update(quadratic, INNER)
    one, two = (
        codec.compress(local, codec.error_feedback(own), "w") for own in (codec.int4(4), ALSO)
    )
    state = one.init(params)
    message = r"compress: the state was made for .*int4\(4\)\), but the codec is now .*int2\(4\)"
    with pytest.raises(ValueError, match=message):
        two(params, state, psjax.replicas(params, 1), jnp.ones((1, J)))
    saved = serialization.to_bytes(state)
    with pytest.raises(ValueError, match=message):
        serialization.from_bytes(two.init(params), saved)
    jax.tree.map(np.testing.assert_array_equal, serialization.from_bytes(state, saved), state)


ALSO = codec.int2(4)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda local: codec.compress(local, ALSO),
            ValueError,
            r"compress\(axis_name=None\): the workers' axis is compress's",
        ),
        (
            lambda local: codec.compress(
                psjax.local_update(quadratic, INNER, axis_name="w"), ALSO, "w"
            ),
            ValueError,
            "without axis_name",
        ),
        (
            lambda local: codec.compress(psjax.outer(local, INNER), ALSO, "w"),
            TypeError,
            "psjax.outer goes around compress",
        ),
        (lambda local: codec.compress(len, ALSO, "w"), TypeError, "pass what psjax.local_update"),
        (
            lambda local: codec.compress(psjax.ist.exchange(local, "w"), ALSO, "v"),
            ValueError,
            "whose workers are on axis 'w', pass neither",
        ),
    ],
)
def test_what_cannot_be_compressed_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(psjax.local_update(quadratic, INNER))


def test_a_state_of_the_inner_optimizer_alone_is_refused():
    params, local = start(np.float32), psjax.local_update(quadratic, INNER)
    update = codec.compress(local, ALSO, "w")
    with pytest.raises(TypeError, match=r"compress: the state is a tuple; pass compress\(update"):
        update(params, local.init(params), psjax.replicas(params, 1), jnp.ones((1, J)))
