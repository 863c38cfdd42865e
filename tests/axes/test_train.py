"""Networks without annotations are trained by independent subnets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import psjax
from tests.axes.registry import CASES

nll = optax.softmax_cross_entropy_with_integer_labels


def losses(apply, params, inputs, labels, rounds):
    """Of the whole network, before and after rounds of two subnets with 4 local steps of Adam.

    All divisible axes are divided; one of the subnets has a row more of those of odd sizes.
    """
    axes = psjax.infer_axes(apply, params, *inputs)
    divided = axes.divisible
    small = psjax.narrow(apply, axes, axes.shares(2))
    optimizer = optax.adam(1e-2)
    update = psjax.local_update(lambda w, b: nll(small(w, b[0]), b[1]).mean(), optimizer)
    state = params, optimizer.init(params)

    @jax.jit
    def run(params, opt_state, number, batches):
        subnets = psjax.ist.membership(0, number, axes, divided, 2)
        return update(params, opt_state, subnets, batches)

    whole = jax.jit(lambda w: nll(apply(w, *inputs), labels).mean())
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, 4, *x.shape)), (*inputs, labels))
    found = [float(whole(params))]
    for number in range(rounds):
        params, opt_state, metrics = run(*state, number, batches)
        assert np.all(metrics.finite)
        state = params, opt_state
        found.append(float(whole(params)))
    return found


def test_a_gpt_whose_heads_and_neurons_are_divided():
    apply, params, (ids,) = CASES["gpt"].make()
    found = losses(apply, params, (ids,), jnp.roll(ids, -1, axis=1), rounds=15)
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("name", ["cnn-batchnorm", "resnet18-batchnorm"])
def test_convolutional_networks_whose_channels_are_divided(name):
    apply, params, (x,) = CASES[name].make()
    found = losses(apply, params, (x,), jnp.arange(len(x)) % 5, rounds=6)
    assert min(found[1:]) < 0.9 * found[0]
