"""Plans: every ordered pair once, on every sample once; and the whole gradient."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from psjax import plan as plans
from psjax.plan._best import candidates
from psjax.plan._cost import least_of
from tests import separable_model as model

CASES = [
    ("elements", 4, 5, ()),
    ("elements", 3, 8, ()),
    ("elements", 5, 1, ()),
    ("pairs", 5, 4, ()),
    ("pairs", 4, 8, ()),
    ("blocks", 7, 3, (4,)),
    ("blocks", 10, 8, (4,)),
    ("cyclic", 10, 8, ()),
    ("cyclic", 16, 8, ()),
    ("cyclic", 7, 7, ()),
    ("cyclic", 5, 8, ()),
    ("cyclic", 10, 4, (10,)),
    ("cyclic", 9, 2, ()),
]


def make(kind, num_classes, num_workers, args=()):
    return getattr(plans, kind)(num_classes, num_workers, *args)


def incidence(plan, most):
    """How often each (label, slot, other) is evaluated, by plain loops over the tasks."""
    C = plan.num_classes
    times = np.zeros((C, most, C), int)
    slots = plan.slots(most)
    for w, t in np.ndindex(plan.classes.shape[:2]):
        own = slots[w, t][slots[w, t] < most]
        a, b = np.nonzero(plan.pairs[w, t])
        k, j = plan.classes[w, t, a], plan.classes[w, t, b]
        np.testing.assert_array_equal(plan.labels[w, t, a], k)
        assert (k < C).all()
        assert (j < C).all()  # both classes are held
        np.add.at(times, (k[:, None], own, j[:, None]), 1)
    return times


def every_pair_once(plan, most):
    C = plan.num_classes
    expected = np.broadcast_to(1 - np.eye(C, dtype=int)[:, None], (C, most, C))
    np.testing.assert_array_equal(incidence(plan, most), expected)
    held = np.sort(plan.classes.reshape(-1, plan.block_size), axis=1)
    assert not np.any((held[:, 1:] == held[:, :-1]) & (held[:, 1:] < C))  # no class twice


@pytest.mark.parametrize("num_classes", [2, 3, 5, 7, 10, 13, 16, 31, 40, 64])
def test_cyclic_plans_have_every_pair_once_for_any_number_of_workers(num_classes):
    for num_workers in range(1, 65):
        every_pair_once(plans.cyclic(num_classes, num_workers), 1 + num_workers // num_classes)


def test_all_plans_have_every_pair_once():
    rng = np.random.default_rng(0)
    sizes = [(2, 1), (2, 64), (64, 3), *rng.integers((2, 1), (40, 65), (25, 2)).tolist()]
    for num_classes, num_workers in sizes:
        every_pair_once(plans.elements(num_classes, num_workers), 5)
        every_pair_once(plans.elements(num_classes, num_workers).merge_by_label(), 5)
        every_pair_once(plans.pairs(num_classes, num_workers), 5)
        block = 2 * int(rng.integers(1, num_classes // 2 + 2))
        every_pair_once(plans.blocks(num_classes, num_workers, block), 5)
        groups = int(rng.integers(1, num_classes + 1))
        every_pair_once(plans.cyclic(num_classes, num_workers, groups), 5)


@pytest.mark.parametrize("kind", ["elements", "pairs", "blocks", "cyclic"])
def test_merged_by_label_a_worker_evaluates_what_is_shared_once_for_each_of_its_labels(kind):
    args = {"blocks": (4,), "cyclic": (10,)}.get(kind, ())
    plan = getattr(plans, kind)(10, 3, *args)
    merged = plan.merge_by_label()
    every_pair_once(merged, 5)
    labels = 0
    for w in range(3):
        own = pairs_of(plan, w)
        assert pairs_of(merged, w) == own
        labels += len({label for label, _ in own})
    work = by_hand(10, common_flops=7.0)
    rows = plans.table(work, [plan, merged], num_workers=3, **SPEED).rows
    assert rows[1].trunk == labels / 10 < rows[0].trunk
    most = max(len({label for label, _ in pairs_of(plan, w)}) for w in range(3))
    slots = -(-SPEED["batch_size"] // 10)
    assert rows[1].flops == most * slots * (7 + merged.block_size * work.class_flops)


def pairs_of(plan, w):
    """Of worker w, one by one."""
    found = set()
    for t, a, b in np.argwhere(plan.pairs[w]):
        found.add((int(plan.classes[w, t, a]), int(plan.classes[w, t, b])))
    return found


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


@functools.cache
def whole_value_and_grad(num_classes):
    """Of 24 samples; in double precision, as the test that asks."""
    x, labels = model.make_data(num_classes, 24)
    return jax.jit(model.whole_value_and_grad)(model.init(num_classes), x, jnp.asarray(labels))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "num_classes", "num_workers", "args"), CASES)
def test_a_plan_as_a_selection_gives_the_whole_gradient(kind, num_classes, num_workers, args):
    plan = make(kind, num_classes, num_workers, args)
    w = model.init(num_classes)
    x, labels = model.make_data(num_classes, 24)
    rows = psjax.data.batches_by_label(labels, num_classes, 24)
    slots = rows.indices.shape[2]
    selection = plan.selection(model.AXES, w, slots)
    weight = np.where(rows.weights[0] > 0, 1 / 24, 0)  # float32 would be seen at 1e-12
    batch = {"x": np.pad(x, [(0, 1), (0, 0)])[rows.indices[0]], "weight": weight}
    pairs = plan.pairs.reshape(-1, *plan.pairs.shape[2:])
    fn = psjax.value_and_grad(model.element, in_axes=(P("label", "slot"), P("task")))
    value, grads = jax.jit(fn)(w, selection, batch, pairs)
    expected, whole = whole_value_and_grad(num_classes)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)
    close(value, expected)
    jax.tree.map(close, grads, whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plans.cyclic(10, 0), r"num_workers=0.*1 worker or more"),
        (lambda: plans.elements(1, 4), "one class has no pairs"),
        (lambda: plans.best(DIGITS, 1, 4, inputs=IMAGE, **SPEED), r"^best\(num_classes=1\): one"),
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
MNIST = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
SPEED: Any = dict(bandwidth=125e6, flops=1e11, batch_size=100)
DIGITS = psjax.models.psnet("digits")
best_for_digits = functools.partial(plans.best, DIGITS, 10, 8, inputs=IMAGE)


def by_hand(num_classes, private=1, common_flops=0.0):
    """A head of so many weights a class, one operation a score, and nothing in common."""
    like = {"head": jax.ShapeDtypeStruct((num_classes, private), jnp.float32)}
    return plans.Workload({"head": P("class")}, like, 0, private, common_flops, 1.0, 4)


def test_operations_are_a_line_in_the_classes():
    """Of a network whose products can be counted by hand: 6 a weight and sample, 4 at the input."""
    net = psjax.models.PSNet(4, (), 3, (5,), (8,), (1,))
    work = plans.workload(net, 4, IMAGE)
    by_hand = 4 * 64 * 3 + 6 * 3 * 5 + 6 * 5
    assert work.private == 64 * 3 + 3 + 3 * 5 + 5 + 5 + 1
    assert work.common == 0
    assert work.common_flops == pytest.approx(0, abs=0.02 * by_hand)
    assert work.class_flops == pytest.approx(by_hand, rel=0.25)  # activations are counted too


def test_a_plan_computes_as_many_slots_as_its_batches_have():
    """Labels at random fill some slots twice as often as others, and all are computed."""
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    slots = psjax.data.most_of_a_label(labels, 10, 100)
    assert slots > 15
    for plan in (plans.cyclic(10, 8), plans.pairs(10, 100), plans.cyclic(10, 4, 10)):
        (row, *_) = plans.table(
            by_hand(10, common_flops=7.0),
            [plan],
            num_workers=plan.num_workers,
            slots=slots,
            **SPEED,
        ).rows
        step = plan.batches(labels, 100).indices[0]  # [W, T, l, S]
        assert row.flops == step[0].size * (7 + plan.block_size)


@pytest.mark.parametrize("num_workers", range(2, 10))
def test_what_moves_is_never_more_than_one_row_for_each_distance_and_rank(num_workers):
    """Over all kinds: by shifts, each as wide as the most that a task needs of that distance."""
    W = num_workers
    for C in range(2, 13):
        every = [plans.elements(C, W), plans.pairs(C, W), plans.cyclic(C, W), plans.cyclic(C, W, C)]
        every += [plans.blocks(C, W, s) for s in range(4, C, 2)]
        costs = plans.table(by_hand(C), every, num_workers=W, **SPEED)
        master = np.repeat(np.arange(W), [len(part) for part in np.array_split(np.arange(C), W)])
        for row in costs.rows[: len(every)]:
            most = np.zeros(W, int)
            for w, t in np.ndindex(row.plan.classes.shape[:2]):
                held = row.plan.classes[w, t][row.plan.classes[w, t] < C]
                most = np.maximum(most, np.bincount((w - master[held]) % W, minlength=W))
            assert row.down == row.up <= 4 * row.plan.num_turns * most[1:].sum()


def all_plans(C, W):
    """Every plan of every kind, made one after the other."""
    few = range(2, C)
    yield plans.elements(C, W)
    yield plans.elements(C, W).merge_by_label()
    yield plans.pairs(C, W)
    yield from (plans.blocks(C, W, s) for s in [*(2 * n for n in few if 2 * n < C), C])
    yield from (plans.cyclic(C, W, groups) for groups in [*few, C])


def same_plan(a, b):
    return a.kind == b.kind and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("classes", "pairs", "shares")
    )


@pytest.mark.parametrize(("num_classes", "num_workers"), [(2, 3), (5, 4), (63, 14), (64, 8)])
def test_the_best_plan_is_the_fastest_of_all_blocks_and_all_numbers_of_groups(
    num_classes, num_workers
):
    """As if all were made and compared: at any speed, and of those that fit into any memory."""
    C, W = num_classes, num_workers
    net, every = psjax.models.psnet("mnist"), list(all_plans(C, W))
    work = plans.workload(net, C, MNIST)
    for bandwidth, flops in [(1.25e9, 1e11), (1e5, 1e12), (1e12, 1e8)]:
        speed = {**SPEED, "bandwidth": bandwidth, "flops": flops, "num_workers": W}
        costs = plans.table(work, every, **speed)
        sizes = sorted({row.memory for row in costs.rows if row.plan is not None})
        for memory in (None, sizes[0], sizes[len(sizes) // 2]):
            expected = dataclasses.replace(costs, memory=memory).best
            found = best_of(work, C, memory=memory, **speed)
            assert found.rows[0].plan is found.best
            assert same_plan(found.best, expected)
            assert found.rows[0].seconds <= min(row.seconds for row in found.rows if row.plan)


def best_of(work, num_classes, **options):
    """`best` of a model whose cost is known already: only its candidates are compared anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("psjax.plan._best.workload", lambda *args: work)
        return plans.best(work.model, num_classes, inputs=work.inputs, **options)


