"""Theorems about complex parameters: the derivatives are JAX's own, never conjugated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax

pytestmark = pytest.mark.usefixtures("x64")
PAIRS = np.array([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]])


def element(u, shift):
    """A real function of complex numbers that is neither holomorphic nor symmetric in them."""
    z = u["z"][0] * jnp.conj(u["z"][1]) + jnp.exp(1j * u["z"][0]) * u["scale"] * shift
    return jnp.real(z) + 3 * jnp.imag(z) ** 2 + jnp.sum(jnp.abs(u["shared"] * z) ** 2)


def plain(w, shift):
    """The same sum, written out."""
    return sum(element({**w, "z": w["z"][pair]}, shift) for pair in PAIRS)


def complex_normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape))


def point(seed):
    """Complex leaves, selected and shared, beside a real one; and a further complex argument."""
    scale = jnp.asarray(np.random.default_rng(seed).normal())
    params = {"z": complex_normal(seed, 4), "scale": scale, "shared": complex_normal(seed + 1, 3)}
    return params, complex_normal(seed + 2)


def close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def functions():
    params, shift = point(0)
    axes = {"z": P("i"), "scale": P(), "shared": P()}
    selection = psjax.select(axes, {"i": PAIRS}, like=params)
    separable = psjax.partially_separable(element)
    return (lambda w, shift: separable(w, selection, shift)), selection, (params, shift)


def test_the_gradient_of_a_complex_product_is_that_of_jax():
    w = jnp.asarray([1.0 + 2.0j])
    selection = psjax.select(P("i"), {"i": [[0]]}, like=w)
    h = lambda u: jnp.real(u[0] ** 2 * (2 + 1j))
    f = psjax.partially_separable(h)
    close(jax.grad(f)(w, selection), jax.grad(h)(w))


@pytest.mark.parametrize("jit", [False, True])
def test_grad_with_respect_to_parameters_and_arguments(jit):
    separable, _, args = functions()
    gradient = jax.grad(separable, (0, 1))
    close((jax.jit(gradient) if jit else gradient)(*args), jax.grad(plain, (0, 1))(*args))


def test_value_and_grad_is_the_same_gradient():
    _, selection, (params, shift) = functions()
    value_and_grad = psjax.value_and_grad(element)
    close(value_and_grad(params, selection, shift), jax.value_and_grad(plain)(params, shift))


def test_jvp_along_real_and_imaginary_directions():
    separable, _, args = functions()
    direction = point(7)
    for factor in (1, 1j):
        tangents = jax.tree.map(
            lambda t: t * factor if jnp.iscomplexobj(t) else t,  # noqa: B023
            direction,
        )
        close(jax.jvp(separable, args, tangents), jax.jvp(plain, args, tangents))


def test_vjp_pulls_back_a_cotangent():
    separable, _, args = functions()
    cotangent = jnp.asarray(-1.5)
    (value, pull), (expected, pull_plain) = jax.vjp(separable, *args), jax.vjp(plain, *args)
    close(value, expected)
    close(pull(cotangent), pull_plain(cotangent))


def test_the_derivative_of_the_gradient_along_a_direction():
    separable, _, args = functions()
    along = lambda f: jax.jvp(jax.grad(f, (0, 1)), args, point(7))
    close(along(separable), along(plain))
