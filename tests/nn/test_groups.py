"""Layers equal their plain forms, and a sub-network is the same module made smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from psjax import nn as psnn
from tests import reference

SHAPES = [(9, 8, 5, 2), (8, 8, 3, 2), (7, 9, 3, 1), (10, 10, 2, 3), (11, 11, 4, 2), (6, 6, 1, 2)]


@pytest.mark.parametrize("implementation", ["native", "patches", None])
@pytest.mark.parametrize(("height", "width", "k", "pool"), SHAPES)
def test_conv_is_convolution_bias_and_average_pooling(x64, height, width, k, pool, implementation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 3))
    kernel, bias = rng.normal(size=(k, k, 3, 4)), rng.normal(size=4)
    got = psnn.conv(*map(jnp.asarray, (x, kernel, bias)), pool=pool, implementation=implementation)
    np.testing.assert_allclose(got, reference.conv_avg_pool(x, kernel, bias, pool), atol=1e-12)


@pytest.mark.parametrize("implementation", ["native", "patches"])
def test_conv_equals_flax_in_float32_to_1e_6(implementation):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(size=(4, 28, 28, 1)), jnp.float32)
    layer = psnn.Conv(40, pool=2, implementation=implementation)
    variables = layer.init(jax.random.key(0), x)
    plain = nn.avg_pool(nn.Conv(40, (5, 5), padding="VALID").apply(variables, x), (2, 2), (2, 2))
    np.testing.assert_allclose(layer.apply(variables, x), plain, atol=1e-6)


def test_gradients_of_both_implementations_agree(x64):
    rng = np.random.default_rng(0)
    x, kernel = (
        jnp.asarray(rng.normal(size=(2, 9, 9, 3))),
        jnp.asarray(rng.normal(size=(3, 3, 3, 4))),
    )

    def loss(x, kernel, implementation):
        return jnp.sum(jnp.sin(psnn.conv(x, kernel, pool=2, implementation=implementation)))

    native = jax.grad(loss, (0, 1))(x, kernel, "native")
    patches = jax.grad(loss, (0, 1))(x, kernel, "patches")
    for a, b in zip(native, patches):
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_implementation_is_chosen_by_platform_at_lowering():
    """On the CPU no convolution is left in the compiled program."""
    x, kernel = jnp.zeros((1, 8, 8, 1)), jnp.zeros((3, 3, 1, 2))
    text = jax.jit(psnn.conv).lower(x, kernel).compile().as_text()
    assert "convolution(" not in text
    fixed = jax.jit(lambda x, k: psnn.conv(x, k, implementation="native"))
    assert "convolution" in fixed.lower(x, kernel).as_text()


def test_sigmoid_is_the_logistic_function_in_every_derivative(x64):
    x = jnp.linspace(-30.0, 30.0, 13)
    np.testing.assert_array_equal(psnn.sigmoid(x), jax.nn.sigmoid(x))
    ours, plain = psnn.sigmoid, jax.nn.sigmoid
    for _ in range(3):
        ours, plain = jax.grad(ours), jax.grad(plain)
        np.testing.assert_allclose(jax.vmap(ours)(x), jax.vmap(plain)(x), atol=1e-14)


def _init(layer, x):
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    return nn.unbox(variables)["params"], nn.get_partition_spec(variables)["params"]


GROUPED = {
    "FanOutDense": (psnn.FanOutDense, (6,)),
    "FanOutConv": (psnn.FanOutConv, (8, 8, 3)),
    "SeparableDense": (psnn.SeparableDense, (4, 6)),
    "SeparableConv": (psnn.SeparableConv, (8, 8, 4, 3)),
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_sub_network_is_the_same_module_with_fewer_groups(x64, name):
    cls, shape = GROUPED[name]
    x = jax.random.normal(jax.random.key(1), (2, *shape))
    params, axes = _init(cls(4, 3), x)
    assert [spec[0] for spec in axes.values()] == ["class", "class"]
    groups = jnp.array([3, 1])
    narrow = jax.tree.map(lambda w: w[groups], params)
    own = x[..., groups, :] if name.startswith("Separable") else x
    got = cls(2, 3).apply({"params": narrow}, own)
    np.testing.assert_allclose(got, cls(4, 3).apply({"params": params}, x)[..., groups, :], 1e-12)


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_reads_its_counterpart_and_a_fan_out_reads_everything(x64, name):
    cls, shape = GROUPED[name]
    x = jax.random.normal(jax.random.key(1), (1, *shape))
    params, _ = _init(cls(4, 3), x)
    group_2 = lambda x: jnp.sum(cls(4, 3).apply({"params": params}, x)[..., 2, :])
    read = np.asarray(jnp.abs(jax.grad(group_2)(x)).sum(axis=tuple(range(x.ndim - 2))))
    used = read.reshape(shape[-2:]).sum(axis=-1) > 0 if name.startswith("Separable") else read > 0
    if name.startswith("Separable"):
        np.testing.assert_array_equal(used, [False, False, True, False])
    else:
        assert used.all()


def test_fan_out_dense_is_a_dense_layer(x64):
    x = jax.random.normal(jax.random.key(1), (2, 6))
    params, _ = _init(psnn.FanOutDense(4, 3), x)
    kernel = jnp.concatenate(list(params["kernel"]), axis=1)
    plain = x @ kernel + params["bias"].ravel()
    got = psnn.FanOutDense(4, 3).apply({"params": params}, x)
    np.testing.assert_allclose(got.reshape(2, -1), plain, rtol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape", "fan_in", "fan_out"),
    [
        (psnn.Conv(40), (1, 28, 28, 3), 75, 1000),
        (psnn.FanOutConv(10, 3), (1, 12, 12, 40), 1000, 750),
        (psnn.SeparableDense(10, 35), (1, 10, 48), 48, 35),
        (psnn.FanOutDense(10, 1), (1, 84), 84, 10),
        (psnn.Dense(120), (1, 256), 256, 120),
    ],
)
def test_initial_kernels_are_xavier_uniform(layer, shape, fan_in, fan_out):
    kernel = np.asarray(_init(layer, jnp.zeros(shape))[0]["kernel"])
    limit = np.sqrt(6 / (fan_in + fan_out))
    assert np.abs(kernel).max() <= limit
    assert np.abs(kernel).max() > 0.97 * limit
    # A uniform's standard deviation; 5 standard errors for the smallest kernel, of 840 weights.
    assert abs(kernel.std() / (limit / np.sqrt(3)) - 1) < 5 * np.sqrt(0.2 / kernel.size)


@pytest.mark.usefixtures("any_type")
def test_bad_input_is_named():
    with pytest.raises(ValueError, match="10 features, which 4 groups cannot share evenly"):
        psnn.split_groups(jnp.zeros((2, 10)), 4)
    with pytest.raises(ValueError, match=r"SeparableDense\(groups=4\): x has shape \(2, 3, 6\)"):
        psnn.SeparableDense(4, 3).init(jax.random.key(0), jnp.zeros((2, 3, 6)))
    with pytest.raises(ValueError, match="nothing is left of the image"):
        psnn.conv(jnp.zeros((1, 4, 4, 1)), jnp.zeros((5, 5, 1, 1)))
    with pytest.raises(ValueError, match=r"x is \[batch, height, width, in\]"):
        psnn.conv(jnp.zeros((4, 4, 1)), jnp.zeros((3, 3, 1, 1)))
    with pytest.raises(ValueError, match="pass 'native', 'patches' or None"):
        psnn.conv(jnp.zeros((1, 4, 4, 1)), jnp.zeros((3, 3, 1, 1)), implementation="fft")
