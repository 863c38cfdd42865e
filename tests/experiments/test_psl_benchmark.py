"""The benchmark of PSL steps: its clock, its ratios, its count of operations, its table."""

import csv
import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from experiments.benchmarks import psl, timing
from experiments.psl import training

# -------------------------------------------------------------------------------------------- times


@pytest.fixture
def turns(monkeypatch):
    """`turns({name: seconds of its calls}) -> seconds that were measured, names in order`."""
    now = [0.0]
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def measured(seconds):
        order, left = [], {name: iter(own) for name, own in seconds.items()}

        def call(name):
            order.append(name)
            now[0] += next(left[name])

        calls = {name: lambda name=name: call(name) for name in seconds}
        repeats = len(next(iter(seconds.values()))) - 1
        found = timing.take_turns(calls, repeats)
        return found, order

    return measured


def test_programs_take_turns_and_the_first_round_is_not_counted(turns):
    found, order = turns({"a": [100, 1, 8, 3], "b": [200, 2, 4, 1]})
    np.testing.assert_allclose(found["a"], [1, 8, 3])
    np.testing.assert_allclose(found["b"], [2, 4, 1])
    assert "".join(order) == "baabbaab"


def test_a_ratio_is_of_medians_and_its_quartiles_round_by_round(turns, tmp_path):
    seconds, _ = turns({"a": [100, 1, 8, 3], "b": [200, 2, 4, 1]})
    ratio = timing.Ratio.of("a / b", 1.4, seconds["a"], seconds["b"])
    assert (ratio.value, ratio.reference, ratio.unit) == (3000, 2000, "ms")
    assert ratio.ratio == pytest.approx(3 / 2)  # the median of 1/2, 8/4 and 3/1 is 2
    assert (ratio.low, ratio.high) == pytest.approx((1.25, 2.5))
    assert str(ratio).endswith("2000.00 ms  missed")
    assert str(dataclasses.replace(ratio, goal=1.5)).endswith("2000.00 ms")
    assert str(dataclasses.replace(ratio, goal=None)).endswith("2000.00 ms")
    between = timing.Ratio.between("memory", 2, 6.0, 4.0, "KiB")
    assert (between.ratio, between.low) == (1.5, None)
    timing.write(tmp_path / "new" / "table.csv", [ratio, between])
    with open(tmp_path / "new" / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["ratio"] for row in rows] == ["1.5", "1.5"]
    assert [row["high"] for row in rows] == ["2.5", ""]


# --------------------------------------------------------------------------------------- operations


@pytest.fixture(scope="module")
def bench():
    """The network with weights 0, which take no compilation."""

    def init(net, _):
        variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
        params = jax.tree.map(lambda x: jnp.zeros(x.shape), nn.unbox(variables)["params"])
        return params, nn.get_partition_spec(variables)["params"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psl, "init", init)
        return psl.Bench("psl-squared")


def products(jaxpr) -> int:
    """Operations of the matrix products of a program without convolutions, two a product."""
    total = 0
    for eqn in jaxpr.eqns:
        parts = [products(getattr(j, "jaxpr", j)) for j in jaxprs_in_params(eqn.params)]
        platforms = eqn.primitive.name == "cond"  # of which a program has one
        inner = max(parts) if platforms else sum(parts)
        total += inner * eqn.params.get("length", 1)  # of a scan
        assert eqn.primitive.name not in ("conv_general_dilated", "while")
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            length = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * length
    return total


@pytest.mark.parametrize("compute", psl.NAMES)
def test_operations_are_those_of_the_program_that_is_timed(bench, monkeypatch, compute):
    """What another sample a class costs: with convolutions as products, all of them to be seen."""
    monkeypatch.setattr(bench, "net", bench.net.clone(implementation="patches"))
    fn, selection = bench.loss_and_grad(compute, "psl-squared")
    if compute == "tiles":
        selection = training.tile_selection(selection, np.arange(psl.C), psl.C)

    def cost(each):
        rows = (psl.C * each,) if compute == "fused" else (psl.C, each)
        batch = {
            "image": jax.ShapeDtypeStruct((*rows, 28, 28, 1), jnp.float32),
            "weight": jax.ShapeDtypeStruct(rows, jnp.float32),
        }
        if compute == "fused":
            batch["label"] = jax.ShapeDtypeStruct(rows, jnp.int32)
        return products(jax.make_jaxpr(fn)(bench.params, selection, batch).jaxpr)

    # With so many samples both are evaluated in as many chunks, each of which folds a kernel.
    assert cost(21) - cost(20) == psl.C * psl.flops(compute)


