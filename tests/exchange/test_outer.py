"""Theorems about an optimizer over rounds: what it equals, and what it leaves alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import psjax
from tests.over_devices import over_devices, over_owners

pytestmark = pytest.mark.usefixtures("x64")

close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)

# ------------------------------------------------------------------------------ a published trace

# Two replicas, y = x @ kernel + bias; inner SGD 0.1, three steps a round; outer SGD 1.0 with
# Nesterov momentum 0.9. tests/integration/diloco_test.py of AI-Hypercomputer/maxtext at e591f30 has
# the first four losses of replica 0; the rest continues the same rule in float64.
INPUTS = np.array([[[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
LABELS = np.array([[[1.0], [2.0]], [[2.0], [3.0]]])
PUBLISHED = [1.0, 0.49, 0.2401, 0.207545]
LOSSES = [
    [1.0, 0.49, 0.2401, 0.2075437250000001, 0.12290618605000007, 0.07740393741250008]
    + [0.3122445326157484, 0.23048990095453606, 0.17570701624570634]
    + [0.568376141364095, 0.41295092388908283, 0.31124771054839845],
    [1.0, 0.81, 0.6561, 0.9409437249999998, 0.6375041860499996, 0.45529487741249963]
    + [0.7985736526157476, 0.4738510129545353, 0.2990524341177059]
    + [0.5019890370020944, 0.28558191636802194, 0.17201704249229774],
]
AFTER = [  # kernel and bias after every round
    ([1.5344999999999998, 1.0494], 0.5839000000000001),
    ([1.2628198199999994, 1.2470078100000002], 0.5098276300000002),
    ([1.1468159207609991, 1.4431888157100001], 0.5900047364710004),
    ([1.1221209704111448, 1.5430013269660052], 0.6651222973771511),
]


def regression(params, batch):
    return jnp.mean((batch["x"] @ params["kernel"] + params["bias"] - batch["y"]) ** 2)


def by_vmap(inner):
    own = lambda params, state, selection, batches: inner(params, state, selection[:], batches)
    return jax.jit(
        jax.vmap(own, in_axes=(None, None, 0, 0), out_axes=(None, None, 0), axis_name="workers")
    )


@pytest.mark.parametrize("how", ["one device", "vmap", "pmap", "shard_map"])
def test_the_trace_of_maxtext_s_own_test_is_reproduced(how):
    """Four steps of it, as printed there; and twelve, where momentum matters."""
    params = {"kernel": jnp.array([[2.0], [1.0]]), "bias": jnp.array([1.0])}
    axis_name = None if how == "one device" else "workers"
    local = psjax.local_update(regression, optax.sgd(0.1), axis_name=axis_name)
    update = psjax.outer(local, optax.sgd(1.0, momentum=0.9, nesterov=True))
    selection = psjax.replicas(params, 2)
    batches = {"x": jnp.asarray(INPUTS), "y": jnp.asarray(LABELS)}
    batches = jax.tree.map(lambda x: jnp.stack([x] * 3, 1), batches)  # [replica, step, sample, ...]
    if axis_name is not None:
        selection, batches = selection.split(2), jax.tree.map(lambda x: x[:, None], batches)
    state, losses = update.init(params), []
    step = {"one device": jax.jit, "vmap": by_vmap}.get(how, lambda f: over_devices(f, how, 2))
    step = step(update)
    for kernel, bias in AFTER:
        params, state, metrics = step(params, state, selection, batches)
        losses.append(np.reshape(metrics.loss, (2, 3)))
        close(params["kernel"][:, 0], kernel)
        close(params["bias"], [bias])
    close(np.concatenate(losses, axis=1), LOSSES)
    np.testing.assert_allclose(np.concatenate(losses, axis=1)[0, :4], PUBLISHED, atol=2e-6)


# -------------------------------------------------------------------------------- against NumPy

H, N, J = 7, 3, 2  # rows, subnets, local steps
AXES = {"rows": P("h"), "shared": P()}


def quadratic(params, target):
    """The gradient of every entry is its distance from the target."""
    return 0.5 * sum(jnp.sum((x - target) ** 2) for x in jax.tree.leaves(params))


def start():
    rng = np.random.default_rng(0)
    return {"rows": rng.normal(size=(H, 2)), "shared": rng.normal(size=(2,))}


def local_round(params, rows_of, targets, lr, left_out=(), dropped=()):
    """New weights and which were held, in loops over entries."""
    new, held = {}, {}
    for name, w in params.items():
        new[name], held[name] = w.copy(), np.zeros(w.shape, bool)
        for index in np.ndindex(w.shape):
            found = []
            for e, rows in enumerate(rows_of):
                mine = name == "shared" or index[0] in rows
                if mine and e not in left_out and (name, index) not in dropped:
                    y = w[index]
                    for target in targets[e]:
                        y = y - lr * (y - target)
                    found.append(y)
            if found:
                new[name][index], held[name][index] = sum(found) / len(found), True
    return new, held


def momentum_step(params, trace, new, held, lr, decay):
    """Nesterov momentum, entry by entry."""
    for name, w in params.items():
        for index in np.ndindex(w.shape):
            if held[name][index]:
                g = w[index] - new[name][index]
                trace[name][index] = g + decay * trace[name][index]
                w[index] -= lr * (g + decay * trace[name][index])


ROWS = [  # of every round: some rows nobody holds, one is held twice
    [[0, 1], [2, 3], [4, 5]],
    [[6, 1], [1, 3], [0, 2]],
    [[5, 4], [3, 2], [1, 0]],
    [[0, 2], [4, 6], [1, 3]],
]


@pytest.mark.parametrize("case", ["all finite", "one becomes NaN", "some dropped"])
def test_rounds_over_subnets_are_those_of_plain_loops(case):
    """An entry nobody held keeps its bits and its moments: not selected, dropped, or NaN."""
    outer = optax.sgd(0.7, momentum=0.9, nesterov=True)
    update = psjax.outer(psjax.local_update(quadratic, optax.sgd(0.1)), outer)
    step = jax.jit(update)
    expected, params = start(), jax.tree.map(jnp.asarray, start())
    trace, state = jax.tree.map(np.zeros_like, expected), update.init(params)
    dropped = [("rows", (2, 1)), ("shared", (0,))] if case == "some dropped" else []
    for number, rows in enumerate(ROWS):
        targets = np.random.default_rng(number).normal(size=(N, J))
        bad = [1] if case == "one becomes NaN" and number != 1 else []
        new, held = local_round(expected, rows, targets, 0.1, bad, dropped)
        before = jax.tree.map(np.copy, (expected, trace))
        momentum_step(expected, trace, new, held, 0.7, 0.9)
        targets[bad] = np.nan
        selection = psjax.select(AXES, {"h": rows}, like=params)
        if dropped:
            keep = {"rows": np.ones((H, 2), bool), "shared": np.array([False, True])}
            keep["rows"][2, 1] = False
            selection = selection.drop(keep)
        old = jax.tree.map(np.asarray, (params, state.outer[0].trace))
        params, state, metrics = step(params, state, selection, jnp.asarray(targets))
        assert metrics.finite.tolist() == [e not in bad for e in range(N)]
        for mine, plain, was, plain_was in zip(
            (params, state.outer[0].trace), (expected, trace), old, before, strict=True
        ):
            for name in mine:
                close(mine[name], plain[name])
                out = ~held[name]
                np.testing.assert_array_equal(mine[name][out], was[name][out])
                np.testing.assert_array_equal(plain[name][out], plain_was[name][out])


def test_gradient_descent_of_rate_one_is_the_round_itself():
    local = psjax.local_update(quadratic, optax.sgd(0.1, momentum=0.9))
    update = psjax.outer(local, optax.sgd(1.0))
    params = jax.tree.map(jnp.asarray, start())
    selection = psjax.random_partition(jax.random.key(0), AXES, {"h": H}, num_elements=N)
    targets = jnp.asarray(np.random.default_rng(0).normal(size=(N, J)))
    plain, inner, _ = jax.jit(local)(params, local.init(params), selection, targets)
    new, state, _ = jax.jit(update)(params, update.init(params), selection, targets)
    for name in params:
        ulp = np.spacing(np.maximum(np.abs(params[name]), np.abs(plain[name])))
        assert (np.abs(new[name] - plain[name]) <= ulp).all()
    jax.tree.map(np.testing.assert_array_equal, state.inner, inner)


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.adafactor(0.1, 1)])
def test_a_round_in_which_nobody_takes_part_changes_no_bit(optimizer):
    """Not Adam's count either; and of replicas a state that is reduced over entries is well."""
    update = psjax.outer(psjax.local_update(quadratic, optax.sgd(0.1)), optimizer)
    params = jax.tree.map(jnp.asarray, start())
    selection, batches = psjax.replicas(params, N), jnp.ones((N, J))
    step = jax.jit(update)
    params, state, _ = step(params, update.init(params), selection, batches)
    after = step(params, state, selection, jnp.full((N, J), jnp.nan))[:2]
    jax.tree.map(np.testing.assert_array_equal, after, (params, state))


