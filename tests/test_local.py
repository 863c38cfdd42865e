"""Theorems about a round of local training: what it equals, and what it refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from tests import bits
from tests import reference_ist as ref
from tests.over_devices import divided, over_devices

pytestmark = pytest.mark.usefixtures("x64")

N, J, B = 3, 2, 6  # subnets, local steps, samples a batch
WIDTHS = (4, 7, 8, 3)  # input, two hidden layers, classes
AXES = [
    {"kernel": P(None, "h1"), "scale": P("h1"), "shift": P("h1")},
    {"kernel": P("h1", "h2"), "scale": P("h2"), "shift": P("h2")},
    {"kernel": P("h2", None), "bias": P()},
]
SIZES = {"h1": 7, "h2": 8}
OPTIMIZERS = {
    "sgd": (ref.Optimizer("sgd", 0.1), optax.sgd(0.1)),
    "momentum": (ref.Optimizer("momentum", 0.1), optax.sgd(0.1, momentum=0.9)),
    "adam": (ref.Optimizer("adam", 0.03), optax.adam(0.03)),
}
each_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def init(seed=0, widths=WIDTHS):
    params = ref.init_params(np.random.default_rng(seed), widths)
    return jax.tree.map(jnp.asarray, params)


def forward(params, x):
    *hidden, last = params
    for layer in hidden:
        z = x @ layer["kernel"]
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)
        x = jnp.tanh(layer["scale"] * z + layer["shift"])
    return x @ last["kernel"] + last["bias"]


def loss_fn(params, batch):
    scores = forward(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"]).mean()


def make_batches(seed=0, n=N, steps=J):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, steps, B, WIDTHS[0]))
    return {"x": jnp.asarray(x), "y": jnp.asarray(rng.integers(0, WIDTHS[-1], (n, steps, B)))}


def as_lists(batches):
    n, steps = batches["y"].shape[:2]
    cut = lambda e, j: (np.asarray(batches["x"][e, j]), np.asarray(batches["y"][e, j]))
    return [[cut(e, j) for j in range(steps)] for e in range(n)]


def draw(round, n=N, **options):
    return psjax.ist.membership(0, round, AXES, SIZES, n, **options)


def lists(selection):
    """The reference's form of a partition: neurons of each subnet, without padding."""
    own = lambda name: [[int(i) for i in row if i < SIZES[name]] for row in selection.indices[name]]
    return {0: own("h1"), 1: own("h2")}


def close(a, b, tolerance=1e-12):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), a, b
    )


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def moments_of(state):
    """The state's trees like the parameters, in the reference's names."""
    found = {}
    for part in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "_fields")):
        for field in ("trace", "mu", "nu"):
            if hasattr(part, field):
                found[field] = getattr(part, field)
    return found


# ------------------------------------------------------------------------ what a round equals


@each_optimizer
@pytest.mark.parametrize("chunk_size", [1, 2, N])
def test_three_rounds_are_those_of_plain_loops_with_uneven_shares(name, chunk_size):
    """7 and 8 neurons among 3 subnets; weights, moments and losses."""
    plain, optimizer = OPTIMIZERS[name]
    params = init()
    state = optimizer.init(params)
    expected = jax.tree.map(np.asarray, params)
    expected_state = ref.init_state(expected, plain)
    update = jax.jit(psjax.local_update(loss_fn, optimizer, chunk_size=chunk_size))
    for round in range(3):
        selection, batches = draw(round), make_batches(round)
        params, state, metrics = update(params, state, selection, batches)
        expected, expected_state, losses = ref.ist_round(
            expected, expected_state, lists(selection), as_lists(batches), plain, "tanh"
        )
        np.testing.assert_allclose(metrics.loss, losses, rtol=1e-12)
    close(params, expected, 1e-10)
    for field, moment in moments_of(state).items():
        close(moment, expected_state[field], 1e-10)