# ------------------------------------------------------------------------------------------ batches


def test_balanced_batches_have_every_class_equally_often():
    dataset = psl.balanced(20)
    counts = [np.bincount(row, minlength=psl.C) for row in dataset.labels.reshape(-1, 20)]
    np.testing.assert_array_equal(counts, 2)
    for compute in ("fused", "elements"):
        assert psl.index_batches(compute, dataset, 20).padding_factor == 1


def test_steps_go_through_the_epoch_again_without_its_last_batch():
    dataset = psl.balanced(10)
    short = dataset._replace(images=dataset.images[:35], labels=dataset.labels[:35])
    batches = psl.index_batches("fused", short, 10)
    assert len(batches.indices) == 4
    rows = psl.some_steps(batches, 7, tiles=False)
    np.testing.assert_array_equal(rows["indices"], batches.indices[[0, 1, 2, 0, 1, 2, 0]])


@pytest.mark.parametrize("size", [5, 25])
def test_batches_that_cannot_be_balanced_are_refused(size):
    with pytest.raises(ValueError, match=f"--batch-sizes {size}: write multiples of 10"):
        psl.Args(batch_sizes=(100, size))


# -------------------------------------------------------------------------------------------- table


def test_the_table_divides_seconds_of_a_step(bench, monkeypatch):
    monkeypatch.setattr(psl, "steps_a_call", lambda *_: 2)
    dataset = psl.balanced(100)
    table = psl.table_of(bench, dataset, training.on_device(dataset), 100, with_torch=False)
    assert {table.steps[name] for name in ("fused", "nll", "elements", "scalar")} == {2}
    assert table.steps["passes"] == 1
    a_step = {"fused": 2.0, "nll": 1.0, "elements": 8.0, "pairs": 12.0, "blocks": 5.0}
    a_step |= {"one": 6.0, "scalar": 6.0, "passes": 80.0, "native passes": 160.0}
    seconds = {name: table.steps[name] * np.full(3, s) for name, s in a_step.items()}
    monkeypatch.setattr(timing, "take_turns", lambda calls, repeats: seconds)
    rows = {row.figure: row for row in table.measure(3)}
    expected = {
        "fused PSL / fused NLL": (2, 1.05),
        "90 elements (1.7x products) / fused": (4, 2.0),
        "45 merged pairs (1.7x products) / fused": (6, 2.0),
        "10 cyclic blocks of 4 classes (1.5x products) / fused": (2.5, 1.7),
        "90 elements at once, chunk_size 90 / fused": (3, 2.5),
        "90 elements / 90 whole reverse passes": (0.1, 0.1),
        "90 elements / 90 whole reverse passes, lax conv": (0.05, None),
        "scalar form / explicit form": (0.75, 1.1),
    }
    assert {name: (row.ratio, row.goal) for name, row in rows.items()} == {
        f"{name}, batch 100": (pytest.approx(ratio), goal)
        for name, (ratio, goal) in expected.items()
    }


def test_a_table_is_measured(bench, monkeypatch):
    """The two fused programs, as they are: trained for two steps a call."""
    monkeypatch.setattr(psl, "steps_a_call", lambda *_: 2)
    dataset = psl.balanced(10)
    table = psl.table_of(bench, dataset, training.on_device(dataset), 10, with_torch=False)
    names = ("fused", "nll")
    rows = lambda s: [timing.Ratio.of("fused / nll", None, s["fused"], s["nll"])]
    calls = {name: table.calls[name] for name in names}
    [ratio] = psl.Table(calls, table.steps, rows).measure(1)
    assert 0 < ratio.ratio < math.inf
    for name in names:
        program: Any = table.calls[name]
        weights = jax.tree.leaves(program.state[0])
        assert any(np.any(w) for w in weights)
        assert all(np.isfinite(w).all() for w in weights)