@pytest.mark.parametrize(("num_classes", "num_workers"), [(4, 3), (10, 8), (17, 5), (40, 64)])
def test_no_plan_computes_or_moves_less_than_the_bound_that_leaves_it_out(num_classes, num_workers):
    C, W, slots = num_classes, num_workers, 12
    work = by_hand(C, common_flops=7.0)
    kinds = candidates(C, W)
    made = [(c.size, c.make()) for kind in kinds.values() for c in kind]
    speed = {**SPEED, "batch_size": 10, "num_workers": W, "slots": slots}
    rows = plans.table(work, [plan for _, plan in made], **speed).rows
    for (size, plan), row in zip(made, rows):
        assert plan.block_size <= size
        computed, received = least_of(work, C, W, slots, size)
        assert row.flops >= (1 - 1e-12) * computed
        assert row.down >= (1 - 1e-12) * received


def test_of_many_classes_a_few_plans_are_considered():
    assert sum(map(len, candidates(64, 8).values())) == 3 + 31 + 63
    few = [candidate.make() for kind in candidates(200, 6).values() for candidate in kind]
    assert len(few) < 40
    groups = {plan.num_groups for plan in few if plan.kind == "cyclic"}
    assert {2, 3, 4, 5, 6, 8, 25, 128, 200} <= groups
    assert {plan.block_size for plan in few if plan.kind == "blocks"} >= {4, 6, 50, 128, 200}