@each_optimizer
def test_three_rounds_are_those_of_plain_loops_with_even_shares(name):
    plain, optimizer = OPTIMIZERS[name]
    params = init(widths=(4, 6, 9, 3))
    state = optimizer.init(params)
    expected = jax.tree.map(np.asarray, params)
    expected_state = ref.init_state(expected, plain)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    for round in range(3):
        selection = psjax.ist.membership(0, round, AXES, {"h1": 6, "h2": 9}, N)
        batches = make_batches(round)
        params, state, _ = update(params, state, selection, batches)
        partition = {
            k: np.asarray(selection.indices[a]).tolist() for k, a in enumerate(("h1", "h2"))
        }
        expected, expected_state, _ = ref.ist_round(
            expected, expected_state, partition, as_lists(batches), plain, "tanh"
        )
    close(params, expected, 1e-10)
    for field, moment in moments_of(state).items():
        close(moment, expected_state[field], 1e-10)


@each_optimizer
def test_neurons_that_nobody_holds_sit_out(name):
    plain, optimizer = OPTIMIZERS[name]
    params = init()
    selection = psjax.select(
        AXES,
        {"h1": [[0, 3], [1, 4], [2, 6]], "h2": [[1, 2], [3, 4], [5, 6]]},  # row 5 and 0, 7: nobody
        like=params,
    )
    batches = make_batches()
    update = psjax.local_update(loss_fn, optimizer)
    new, _, _ = update(params, optimizer.init(params), selection, batches)
    start = jax.tree.map(np.asarray, params)
    partition = {0: selection.indices["h1"].tolist(), 1: selection.indices["h2"].tolist()}
    expected, _, _ = ref.ist_round(
        start, ref.init_state(start, plain), partition, as_lists(batches), plain, "tanh"
    )
    close(new, expected)


@each_optimizer
def test_one_subnet_is_plain_training_bit_for_bit(name):
    _, optimizer = OPTIMIZERS[name]
    params, batches = init(), make_batches(n=1)
    update = bits.jit(psjax.local_update(loss_fn, optimizer))
    new, state, _ = update(params, optimizer.init(params), draw(0, n=1), batches)

    @bits.jit
    def train(params, state, batches):
        def step(carry, batch):
            params, state = carry
            grads = jax.grad(loss_fn)(params, batch)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), batches)[0]

    own = jax.tree.map(lambda x: x[0], batches)
    same_bits((new, state), train(params, optimizer.init(params), own))


@each_optimizer
def test_replicas_are_local_sgd(name):
    plain, optimizer = OPTIMIZERS[name]
    params, batches = init(), make_batches()
    update = psjax.local_update(loss_fn, optimizer)
    state = optimizer.init(params)
    new, state, metrics = update(params, state, psjax.replicas(params, N), batches)
    start = jax.tree.map(np.asarray, params)
    expected, expected_state, losses = ref.local_sgd_round(
        start, ref.init_state(start, plain), as_lists(batches), plain, "tanh"
    )
    close(new, expected)
    np.testing.assert_allclose(metrics.loss, losses, rtol=1e-12)
    for field, moment in moments_of(state).items():
        close(moment, expected_state[field])
    baseline = psjax.baselines.local_sgd(loss_fn, optimizer)
    arguments = params, optimizer.init(params), psjax.replicas(params, N), batches
    same_bits(baseline(*arguments)[:2], (new, state))


