"""Axes of models that nobody wrote for psjax: none is wrong, and a part of them is a network."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from tests.axes.registry import CASES

# By float64: what computes in float32 whatever it gets, and what draws random numbers in shapes.
NOT_IN_FLOAT64 = {"lstm", "lstm-bidirectional", "gru"}
DRAWS = {"mlp-gelu-dropout"}
NOTHING_TO_DIVIDE = {"mlp-weightnorm", "while-loop", "cond", "resnet18-layernorm"}
NARROWED = sorted(set(CASES) - NOT_IN_FLOAT64 - DRAWS - NOTHING_TO_DIVIDE)
NARROWED = [name for name in NARROWED if not CASES[name].large or name == "gpt-12-layers"]


def made(name):
    case = CASES[name]
    if case.needs and importlib.util.find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    return case.make()


def gathered(specs, axes, tree, rows):
    """Rows of some axes in every leaf, by the selection that training uses."""
    flat, treedef = jax.tree.flatten(tree)
    held = {n for spec in specs for n in names_in(spec)} & set(rows)
    if not held:
        return tree
    indices = {name: rows[name][None] for name in held}
    selection = psjax.select(list(specs), indices, like=flat, sizes=sizes_for(specs, axes, held))
    return treedef.unflatten([x[0] for x in selection.gather(flat)])


def names_in(spec):
    text = " ".join(str(entry) for entry in spec if entry is not None)
    return {name for name in text.replace("*", " ").replace("+", " ").split() if not name.isdigit()}


def sizes_for(specs, axes, held):
    return {name: axes.sizes[name] for name in held.union(*map(names_in, specs))}


def specs_of(axes):
    return jax.tree.leaves(axes.specs, is_leaf=lambda s: isinstance(s, P))


@pytest.mark.parametrize("name", CASES)
def test_rows_of_every_axis_can_be_permuted(name):
    apply, params, inputs = made(name)
    axes = psjax.infer_axes(apply, params, *inputs)
    assert not axes.unknown
    if name in DRAWS:  # the numbers drawn must be permuted too
        psjax.check_axes(apply, axes, params, *inputs)
        return
    run = jax.jit(lambda params, inputs: jax.tree.leaves(apply(params, *inputs)))
    want = run(params, inputs)
    rng = np.random.default_rng(0)
    specs = specs_of(axes), axes.inputs, axes.outputs
    for axis, size in axes.sizes.items():
        rows = {axis: np.roll(np.arange(size), 1 + rng.integers(size - 1 or 1))}
        move = lambda *trees, rows=rows: [gathered(s, axes, x, rows) for s, x in zip(specs, trees)]
        *moved, expected = jax.jit(move)(params, inputs, want)
        for a, b in zip(run(*moved), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", NARROWED)
def test_a_part_is_the_whole_with_the_other_rows_zero(name):
    """In value and gradient, to 1e-12 in float64, half of all divisible axes at once."""
    apply, params, inputs = made(name)
    wide = lambda x: x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(wide, (params, inputs))
        axes = psjax.infer_axes(apply, params, *inputs)
        sizes = {axis: -(-size // 2) for axis, size in axes.divisible.items()}
        rng = np.random.default_rng(0)
        rows = {a: np.sort(rng.permutation(axes.sizes[a])[:n])[None] for a, n in sizes.items()}
        selection = psjax.select(axes, rows, like=params)
        own = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], selection.gather(tree)))
        part = own(params)
        zeroed = jax.jit(lambda w: selection.scatter_add(selection.gather(w), w))(params)
        small = psjax.narrow(apply, axes, sizes)
        results = jax.eval_shape(apply, params, *inputs)
        probes = jax.tree.map(lambda y: rng.normal(size=y.shape), results)
        of_subnet = jax.tree.leaves(jax.eval_shape(small, part, *inputs))
        same = [a.shape == b.shape for a, b in zip(of_subnet, jax.tree.leaves(results))]
        assert any(same)

        def probed(fn):
            def value(params):
                ys = jax.tree.leaves(fn(params, *inputs))
                return sum(
                    jnp.vdot(c, y) for c, y, s in zip(jax.tree.leaves(probes), ys, same) if s
                )

            return jax.jit(jax.value_and_grad(value))

        value, grads = probed(small)(part)
        want, whole = probed(apply)(zeroed)
        np.testing.assert_allclose(value, want, rtol=1e-12)
        expected = own(whole)
        largest = max(np.abs(g).max() for g in jax.tree.leaves(expected))
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12 * largest)
        jax.tree.map(close, grads, expected)


def test_a_registry_of_thirty_models_and_more():
    assert len(CASES) >= 30
    assert len(NARROWED) >= 30