def test_what_is_overwritten_goes_past_the_outer_optimizer():
    """`mutable`: the statistic is its mean, the weight takes half of the step."""

    def loss_fn(variables, x):
        w = variables["params"]
        return 0.5 * (w - x) ** 2, {"seen": variables["seen"] + x}

    local = psjax.local_update(loss_fn, optax.sgd(0.5), mutable=("seen",))
    update = psjax.outer(local, optax.sgd(0.5, momentum=0.9))
    variables = {"params": jnp.array(0.0), "seen": jnp.array(0.0)}
    batches = jnp.array([[1.0], [3.0]])  # two replicas, one step
    state = update.init(variables)
    assert jax.tree.structure(state.outer) == jax.tree.structure(
        update.optimizer.init({"params": 0.0})
    )
    new, _, _ = jax.jit(update)(variables, state, psjax.replicas(variables, 2), batches)
    assert (float(new["params"]), float(new["seen"])) == (0.5, 2.0)


# ----------------------------------------------------------------------------- weights in shards

NET = {"in": P("h1", None), "between": P("h1", "h2"), "out": P("h2", None), "bias": P()}
SHARDED = {"h1": 8, "h2": 4}


def between_workers(n, update_of, params, rounds, targets):
    """Rounds of `update_of(local, axis)` over n workers, and of it on one device."""
    local = psjax.local_update(quadratic, optax.sgd(0.1, momentum=0.5))
    mesh = jax.make_mesh((n,), ("w",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    body = update_of(psjax.ist.exchange(local, "w"))
    alone = update_of(local)
    state = alone.init(params)
    of = lambda o: psjax.ist.state_axes(o, NET, params)
    axes = type(state)(of(local.optimizer), of(body.optimizer))
    specs = [psjax.ist.store_specs(tree, SHARDED, "w") for tree in (NET, axes)]

    sharded = over_owners(body, mesh, specs, NET, SHARDED)

    @jax.jit
    def whole(params, state, number, targets):
        draw = psjax.ist.membership(0, number, NET, SHARDED, n, stratified=True)
        return alone(params, state, draw, targets)

    place = jax.tree.map(lambda s: NamedSharding(mesh, s), tuple(specs))
    mine = jax.device_put((params, state), place)
    theirs = params, state
    for number in range(rounds):
        *mine, _ = sharded(*mine, number, targets[number])
        *theirs, _ = whole(*theirs, number, targets[number])
    return mine, theirs


def test_with_weights_in_shards_the_outer_state_lies_in_shards_and_the_numbers_are_the_same():
    """Adam; entries between divided layers often have no holder, and one subnet is NaN."""
    shapes = {"in": (8, 3), "between": (8, 4), "out": (4, 2), "bias": (2,)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    targets = rng.normal(size=(3, 2, J))
    targets[1, 1] = np.nan
    mine, theirs = between_workers(
        2, lambda local: psjax.outer(local, optax.adam(0.1)), params, 3, jnp.asarray(targets)
    )
    jax.tree.map(close, *map(list, (map(np.asarray, jax.tree.leaves(x)) for x in (mine, theirs))))
    for name, moment in zip(
        sorted(params), jax.tree.leaves(mine[1].outer)[-len(params) :], strict=True
    ):
        shape, shard = np.shape(moment), moment.addressable_shards[0].data.shape
        assert shard == ((shape[0] // 2, *shape[1:]) if name != "bias" else shape)


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.contrib.reduce_on_plateau(), "reduce_on_plateau needs value="),
        (optax.polyak_sgd(), "scale_by_polyak needs value="),
        (optax.chain(optax.adam(1.0), optax.lbfgs()), "scale_by_zoom_linesearch needs value="),
        (optax.contrib.sophia(0.1), "this optimizer needs obj_fn="),
    ],
)
def test_an_optimizer_that_needs_a_loss_is_refused_by_name(optimizer, message):
    with pytest.raises(ValueError, match=r"outer\(optimizer=...\): " + message):
        psjax.outer(psjax.local_update(quadratic, optax.sgd(0.1)), optimizer)


def test_an_optimizer_for_one_tree_that_needs_a_loss_is_refused_at_the_call():
    label = lambda params: {"rows": "a", "shared": "b"} if "rows" in params else params["none"]
    optimizer = optax.partition({"a": optax.polyak_sgd(), "b": optax.sgd(0.1)}, label)
    update = psjax.outer(psjax.local_update(quadratic, optax.sgd(0.1)), optimizer)
    params = jax.tree.map(jnp.asarray, start())
    with pytest.raises(ValueError, match="scale_by_polyak needs value="):
        update(params, update.init(params), psjax.replicas(params, 1), jnp.ones((1, J)))


def test_a_function_that_cannot_say_what_was_held_is_refused():
    with pytest.raises(TypeError, match=r"outer\(update=.*pass what psjax.local_update"):
        psjax.outer(lambda *args: args, optax.sgd(0.1))


def test_a_state_of_the_inner_optimizer_alone_is_refused():
    local = psjax.local_update(quadratic, optax.adam(0.1))
    update, params = psjax.outer(local, optax.sgd(0.1)), jax.tree.map(jnp.asarray, start())
    with pytest.raises(TypeError, match=r"outer: the state is a tuple; pass outer\(update, opt"):
        update(params, local.init(params), psjax.replicas(params, 1), jnp.ones((1, J)))


def test_a_state_reduced_over_entries_of_which_a_part_is_held_is_refused():
    update = psjax.outer(psjax.local_update(quadratic, optax.sgd(0.1)), optax.adafactor(0.1, 1))
    params = jax.tree.map(jnp.asarray, start())
    selection = psjax.select(AXES, {"h": [[0, 1]]}, like=params)
    with pytest.raises(ValueError, match=r"outer.*\['rows'\].* a round may hold a part"):
        update(params, update.init(params), selection, jnp.ones((1, J)))
