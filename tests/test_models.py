"""Networks equal the NumPy reference, and an element is the network with two classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import psjax
from tests import reference


def _params(net, x):
    variables = jax.jit(net.init)(jax.random.key(0), x)
    params = nn.unbox(variables)["params"]
    # Biases start at zero; a test must see them.
    key = jax.random.key(1)
    return jax.tree.map(lambda w: w + 0.1 * jax.random.normal(key, w.shape, w.dtype), params)


SMALL = {
    "psnet": psjax.models.PSNet(3, (4,), 2, (5, 3), (3, 2), (2, 1)),
    "ideal": psjax.models.PSNet(3, (), 2, (5,), (3,), (2,)),
    "lenet": psjax.models.LeNet(3, (2, 4), (6, 5), (3, 2), (2, 1)),
}


@pytest.mark.parametrize("name", SMALL)
def test_scores_equal_the_reference(x64, name):
    net = SMALL[name]
    x = jax.random.uniform(jax.random.key(2), (3, 8, 8, 2))
    params = _params(net, x)
    plain = reference.lenet_scores if name == "lenet" else reference.psnet_scores
    want = plain(jax.tree.map(np.asarray, params), np.asarray(x), net.pools)
    np.testing.assert_allclose(net.apply({"params": params}, x), want, rtol=1e-10)


@pytest.mark.parametrize("name", SMALL)
def test_two_scores_are_the_network_with_two_classes(x64, name):
    net = SMALL[name]
    x = jax.random.uniform(jax.random.key(2), (3, 8, 8, 2))
    params = _params(net, x)
    axes = nn.get_partition_spec(jax.eval_shape(net.init, jax.random.key(0), x))["params"]
    pairs = psjax.ordered_pairs(3)
    gathered = psjax.select(axes, {"class": pairs}, like=params).gather(params)
    scores = net.apply({"params": params}, x)
    for e, pair in enumerate(pairs):
        own = jax.tree.map(lambda w, e=e: w[e], gathered)
        got = net.clone(num_classes=2).apply({"params": own}, x)
        np.testing.assert_allclose(got, scores[:, pair], rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "preset", "shape"),
    [
        (psjax.models.psnet, "digits", (8, 8, 1)),
        (psjax.models.lenet, "digits", (8, 8, 1)),
        (psjax.models.psnet, "mnist", (28, 28, 1)),
        (psjax.models.psnet, "mnist-53780", (28, 28, 1)),
        (psjax.models.lenet, "mnist", (28, 28, 1)),
        (psjax.models.psnet, "cifar10", (32, 32, 3)),
        (psjax.models.lenet, "cifar10", (32, 32, 3)),
    ],
)
def test_presets_take_their_images(make, preset, shape):
    scores, _ = jax.eval_shape(
        make(preset).init_with_output, jax.random.key(0), jnp.zeros((2, *shape))
    )
    assert scores.shape == (2, 10)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no such preset; pass one of.*Did you mean 'cifar10'"):
        psjax.models.psnet("cifar")
    with pytest.raises(
        ValueError, match="240 neurons or kernels cannot be divided among 9|30 neur"
    ):
        psjax.models.psnet("mnist", num_classes=9)