def test_the_best_plan_fits_and_its_table_stands_beside_the_plain_methods():
    costs = best_for_digits(**SPEED)
    text = str(costs)
    for word in ("memory", "(chosen)", "data parallel", "score exchange", "subnets, J = 10", "*"):
        assert word in text
    assert all(costs.rows[0].seconds <= row.seconds for row in costs.rows if row.plan is not None)
    least = min(row.memory for row in costs.rows if row.plan is not None)
    small = best_for_digits(memory=least, **SPEED)
    assert small.memory == least
    assert small.rows[0].memory <= least
    every_pair_once(small.best, 12)


def test_subnets_compute_what_the_narrower_model_does():
    """The layers that are not divided whole: most of the work of a PSNet is in its trunk."""
    work = plans.workload(DIGITS, 10, IMAGE)
    rows = {r.name.split(",")[0]: r for r in plans.table(work, [], num_workers=8, **SPEED).rows}
    narrow = plans.workload(DIGITS.clone(hidden=(2,)), 10, IMAGE)
    per_sample = narrow.common_flops + 10 * narrow.class_flops
    assert rows["independent subnets"].flops == pytest.approx(13 * per_sample, rel=1e-3)
    assert rows["independent subnets"].flops > 0.8 * rows["data parallel"].flops
    fan_out, hidden, last = 4 * (20 * 4 + 1), 16 * (4 * 4 + 1 + 1), 1  # weights of a class
    held = 8 * fan_out + hidden + 8 * last
    assert rows["independent subnets"].holders == pytest.approx(held / (fan_out + hidden + last))