def test_one_step_of_sgd_on_a_partition_is_one_of_the_summed_loss():
    """Nothing shared (the bias is taken out), J = 1."""
    params = init()
    last = {"kernel": params[-1]["kernel"]}
    params, axes = [*params[:-1], last], [*AXES[:-1], {"kernel": AXES[-1]["kernel"]}]

    def loss(params, batch):
        return loss_fn([*params[:-1], {**params[-1], "bias": jnp.zeros(WIDTHS[-1])}], batch)

    selection = psjax.ist.membership(0, 0, axes, SIZES, N)
    batches = make_batches(steps=1)
    optimizer = optax.sgd(0.1)
    new, _, _ = psjax.local_update(loss, optimizer)(
        params, optimizer.init(params), selection, batches
    )
    first = jax.tree.map(lambda x: x[:, 0], batches)

    _, grads = psjax.value_and_grad(loss, in_axes=0)(params, selection, first)
    close(new, jax.tree.map(lambda w, g: w - 0.1 * g, params, grads))


@pytest.mark.parametrize(("n", "name"), [(N, "sgd"), (N, "momentum"), (2, "adamw")])
def test_what_nobody_held_keeps_its_bits_and_what_one_held_moves(n, name):
    """Weights and moments, which are not zero before the round; the bits of -0 are those of -0."""
    optimizer = (OPTIMIZERS | {"adamw": (None, optax.adamw(0.1, weight_decay=0.1))})[name][1]
    selection, rng = draw(0, n=n), np.random.default_rng(0)
    held = jax.tree.map(lambda c: np.asarray(c) > 0, selection.counts(init()))
    assert not held[1]["kernel"].all()
    assert held[1]["kernel"].any()
    signed = lambda x, h: np.where(h | (rng.random(x.shape) < 0.5), x, -0.0)
    params = jax.tree.map(signed, init(), held)
    noise = lambda x: rng.random(x.shape) if x.ndim else x
    state = jax.tree.map(noise, optimizer.init(params))
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    new, new_state, _ = update(params, state, selection, make_batches(n=n))
    old, new = ({"params": p, **moments_of(s)} for p, s in ((params, state), (new, new_state)))
    assert set(old) - {"params"} == {"sgd": set(), "momentum": {"trace"}}.get(name, {"mu", "nu"})
    bits = lambda x: np.asarray(x).view(np.uint64)
    for (path, w), v, h in zip(
        jax.tree_util.tree_leaves_with_path(old),
        jax.tree.leaves(new),
        jax.tree.leaves(dict.fromkeys(old, held)),
        strict=True,
    ):
        np.testing.assert_array_equal(bits(w)[~h], bits(v)[~h], jax.tree_util.keystr(path))
        assert np.all(w[h] != np.asarray(v)[h]), path


def test_a_padded_slot_stays_zero_even_where_its_gradient_is_nan():
    """A neuron that is not there gives no gradient, and no weight, whatever its own would be."""
    params = {"w": jnp.array([1.0, 4.0, 9.0])}
    selection = psjax.select({"w": P("i")}, {"i": [[0, 1], [2]]}, like=params)
    loss = lambda p, x: jnp.sum(jnp.sqrt(p["w"])) * x  # the derivative at 0 is inf, times 0: NaN
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))
    update = psjax.local_update(loss, optimizer)
    new, _, metrics = update(params, optimizer.init(params), selection, jnp.ones((2, 3)))
    assert metrics.finite.all()
    assert np.isfinite(new["w"]).all()
    assert (new["w"] < params["w"]).all()


def test_a_batch_may_be_the_same_for_all_or_be_picked_by_the_selection():
    params, batches = init(), make_batches()
    optimizer = optax.sgd(0.1)
    state, selection = optimizer.init(params), draw(0)
    one = jax.tree.map(lambda x: x[1], batches)
    same = jax.tree.map(lambda x: jnp.broadcast_to(x, (N, *x.shape)), one)
    by_row = psjax.local_update(loss_fn, optimizer)(params, state, selection, same)
    whole = psjax.local_update(loss_fn, optimizer, in_axes=None)(params, state, selection, one)
    same_bits(by_row, whole)
    rows = np.array([2, 0, 1])
    picked = psjax.select(
        AXES,
        {
            **jax.tree.map(
                np.asarray,
                dict(psjax.select(AXES, {"h1": [[0, 1], [2, 3], [4, 5]]}, like=params).indices),
            ),
            "shard": rows,
        },
        like=params,
    )
    by_name = psjax.local_update(loss_fn, optimizer, in_axes=P("shard"))
    by_hand = psjax.select(AXES, {"h1": picked.indices["h1"]}, like=params)
    a = by_name(params, state, picked, batches)
    b = psjax.local_update(loss_fn, optimizer)(
        params, state, by_hand, jax.tree.map(lambda x: x[rows], batches)
    )
    same_bits(a, b)


