"""The NumPy reference of independent subnet training is what it says, each part by another way."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests import reference_ist as ref

SIZES = (4, 6, 5, 3)  # two hidden layers
OPTIMIZERS = {
    "sgd": (ref.Optimizer("sgd", 0.1), optax.sgd(0.1)),
    "momentum": (ref.Optimizer("momentum", 0.1), optax.sgd(0.1, momentum=0.9)),
    "adam": (ref.Optimizer("adam", 0.05), optax.adam(0.05)),
}
UNEQUAL = {0: [[5, 0, 2], [1], [4, 3]], 1: [[3], [0, 4], [2, 1]]}
named_optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def _params(seed=0, sizes=SIZES, **kwargs):
    return ref.init_params(np.random.default_rng(seed), sizes, **kwargs)


def _batch(seed, size=7):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, SIZES[0])), rng.integers(0, SIZES[-1], size)


def _batches(n, steps, seed=0):
    return [[_batch(100 * seed + 10 * s + j) for j in range(steps)] for s in range(n)]


def _warm(params, optimizer):
    """A state with moments of its own and a count above 0."""
    return ref.local_steps(
        params, ref.init_state(params, optimizer), _batches(1, 3, 9)[0], optimizer
    )


def _close(got, want, rtol=1e-10):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=1e-12)


def _same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _jax_loss(params, inputs, labels, masks=None, activation=jax.nn.relu, eps=1e-5):
    """The network once more, in jax.numpy and vectorised; `masks[l]` silences neurons."""
    a = inputs
    for depth, layer in enumerate(params[:-1]):
        z = a @ layer["kernel"]
        z = (z - z.mean(0)) / jnp.sqrt(z.var(0) + eps)
        z = z * layer.get("scale", 1.0) + layer.get("shift", 0.0)
        a = activation(z) * (1.0 if masks is None else masks[depth])
    out = a @ params[-1]["kernel"] + params[-1]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(out, labels).mean()


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize(("scale", "shift"), [(True, True), (False, False), (True, False)])
def test_gradients_equal_finite_differences(activation, scale, shift):
    params, batch, step = _params(scale=scale, shift=shift), _batch(1), 1e-6
    loss = lambda p: ref.value_and_grad(p, *batch, activation, 1e-3)[0]
    grads = ref.value_and_grad(params, *batch, activation, 1e-3)[1]
    for depth, layer in enumerate(params):
        for name, x in layer.items():
            for i in np.ndindex(x.shape):
                up, down = copy.deepcopy(params), copy.deepcopy(params)
                up[depth][name][i] += step
                down[depth][name][i] -= step
                slope = (loss(up) - loss(down)) / (2 * step)
                np.testing.assert_allclose(grads[depth][name][i], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_loss_and_gradients_equal_autodiff(x64, activation):
    params, batch = _params(), _batch(1)
    fn = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    want = jax.value_and_grad(lambda p: _jax_loss(p, *batch, activation=fn))(params)
    _close(ref.value_and_grad(params, *batch, activation), want)


@named_optimizers
def test_local_steps_are_those_of_optax(x64, name):
    optimizer, transform = OPTIMIZERS[name]
    (batches,) = _batches(1, 4)
    params = _params()
    got, state, losses = ref.local_steps(
        params, ref.init_state(params, optimizer), batches, optimizer
    )
    want, opt_state = params, transform.init(params)
    for inputs, labels in batches:
        loss, grads = jax.value_and_grad(_jax_loss)(want, inputs, labels)
        updates, opt_state = transform.update(grads, opt_state, want)
        want = optax.apply_updates(want, updates)
        _close(losses.pop(0), loss)
    _close(got, want)
    moments = {"sgd": (), "momentum": ("trace",), "adam": ("mu", "nu")}[name]
    for moment in moments:
        _close(state[moment], optax.tree_utils.tree_get(opt_state, moment))
    if name == "adam":
        assert state["count"] == optax.tree_utils.tree_get(opt_state, "count")


def test_a_round_of_sgd_is_the_masked_whole_network(x64):
    """Equation (2) without its factor: others' neurons silenced, the whole network differentiated.

    Then W + sum_s (W_s - W) with the gradient of each subnet, the output bias divided by n.
    """
    optimizer, params, batches = OPTIMIZERS["sgd"][0], _params(), _batches(3, 4)
    got, state, _ = ref.ist_round(
        params, ref.init_state(params, optimizer), UNEQUAL, batches, optimizer
    )
    total = jax.tree.map(np.zeros_like, params)
    for s in range(3):
        masks = [np.isin(np.arange(SIZES[d + 1]), UNEQUAL[d][s]).astype(float) for d in (0, 1)]
        mine = params
        for inputs, labels in batches[s]:
            grads = jax.grad(_jax_loss)(mine, inputs, labels, masks)
            mine = jax.tree.map(lambda x, g: x - 0.1 * g, mine, grads)
        total = jax.tree.map(lambda t, x, y: t + y - x, total, params, mine)
    total[-1]["bias"] = total[-1]["bias"] / 3
    _close(got, jax.tree.map(np.add, params, total))
    assert state == {"count": 4}


@named_optimizers
def test_what_nobody_holds_is_untouched_and_everything_else_moves(name):
    optimizer = OPTIMIZERS[name][0]
    params, state, _ = _warm(_params(), optimizer)
    before = copy.deepcopy((params, state))
    got, new_state, losses = ref.ist_round(params, state, UNEQUAL, _batches(3, 2), optimizer)
    _same((params, state), before)  # the arguments themselves are left alone
    owner = lambda depth, i: next(s for s, own in enumerate(UNEQUAL[depth]) if i in own)
    nobodys = np.array([[owner(0, i) != owner(1, k) for k in range(5)] for i in range(6)])
    for new, old in [(got, params), *((new_state[m], state[m]) for m in optimizer.moments)]:
        moved = new[1]["kernel"] != old[1]["kernel"]
        assert not moved[nobodys].any()
        assert moved[~nobodys].any()
        for depth in (0, 2):  # inputs, outputs: every entry has its one holder
            assert (new[depth]["kernel"] != old[depth]["kernel"]).mean() > 0.5
    assert new_state["count"] == state["count"] + 2
    assert np.shape(losses) == (3, 2)


@named_optimizers
def test_every_subnet_trains_by_itself(name):
    """Cut out by slices, trained on its own; the output bias and its moments averaged."""
    optimizer, batches = OPTIMIZERS[name][0], _batches(3, 3)
    params, state, _ = _warm(_params(), optimizer)
    got, new_state, losses = ref.ist_round(params, state, UNEQUAL, batches, optimizer)
    biases = []
    for s in range(3):
        first, second = (np.array(UNEQUAL[d][s]) for d in (0, 1))

        def cut(tree, first=first, second=second):
            vectors = lambda layer, own: {k: x[own] for k, x in layer.items() if k != "kernel"}
            return [
                {"kernel": tree[0]["kernel"][:, first], **vectors(tree[0], first)},
                {"kernel": tree[1]["kernel"][np.ix_(first, second)], **vectors(tree[1], second)},
                {"kernel": tree[2]["kernel"][second], "bias": tree[2]["bias"]},
            ]

        moments = {m: cut(state[m]) for m in optimizer.moments}
        mine, my_state, my_losses = ref.local_steps(
            cut(params), {"count": state["count"], **moments}, batches[s], optimizer
        )
        ends = [(cut(got), mine), *((cut(new_state[m]), my_state[m]) for m in optimizer.moments)]
        biases.append([end[-1].pop("bias") for _, end in ends])
        for new, end in ends:
            new[-1].pop("bias")
            _same(new, end)
        assert losses[s] == my_losses
    wanted = [np.mean(each, axis=0) for each in zip(*biases)]
    _close([got[-1]["bias"], *(new_state[m][-1]["bias"] for m in optimizer.moments)], wanted)


@named_optimizers
def test_one_subnet_is_plain_training(name):
    optimizer, batches = OPTIMIZERS[name][0], _batches(1, 3)
    params, state, _ = _warm(_params(), optimizer)
    whole = {0: [list(range(6))], 1: [list(range(5))]}
    got = ref.ist_round(params, state, whole, batches, optimizer)
    want = ref.local_steps(params, state, batches[0], optimizer)
    _same(got, (*want[:2], [want[2]]))


@named_optimizers
def test_no_layer_split_is_local_sgd(name):
    optimizer, batches = OPTIMIZERS[name][0], _batches(3, 2)
    params, state, _ = _warm(_params(), optimizer)
    got = ref.ist_round(params, state, {}, batches, optimizer)
    _same(got, ref.local_sgd_round(params, state, batches, optimizer))


@pytest.mark.parametrize("name", ["sgd", "momentum"])
def test_local_sgd_of_one_step_is_data_parallel(name):
    """Where a step is linear in the gradient; the mean of Adam's steps is not Adam of the mean."""
    optimizer, batches = OPTIMIZERS[name][0], _batches(3, 1)
    params, state, _ = _warm(_params(), optimizer)
    got = ref.local_sgd_round(params, state, batches, optimizer)
    want = ref.data_parallel_step(params, state, [own[0] for own in batches], optimizer)
    _close(got[:2], want[:2])


def test_data_parallel_adam_is_adam_of_the_mean_gradient(x64):
    optimizer, transform = OPTIMIZERS["adam"]
    params, batches = _params(), [_batch(s) for s in range(3)]
    got, _, losses = ref.data_parallel_step(
        params, ref.init_state(params, optimizer), batches, optimizer
    )
    loss = lambda p: sum(_jax_loss(p, *batch) for batch in batches) / 3
    value, grads = jax.value_and_grad(loss)(params)
    want = optax.apply_updates(params, transform.update(grads, transform.init(params))[0])
    _close(got, want)
    _close(np.mean(losses), value)


def test_a_partition_has_one_owner_a_neuron():
    optimizer, params = OPTIMIZERS["sgd"][0], _params()
    state, batches = ref.init_state(params, optimizer), _batches(2, 1)
    for partition in ({0: [[0, 1], [1]]}, {1: [[5], [0]]}, {2: [[0], [1]]}, {0: [[0]]}):
        with pytest.raises(ValueError, match="layer"):
            ref.ist_round(params, state, partition, batches, optimizer)
