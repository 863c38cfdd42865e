"""The test functions have the literature's values, and the program measures every method."""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import psjax
from experiments._lib.tables import read_texts
from experiments.second_order import problems
from experiments.second_order.functions import PROBLEMS

REFERENCE = pathlib.Path(__file__).parents[3] / "shared/reference/separable_problems.json"
# At the standard start: More, Garbow and Hillstrom 1981 and the authors of the functions.
AT_START = {"WOODS": 5 * 19192.0, "ARWHEAD": 57.0, "ENGVAL1": 59.0 * 19, "LIARWHD": 11700.0}


@pytest.mark.parametrize("name", PROBLEMS)
def test_elements_add_up_to_the_function(x64, name):
    problem = PROBLEMS[name](20)
    x = jnp.asarray(problem.start) + 0.1 * jnp.sin(jnp.arange(20) + 1.0)
    value = problem.constant
    for kind, s, d in zip(problem.kinds, problem.selections(x), problem.arguments()):
        value += psjax.value_and_grad(kind.fn, 0)(x, s, d)[0]
    np.testing.assert_allclose(value, problem.value(x), rtol=1e-12)


@pytest.mark.parametrize("name", AT_START)
def test_values_at_the_start(x64, name):
    problem = PROBLEMS[name](20)
    np.testing.assert_allclose(problem.value(jnp.asarray(problem.start)), AT_START[name])


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"{REFERENCE.name} is not beside the checkout")
@pytest.mark.parametrize("name", PROBLEMS)
def test_value_gradient_and_hessian_are_those_of_another_implementation(x64, name):
    case = json.loads(REFERENCE.read_text())["problems"][name]
    problem = PROBLEMS[name](case["n"])
    np.testing.assert_allclose(problem.start, case["points"]["x0"]["x"], rtol=1e-15)
    v = jnp.cos(jnp.arange(case["n"]) + 1.0)
    for point in case["points"].values():
        x = jnp.asarray(point["x"])
        value, gradient, image = problem.constant, 0, 0
        for kind, s, d in zip(problem.kinds, problem.selections(x), problem.arguments()):
            more, grads = psjax.value_and_grad(kind.fn, 0)(x, s, d)
            value, gradient = value + more, gradient + grads
            matrices = psjax.quasi_newton.element_hessian(kind.fn, 0)(x, s, d)
            image += psjax.quasi_newton.operator(matrices, s, x, "exact")(v)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())
        close(value, point["f"])
        close(gradient, point["gradient"])
        close(image, point["hessian_vector"])


def test_every_method_is_measured_once(tmp_path):
    args = problems.Args(("ARWHEAD",), (20,), out=tmp_path)
    problems.main(args)
    rows = read_texts(tmp_path / "problems.csv")
    assert [row["method"] for row in rows] == list(problems.METHODS)
    for row in rows:
        assert row["converged"] == "True", row
        np.testing.assert_allclose(float(row["value"]), 0, atol=1e-9)
    assert (tmp_path / "problems.png").stat().st_size < 200_000
    problems.main(args)
    assert read_texts(tmp_path / "problems.csv") == rows


def test_the_profile_counts_who_is_best():
    found = problems.profile({"a": [1.0, 4.0, np.inf], "b": [2.0, 2.0, np.inf]})
    assert found["a"].tolist() == [1, 2, np.inf]
    assert found["b"].tolist() == [1, 2, np.inf]


def test_wrong_words_are_refused():
    with pytest.raises(ValueError, match="ROSENBROCK"):
        problems.main(problems.Args(("ROSENBROCK",)))