# --------------------------------------------------------------------------- state that travels

CHAINS = {
    "clip, adamw, schedule": optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(optax.cosine_decay_schedule(0.05, 20))
    ),
    "nesterov": optax.sgd(optax.linear_schedule(0.1, 0.01, 7), momentum=0.9, nesterov=True),
    "masked": optax.chain(
        optax.masked(
            optax.add_decayed_weights(0.1),
            [{"kernel": True, "scale": False, "shift": False}] * 2
            + [{"kernel": True, "bias": False}],
        ),
        optax.adam(0.05),
    ),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "rmsprop": optax.rmsprop(0.05, momentum=0.9),
    "lion": optax.lion(0.01),
    "if finite": optax.apply_if_finite(optax.adam(0.05), 3),
    "count an entry": optax.chain(psjax.ist.scale_by_adam(), optax.scale_by_learning_rate(0.05)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_travels(name):
    """Every subnet alone, from its own slices of weights and state, ends where the round ends."""
    optimizer = CHAINS[name]
    params = init()
    state = optimizer.init(params)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    selection = psjax.select(
        AXES, {"h1": [[0, 3], [1, 4], [2, 6]], "h2": [[1, 2], [3, 4], [5, 6]]}, like=params
    )
    for round in range(2):  # the second begins with moments
        batches = make_batches(round)
        before = params, state
        params, state, _ = update(params, state, selection, batches)
    slices = selection.gather(before[0])
    old_leaves, treedef = jax.tree.flatten(before[1])
    for e in range(N):
        own = jax.tree.map(lambda x, e=e: x[e], slices)
        shaped = jax.tree.leaves(optimizer.init(own))
        own_state = treedef.unflatten(
            [
                x if x.shape == s.shape else gather_like(x, s.shape, selection, e)
                for x, s in zip(map(jnp.asarray, old_leaves), shaped, strict=True)
            ]
        )
        for j in range(J):
            batch = jax.tree.map(lambda x, e=e, j=j: x[e, j], batches)
            grads = jax.grad(loss_fn)(own, batch)
            updates, own_state = optimizer.update(grads, own_state, own)
            own = optax.apply_updates(own, updates)
        got = jax.tree.map(lambda x, e=e: x[e], selection.gather(params))
        close([layer["kernel"] for layer in got], [layer["kernel"] for layer in own], 1e-10)
        close(got[:-1], own[:-1], 1e-10)
        compared = 0
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(own_state), strict=True):
            x, y = jnp.asarray(x), jnp.asarray(y)
            if x.shape != y.shape:  # a moment, a count an entry
                close(gather_like(x, y.shape, selection, e), y, 1e-10)
                compared += 1
            elif jnp.issubdtype(x.dtype, jnp.integer) and x.ndim == 0:
                assert x == y
        assert compared


def gather_like(x, shape, selection, e):
    """The entries of a moment that element e holds, by the shapes alone (7 and 8 tell the axes)."""
    rows = {7: selection.indices["h1"][e], 8: selection.indices["h2"][e]}
    index = [rows[n] if n != m else np.arange(n) for n, m in zip(x.shape, shape, strict=True)]
    return x[np.ix_(*index)]


