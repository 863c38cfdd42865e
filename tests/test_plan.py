"""Plans: every ordered pair once, on every sample once; and the whole gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import plan as plans
from tests import separable_model as model

CASES = [
    ("elements", 4, 5, ()),
    ("elements", 3, 8, ()),
    ("elements", 5, 1, ()),
    ("pairs", 5, 4, ()),
    ("pairs", 4, 8, ()),
    ("blocks", 7, 3, (4,)),
    ("blocks", 10, 8, (4,)),
    ("blocks", 5, 3, (9,)),
    ("cyclic", 10, 8, ()),
    ("cyclic", 16, 8, ()),
    ("cyclic", 7, 7, ()),
    ("cyclic", 5, 8, ()),
    ("cyclic", 10, 4, (10,)),
    ("cyclic", 9, 2, ()),
]


def make(kind, num_classes, num_workers, args=()):
    return getattr(plans, kind)(num_classes, num_workers, *args)


def incidence(plan, room):
    """How often each (label, slot, other) is evaluated, by plain loops over the tasks."""
    C = plan.num_classes
    times = np.zeros((C, room, C), int)
    slots = plan.slots(room)
    for w, t in np.ndindex(plan.classes.shape[:2]):
        own = slots[w, t][slots[w, t] < room]
        for a, b in np.argwhere(plan.pairs[w, t]):
            k, j = plan.classes[w, t, a], plan.classes[w, t, b]
            assert plan.labels[w, t, a] == k
            assert k < C
            assert j < C  # both classes are held
            times[k, own, j] += 1
    return times


def every_pair_once(plan, room):
    C = plan.num_classes
    expected = np.broadcast_to(1 - np.eye(C, dtype=int)[:, None], (C, room, C))
    np.testing.assert_array_equal(incidence(plan, room), expected)
    for held in plan.classes.reshape(-1, plan.block_size):
        held = held[held < C]
        assert len(set(held.tolist())) == len(held)


@pytest.mark.parametrize("num_classes", [2, 3, 5, 7, 10, 13, 16, 31, 40, 64])
def test_cyclic_plans_have_every_pair_once_for_any_number_of_workers(num_classes):
    for num_workers in range(1, 65):
        every_pair_once(plans.cyclic(num_classes, num_workers), 1 + num_workers // num_classes)


def test_all_plans_have_every_pair_once():
    rng = np.random.default_rng(0)
    sizes = [(2, 1), (2, 64), (64, 3), *rng.integers((2, 1), (40, 65), (25, 2)).tolist()]
    for num_classes, num_workers in sizes:
        every_pair_once(plans.elements(num_classes, num_workers), 5)
        every_pair_once(plans.pairs(num_classes, num_workers), 5)
        block = 2 * int(rng.integers(1, num_classes // 2 + 2))
        every_pair_once(plans.blocks(num_classes, num_workers, block), 5)
        groups = int(rng.integers(1, num_classes + 1))
        every_pair_once(plans.cyclic(num_classes, num_workers, groups), 5)


def test_workers_of_a_cyclic_plan_hold_the_groups_of_the_cover_and_do_equal_work():
    plan = plans.cyclic(14, 7)
    for w in range(7):
        groups = sorted({(w + d) % 7 for d in plan.base})
        assert sorted(plan.classes[w, 0]) == [c for g in groups for c in (2 * g, 2 * g + 1)]
    pairs = plan.pairs.sum(axis=(1, 2, 3))
    assert pairs.tolist() == [14 * 13 // 7] * 7


@pytest.mark.parametrize(("kind", "num_classes", "num_workers", "args"), CASES)
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_weights_of_the_batches_add_to_one_for_every_sample_and_other_class(
    kind, num_classes, num_workers, args, replicas
):
    """And each sample is read by the workers of its own label only; class counts are uneven."""
    plan = make(kind, num_classes, num_workers, args)
    labels = np.minimum(np.random.default_rng(0).geometric(0.4, 50) - 1, num_classes - 1)
    rows = plan.batches(labels, 23, replicas=replicas)
    total = np.zeros((len(rows.indices), len(labels) + 1, num_classes))
    for step, w, t, a in np.ndindex(rows.indices.shape[:-1]):
        index, weight = rows.indices[step, w, t, a], rows.weights[step, w, t, a]
        seen = index[index < len(labels)]
        assert set(labels[seen]) <= {rows.labels[step, w, t, a]}
        assert not weight[index == len(labels)].any()
        task = (w % num_workers, t)
        for b in np.flatnonzero(plan.pairs[task][a]):
            np.add.at(total[step], (index, plan.classes[task][b]), weight)
    for step in range(len(total)):
        batch = np.arange(step * 23, min(50, step * 23 + 23))
        expected = np.zeros((len(labels) + 1, num_classes))
        expected[batch] = 1 / len(batch)
        expected[batch, labels[batch]] = 0
        np.testing.assert_allclose(total[step], expected, rtol=1e-6, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "num_classes", "num_workers", "args"), CASES)
def test_a_plan_as_a_selection_gives_the_whole_gradient(kind, num_classes, num_workers, args):
    plan = make(kind, num_classes, num_workers, args)
    w = model.init(num_classes)
    x, labels = model.make_data(num_classes, 24)
    rows = psjax.data.batches_by_label(labels, num_classes, 24)
    room = rows.indices.shape[2]
    selection = plan.selection(model.AXES, w, room)
    weight = np.where(rows.weights[0] > 0, 1 / 24, 0)  # float32 would be seen at 1e-12
    batch = {"x": psjax.data.take(x, rows.indices[0]), "weight": jnp.asarray(weight)}
    pairs = plan.pairs.reshape(-1, *plan.pairs.shape[2:])
    fn = psjax.value_and_grad(model.element, in_axes=(P("label", "slot"), P("task")))
    value, grads = jax.jit(fn)(w, selection, batch, pairs)
    expected, whole = model.whole_value_and_grad(w, x, labels)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    close(value, expected)
    jax.tree.map(close, grads, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plans.cyclic(10, 0), r"num_workers=0.*1 worker or more"),
        (lambda: plans.elements(1, 4), "one class has no pairs"),
        (lambda: plans.pairs(10, 0), "num_workers=0"),
        (lambda: plans.blocks(10, 4, 5), "an even number"),
        (lambda: plans.blocks(10, 4, 1), "block_size=1"),
        (lambda: plans.cyclic(10, 4, 11), "from 1 to 10"),
        (lambda: plans.cyclic(4, 4).slots(0), "1 or more"),
        (lambda: plans.pairs(3, 5).selection(model.AXES, model.init(3)), "5 workers share"),
        (lambda: plans.cyclic(4, 4).batches([0, 1], 2, replicas=0), "replicas=0"),
        (lambda: plans.cyclic(4, 4).batches([0, 4], 2), "label 4 of sample 1 is outside"),
    ],
)
def test_bad_plans_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------- costs

IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
SPEED: Any = dict(bandwidth=125e6, flops=1e11, batch_size=100)


def test_operations_are_a_line_in_the_classes():
    """Of a network whose products can be counted by hand: 6 a weight and sample, 4 at the input."""
    net = psjax.models.PSNet(4, (), 3, (5,), (8,), (1,))
    work = plans.workload(net, 4, IMAGE)
    by_hand = 4 * 64 * 3 + 6 * 3 * 5 + 6 * 5
    assert work.private == 64 * 3 + 3 + 3 * 5 + 5 + 5 + 1
    assert work.common == 0
    assert work.common_flops == pytest.approx(0, abs=0.02 * by_hand)
    assert work.class_flops == pytest.approx(by_hand, rel=0.25)  # activations are counted too


def test_the_best_plan_fits_and_its_table_stands_beside_the_plain_methods():
    net = psjax.models.psnet("digits")
    plan = plans.best(net, 10, 8, inputs=IMAGE, **SPEED)
    text = str(plan)
    for word in ("memory", "(chosen)", "data parallel", "score exchange", "subnets", "*"):
        assert word in text
    costs = plan.costs
    assert costs is not None
    assert all(costs.rows[0].seconds <= row.seconds for row in costs.rows if row.plan is not None)
    least = min(row.memory for row in costs.rows if row.plan is not None)
    small = plans.best(net, 10, 8, inputs=IMAGE, memory=least, **SPEED)
    assert small.costs is not None
    assert small.costs.rows[0].memory <= least
    every_pair_once(small, 12)


def test_a_memory_limit_that_no_plan_meets_names_the_least_that_one_does():
    net = psjax.models.psnet("digits")
    with pytest.raises(ValueError, match=r"no plan for 10 classes on 8 workers fits") as caught:
        plans.best(net, 10, 8, inputs=IMAGE, memory=1000, **SPEED)
    least = float(str(caught.value).split("the least is ")[1].split()[0])
    plans.best(net, 10, 8, inputs=IMAGE, memory=least * 1.001, **SPEED)


def test_a_slow_network_chooses_less_traffic_and_a_slow_processor_fewer_operations():
    net = psjax.models.psnet("mnist")
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    choose = functools.partial(plans.best, net, 10, 8, inputs=image, batch_size=100)
    slow_net = choose(bandwidth=1e5, flops=1e12)
    slow_cpu = choose(bandwidth=1e12, flops=1e8)
    assert slow_net.costs is not None
    assert slow_cpu.costs is not None
    net_row, cpu_row = slow_net.costs.rows[0], slow_cpu.costs.rows[0]
    assert net_row.down + net_row.up <= cpu_row.down + cpu_row.up
    assert cpu_row.flops <= net_row.flops