def test_a_codec_adds_rows_of_what_sends_encoded_differences_and_is_not_chosen():
    """Only when asked; data parallel with int8 sends a quarter and its scales."""
    work, own = plans.workload(DIGITS, 10, IMAGE), psjax.codec.int8(64)
    rows, more = (
        plans.table(work, [], num_workers=8, **SPEED, moments=1, codec=c).rows for c in (None, own)
    )
    assert more[: len(rows)] == rows
    named = {row.name: row for row in more}
    whole, encoded = named["data parallel"], named["data parallel, int8(64)"]
    floats = work.common + 10 * work.private
    assert encoded.up == psjax.cost.encoded_mean(floats, 8, own) / (2 * 8)
    assert 0.25 < encoded.up / whole.up < 0.28
    assert named["local SGD, J = 10, int8(64)"].up == pytest.approx(encoded.up / 10)
    plain = named["independent subnets, J = 10"]
    subnets = named["independent subnets, J = 10, int8(64)"]
    assert subnets.down == plain.down  # fetched as they are
    assert 0.62 < subnets.up / plain.up < 0.65  # a quarter and scales of a weight, and its momentum
    asked = best_for_digits(codec=own, **SPEED)
    np.testing.assert_array_equal(asked.best.pairs, best_for_digits(**SPEED).best.pairs)
    assert "data parallel, int8(64)" in str(asked)


def test_a_row_of_subnets_says_where_the_exchange_would_refuse_it():
    def note(net, num_workers):
        work = plans.workload(net, 2, IMAGE)
        return plans.table(work, [], num_workers=num_workers, **SPEED).note

    net = psjax.models.PSNet(2, (), 1, (16, 6), (8,), (1,))
    assert "refuses hidden_1 (6), which 4^2 must divide" in note(net, 4)
    assert "refuses" not in note(net.clone(hidden=(16, 48)), 4)
    assert "no hidden axis of 17 neurons or more" in note(net, 17)
    assert "no row, because model.clone(hidden=...) is not a narrower model" in note(Named(), 4)


class Named(nn.Module):
    """A hidden axis, but no attribute for its size."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.ones, ("class", "neurons"))
        return jnp.tanh(
            x.reshape(len(x), -1)[:, :8] @ self.param("w", init, (self.num_classes, 8)).T
        )


def test_only_what_fits_is_marked_as_the_fastest():
    row = lambda name, memory, ms: plans.Prediction(name, None, memory, 0, 0, 0, 1, 1, 1, ms / 1000)
    rows = (row("small and slow", 1e6, 3.0), row("small", 2e6, 2.0), row("large", 3e6, 1.0))
    marked = lambda table: [x for x in str(table).splitlines()[1:4] if x.endswith("*")]
    assert [x.split("  ")[0] for x in marked(plans.Table(rows))] == ["large"]
    assert [x.split("  ")[0] for x in marked(plans.Table(rows, memory=2e6))] == ["small"]
    assert not marked(plans.Table(rows, memory=1.0))


def test_a_memory_limit_that_no_plan_meets_names_the_least_that_one_does():
    with pytest.raises(ValueError, match=r"no plan for 10 classes on 8 workers fits") as caught:
        best_for_digits(memory=1000, **SPEED)
    least = int(str(caught.value).split("the least is ")[1].split()[0])
    best_for_digits(memory=least, **SPEED)
    with pytest.raises(ValueError, match=rf"the least is {least} bytes"):
        best_for_digits(memory=least - 1, **SPEED)


def test_a_slow_network_chooses_less_traffic_and_a_slow_processor_fewer_operations():
    slow_net = best_for_digits(bandwidth=1e5, flops=1e12, batch_size=100)
    slow_cpu = best_for_digits(bandwidth=1e12, flops=1e8, batch_size=100)
    net_row, cpu_row = slow_net.rows[0], slow_cpu.rows[0]
    assert net_row.down + net_row.up < cpu_row.down + cpu_row.up
    assert cpu_row.flops < net_row.flops


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_workers": 0}, "num_workers=0"),
        ({"batch_size": 0}, "batch_size=0.*pass 1 or more"),
        ({"bandwidth": 0}, "bandwidth=0.*pass a positive number"),
        ({"flops": -1.0}, "flops=-1.0.*pass a positive number"),
        ({"moments": -1}, "moments=-1.*pass 0 or more"),
        ({"local_steps": 0}, "local_steps=0.*pass 1 or more"),
        ({"slots": 9}, "slots=9.*100 samples of 10 classes need 10 slots"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(wrong, message):
    given = {"num_workers": 8, **SPEED, **wrong}
    with pytest.raises(ValueError, match=r"^table\(" + message):
        plans.table(by_hand(10), [], **given)
    with pytest.raises(ValueError, match=r"^best\(" + message):
        plans.best(DIGITS, 10, inputs=IMAGE, **given)