def test_a_state_that_cannot_travel_is_refused_by_name():
    params = {"w": jnp.ones((256, 256))}  # large enough for factored moments
    selection = psjax.select(
        {"w": P("i", None)}, {"i": np.arange(256).reshape(2, 128)}, like=params
    )
    optimizer = optax.adafactor(0.1)
    update = psjax.local_update(lambda p, x: jnp.sum(p["w"]) * x, optimizer)
    with pytest.raises(
        ValueError, match=r"state \[0\]\.v_col.*, of shape \(256,\), is reduced over axis 'i'"
    ):
        update(params, optimizer.init(params), selection, jnp.ones((2, 1)))


def test_counts_per_entry_are_the_steps_that_the_entry_took():
    params = init()
    optimizer = psjax.ist.scale_by_adam()
    state = optimizer.init(params)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    held = jax.tree.map(jnp.zeros_like, params)
    for round in range(4):
        selection = draw(round)
        params, state, _ = update(params, state, selection, make_batches(round))
        held = jax.tree.map(lambda h, c: h + (c > 0), held, selection.counts(params))
    same_bits(state.count, jax.tree.map(lambda h: (J * h).astype(jnp.int32), held))
    assert len(np.unique(state.count[1]["kernel"])) > 2


def test_with_a_count_per_entry_the_first_steps_are_those_of_adam_from_the_start():
    """Entries first held in a late round: |step| = learning rate with it, several without."""
    size, late = 8, 20
    params = {"w": jnp.zeros(size)}
    selections = [
        psjax.select({"w": P("i")}, {"i": [np.arange(4) + 4 * (r == late)]}, like=params)
        for r in range(late + 1)
    ]
    loss = lambda p, x: jnp.sum(p["w"]) * x

    def first_step(optimizer):
        p, state = params, optimizer.init(params)
        update = jax.jit(psjax.local_update(loss, optimizer))
        for selection in selections:
            p, state, _ = update(p, state, selection, jnp.ones((1, 1)))
        return -float(p["w"][-1])

    per_entry = optax.chain(psjax.ist.scale_by_adam(), optax.scale_by_learning_rate(1.0))
    assert first_step(per_entry) == pytest.approx(1.0, rel=1e-6)
    common = (1 - 0.9) / (1 - 0.9 ** (late + 1))
    common /= np.sqrt((1 - 0.999) / (1 - 0.999 ** (late + 1)))
    assert first_step(optax.adam(1.0)) == pytest.approx(common, rel=1e-6)


def test_with_one_count_an_entry_held_late_takes_steps_of_up_to_six_and_a_half_learning_rates():
    """What the docstring of `scale_by_adam` says, by optax's Adam and local steps: 3.2 to 6.6."""
    optimizer = optax.adam(1.0)
    params = {"w": jnp.zeros(2)}
    early, late = (psjax.select({"w": P("i")}, {"i": [[i]]}, like=params) for i in (0, 1))
    update = jax.jit(psjax.local_update(lambda p, x: jnp.sum(p["w"]) * x, optimizer))
    state = optimizer.init(params)
    params, state, _ = update(params, state, early, jnp.ones((1, 20_000)))
    steps = []
    for _ in range(15):
        before = params["w"][1]
        params, state, _ = update(params, state, late, jnp.ones((1, 1)))
        steps.append(float(before - params["w"][1]))
    k = np.arange(1, 16)
    np.testing.assert_allclose(steps, (1 - 0.9**k) / np.sqrt(1 - 0.999**k), rtol=1e-3)
    assert steps[0] == pytest.approx(3.16, abs=0.01)
    assert max(steps) == pytest.approx(6.57, abs=0.02)


# ------------------------------------------------------------ keys, collections, devices, traces


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train):
        x = psjax.nn.SubnetDense(self.width, None, "h")(x)
        x = nn.relu(psjax.nn.SubnetNorm("h")(x, train))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return psjax.nn.SubnetDense(3, "h", None)(x)


def test_dropout_keys_and_mutable_collections_have_their_place():
    """Keys are leaves of the batches; running statistics are overwritten and travel."""
    whole, small = Net(6), Net(3)
    x = jax.random.normal(jax.random.key(1), (2, J, B, 4))
    variables = whole.init(jax.random.key(0), x[0, 0], train=False)
    axes, variables = nn.get_partition_spec(variables), nn.unbox(variables)

    def loss(variables, batch):
        scores, new = small.apply(
            variables,
            batch["x"],
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": batch["key"]},
        )
        return jnp.mean(scores**2), new

    optimizer = optax.sgd(0.1)
    update = jax.jit(psjax.local_update(loss, optimizer, mutable=("batch_stats",)))
    selection = psjax.ist.membership(0, 0, axes, {"h": 6}, 2)
    keys = jax.random.split(jax.random.key(3), (2, J))
    state = optimizer.init({"params": variables["params"]})
    new, _, metrics = update(variables, state, selection, {"x": x, "key": keys})
    other, _, _ = update(variables, state, selection, {"x": x, "key": keys[::-1]})
    assert not np.array_equal(
        new["params"]["SubnetDense_1"]["kernel"], other["params"]["SubnetDense_1"]["kernel"]
    )

    def alone(own, e):  # a subnet's steps of SGD, its statistics overwritten after each
        for j in range(J):
            batch = {"x": x[e, j], "key": keys[e, j]}
            (_, moved), grads = jax.value_and_grad(loss, has_aux=True)(own, batch)
            weights = jax.tree.map(lambda w, g: w - 0.1 * g, own["params"], grads["params"])
            own = {"params": weights, **moved}
        return own

    for e in range(2):
        expected = alone(jax.tree.map(lambda v, e=e: v[e], selection.gather(variables)), e)
        got = jax.tree.map(lambda v, e=e: v[e], selection.gather(new))
        del got["params"]["SubnetDense_1"]["bias"]  # shared: the mean of two
        del expected["params"]["SubnetDense_1"]["bias"]
        close(got, expected)
    assert np.isfinite(metrics.loss).all()


@pytest.mark.parametrize("wrapper", ["pmap", "shard_map", "shard_map, check_vma=False"])
@pytest.mark.parametrize(("n", "devices"), [(4, 2), (3, 2), (2, 4)])
def test_a_round_over_devices_is_the_round_on_one(wrapper, n, devices):
    optimizer = optax.adam(0.05)
    params, selection, batches = init(), draw(0, n=n), make_batches(n=n)
    state = optimizer.init(params)
    expected = psjax.local_update(loss_fn, optimizer)(params, state, selection, batches)
    inner = psjax.local_update(loss_fn, optimizer, axis_name="workers")
    run = over_devices(inner, wrapper, devices)
    parts = selection.split(devices), divided(batches, devices)
    new, new_state, metrics = run(params, state, *parts)
    close(new, expected[0])
    close(new_state, expected[1])
    flat = np.asarray(metrics.loss).reshape(-1, J)[:n]
    np.testing.assert_allclose(flat, expected[2].loss, rtol=1e-12)


@pytest.mark.parametrize(
    ("wrapper", "devices", "name"), [("pmap", 2, "nesterov"), ("shard_map", 3, "if finite")]
)
def test_a_subnet_that_becomes_nan_is_left_out_over_devices_as_it_is_on_one(wrapper, devices, name):
    """Whichever of 3: alone on its device, beside a good one, beside padding; so are its counts."""
    optimizer = CHAINS[name]
    params, selection, parts = init(), draw(0), draw(0).split(devices)
    state = optimizer.init(params)
    alone = jax.jit(psjax.local_update(loss_fn, optimizer))
    inner = psjax.local_update(loss_fn, optimizer, axis_name="workers")
    run = over_devices(inner, wrapper, devices)
    for bad in range(N):
        batches = make_batches()
        batches["x"] = batches["x"].at[bad, 1].set(jnp.nan)
        expected = alone(params, state, selection, batches)
        *new, metrics = run(params, state, parts, divided(batches, devices))
        close(tuple(new), expected[:2])
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(new))
        finite = np.asarray(metrics.finite).ravel()[:N].tolist()
        assert finite == expected[2].finite.tolist() == [e != bad for e in range(N)]
        assert f"subnets [{bad}] " in psjax.ist.non_finite(parts, metrics)


def test_a_hundred_rounds_are_one_trace():
    traces = []

    def counting(params, batch):
        traces.append(1)
        return loss_fn(params, batch)

    optimizer = optax.adam(0.01)
    update = psjax.local_update(counting, optimizer)

    @jax.jit
    def round(params, state, number, batches):
        selection = psjax.ist.membership(0, number, AXES, SIZES, N)
        return update(params, state, selection, batches)[:2]

    params = init()
    state, batches = optimizer.init(params), make_batches()
    params, state = round(params, state, 0, batches)
    once = len(traces)
    for number in range(1, 100):
        params, state = round(params, state, number, batches)
    assert len(traces) == once
    assert round._cache_size() == 1


# ------------------------------------------------------------------------------------ bad input


def test_a_subnet_that_becomes_nan_is_left_out_and_named():
    params, selection, batches = init(), draw(0), make_batches()
    optimizer = optax.adam(0.05)
    state = optimizer.init(params)
    update = psjax.local_update(loss_fn, optimizer)
    bad = {**batches, "x": batches["x"].at[1, 1].set(jnp.nan)}
    new, new_state, metrics = update(params, state, selection, bad)
    assert metrics.finite.tolist() == [True, False, True]
    assert "subnets [1]" in psjax.ist.non_finite(selection, metrics)
    assert psjax.ist.non_finite(selection, update(params, state, selection, batches)[2]) is None
    by_device = metrics._replace(finite=jnp.array([[True, True], [False, False]]))  # one is padding
    assert "subnets [2] " in psjax.ist.non_finite(selection.split(2), by_device)
    with pytest.raises(ValueError, match=r"shape \(2, 2\) but the selection \(3,\)"):
        psjax.ist.non_finite(selection, by_device)
    # The others, and what all share, are as if subnet 1 had not been there.
    without = dataclasses.replace(selection, valid=np.array([True, False, True]))
    expected = update(params, state, without, batches)
    same_bits((new, new_state), expected[:2])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((new, new_state)))


def test_if_all_subnets_become_nan_nothing_changes():
    params, batches = init(), make_batches()
    optimizer = optax.adam(0.05)
    state = optimizer.init(params)
    bad = {**batches, "x": batches["x"] * jnp.nan}
    new = psjax.local_update(loss_fn, optimizer)(params, state, draw(0), bad)
    assert not new[2].finite.any()
    same_bits(new[:2], (params, state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: jax.tree.map(lambda x: x[:2], b), r"dimension 0 must be .* of size 3"),
        (lambda b: jax.tree.map(lambda x: x[:, :0], b), "J = 0 local steps"),
        (lambda b: {**b, "y": b["y"][:, :1]}, "all must begin with J"),
        (lambda b: {**b, "k": jnp.zeros(N)}, "all must begin with J"),
        (lambda b: {}, "has no array"),
    ],
)
def test_batches_of_another_shape_are_refused(change, message):
    params, optimizer = init(), optax.sgd(0.1)
    update = psjax.local_update(loss_fn, optimizer)
    with pytest.raises(ValueError, match=message):
        update(params, optimizer.init(params), draw(0), change(make_batches()))


def test_a_mutable_entry_that_is_not_there_is_refused():
    optimizer = optax.sgd(0.1)
    update = psjax.local_update(loss_fn, optimizer, mutable=("batch_stats",))
    with pytest.raises(ValueError, match="have no \\['batch_stats'\\]"):
        update(init(), optimizer.init(init()), draw(0), make_batches())
