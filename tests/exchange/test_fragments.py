"""Theorems about rounds that exchange one fragment of the weights each."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import psjax
from psjax import codec, cost
from tests.exchange import plain
from tests.exchange.test_compress import (
    INNER,
    NESTEROV,
    J,
    N,
    close,
    flat,
    mapped,
    quadratic,
    targets_of,
)

SHAPES = {"a": (4, 2), "b": (3,), "c": (5,), "d": (2, 3)}


NAN = [(1, 2), *((2, e) for e in range(N))]  # rounds and workers


def start(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def plain_rounds(w, plan, rounds, encode_decode, block, bad, outer):
    """Streaming rounds of n workers in loops; None: floats are sent."""
    sizes = [int(np.prod(shape)) for shape in SHAPES.values()]
    group = np.concatenate([[g] * size for g, size in zip(plan.groups, sizes)])
    F, d = plan.num_fragments, plan.delay
    w, trace = w.copy(), np.zeros_like(w)
    owns, traces = [w.copy() for _ in range(N)], [np.zeros_like(w) for _ in range(N)]
    residuals = [np.zeros_like(w) for _ in range(N)]
    sent, history = {}, []
    for r in range(rounds):
        if r > d:
            arrived = group == (r - 1 - d) % F
            for own in owns:
                own[arrived] = plan.mixing * own[arrived] + (1 - plan.mixing) * w[arrived]
        finite = [e for e in range(N) if (r, e) not in bad]
        for e in finite:
            everything = np.ones(len(w), bool)
            owns[e], traces[e] = plain.trained(owns[e], traces[e], targets_of(r)[e], everything)
        mine = group == r % F
        if finite:
            shares = []
            for e in range(N):
                share = (owns[e] - w)[mine] / len(finite) if e in finite else np.zeros(mine.sum())
                shares.append(share + residuals[e][mine])
            if encode_decode is None:
                change = sum(shares)
            else:
                change, lost = plain.encoded_sum(shares, encode_decode, block)
                for e in range(N):
                    residuals[e][mine] = lost[e]
            sent[r] = mine, change
        if r - d in sent:
            where, change = sent[r - d]
            if outer:
                trace[where] = -change + 0.9 * trace[where]
                change = -0.7 * (-change + 0.9 * trace[where])
            w[where] += change
        history.append(w.copy())
    return history, owns, residuals


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("how", "plan", "feedback", "outer", "bad"),
    [
        ("vmap", dict(num_fragments=2), False, False, ()),
        ("pmap", dict(num_fragments=2, delay=1), False, True, ()),
        ("shard_map", dict(num_fragments=3, delay=1, mixing=0.5), True, True, ()),
        ("vmap", dict(num_fragments=4, delay=3), False, True, NAN),
    ],
    ids=["two", "two, late", "three, late, half mixed, int4, outer", "four, late by 3, some NaN"],
)
def test_streaming_rounds_are_those_of_plain_loops(how, plan, feedback, outer, bad):
    """Outer optimizer, codec and fragments around one local update, in one compiled round."""
    params = start()
    plan = psjax.fragments(None, like=params, **plan)
    own = codec.error_feedback(codec.int4(4)) if feedback else codec.identity()
    update = codec.compress(psjax.local_update(quadratic, INNER), own, "w", fragments=plan)
    update = psjax.outer(update, NESTEROV) if outer else update
    step, state = mapped(update, how, N), update.init(params, N)
    parts = psjax.replicas(params, N).split(N)
    encode_decode = plain.int4 if feedback else None
    history, owns, residuals = plain_rounds(flat(params), plan, 9, encode_decode, 4, bad, outer)
    for r, expected in enumerate(history):
        targets = targets_of(r)
        for at, e in bad:
            targets[e] = np.nan if at == r else targets[e]
        params, state, _ = step(params, state, parts, jnp.asarray(targets)[:, None])
        close(flat(params), expected)
    inner = state.inner if outer else state
    for e in range(N):
        close(flat(jax.tree.map(lambda x, e=e: x[e], inner.own)), owns[e])
        if feedback:
            close(flat(jax.tree.map(lambda x, e=e: x[e], inner.residual)), residuals[e])
    if how != "pmap":
        assert step._cache_size() <= 2  # the first arguments lie elsewhere


@pytest.mark.usefixtures("x64")
def test_one_fragment_without_delay_is_a_round_without_fragments():
    params = start()
    parts, found = psjax.replicas(params, N).split(N), []
    for plan in (None, psjax.fragments(None, 1, like=params)):
        own = codec.int8(4)
        update = codec.compress(psjax.local_update(quadratic, INNER), own, "w", fragments=plan)
        step, state, w = mapped(update, "vmap", N), update.init(params, N), params
        for r in range(3):
            w, state, _ = step(w, state, parts, jnp.asarray(targets_of(r))[:, None])
        found.append(w)
    jax.tree.map(close, *found)


def test_a_round_in_the_middle_of_which_all_is_nan_leaves_weights_and_outer_state():
    params = start(np.float32)
    plan = psjax.fragments(None, 2, like=params)
    local = psjax.local_update(quadratic, INNER)
    update = codec.compress(local, codec.int4(4), "w", fragments=plan)
    update = psjax.outer(update, optax.adam(0.1))
    step, state = mapped(update, "vmap", N), update.init(params, N)
    parts = psjax.replicas(params, N).split(N)
    params, state, _ = step(params, state, parts, jnp.ones((N, 1, J)))
    new, after, _ = step(params, state, parts, jnp.full((N, 1, J), jnp.nan))
    jax.tree.map(np.testing.assert_array_equal, (new, after.outer), (params, state.outer))
    for group, name in zip(plan.groups, params, strict=True):  # what came in the round before
        expected = (
            state.inner.own[name] if group else jnp.broadcast_to(params[name], (N, *SHAPES[name]))
        )
        np.testing.assert_array_equal(after.inner.own[name], expected)


@pytest.mark.parametrize("fragments", [1, 4])
def test_the_peak_of_the_bytes_falls_with_the_fragments_and_resident_bytes_are_as_said(fragments):
    """A round sends at most the largest fragment; a worker holds one more copy of the weights.

    With a delay, another one of what is on its way.
    """
    n, params = 2, {name: jnp.ones((32, 16)) for name in "abcd"}
    plan = psjax.fragments(None, fragments, like=params, delay=fragments - 1)
    assert sorted(plan.groups) == sorted(i % fragments for i in range(4))
    local, own = psjax.local_update(quadratic, optax.sgd(0.1)), codec.int4(32)
    update = codec.compress(local, own, "w", fragments=plan)
    state = update.init(params, n)
    arguments = params, state, psjax.replicas(params, n).split(n), jnp.ones((n, 1, J))
    ledger = cost.ledger(mapped(update, "shard_map", n).lower(*arguments).compile())
    whole = 4 * 32 * 16
    shard = whole // fragments // n
    assert ledger.bytes_per_device == 2 * (n - 1) * own.bytes((shard,), jnp.float32)
    copies = 2 if fragments == 1 else 3  # shared, own, on their way
    small = 4 + 1 + 4 * J + (fragments if fragments > 1 else 0)  # count, valid, batch, arrives
    assert ledger.memory.argument == copies * 4 * whole + small


# ---------------------------------------------------------------------------------- the fragments


def test_fragments_are_about_equal_and_every_leaf_is_in_one():
    like = {f"{i:02}": jnp.ones(size) for i, size in enumerate([100, 1, 60, 40, 2, 99, 30, 70])}
    plan = psjax.fragments(None, 4, like=like)
    sizes = np.zeros(4, int)
    for group, x in zip(plan.groups, like.values(), strict=True):
        sizes[group] += x.size
    assert sizes.sum() == 402
    assert sizes.max() - sizes.min() <= 10
    assert sorted(i for f in range(4) for i in plan.leaves(f)) == list(range(8))


def test_axes_alone_are_divided_in_turn_and_inferred_axes_know_the_sizes():
    axes = {"a": P("h"), "b": P(), "c": None, "d": P(None, "h")}
    assert psjax.fragments(axes, 2).groups == (0, 1, 0, 1)
    apply = lambda w, x: jnp.tanh(x @ w["in"]) @ w["out"]
    w = {"in": jnp.ones((50, 4)), "out": jnp.ones((4, 2)), "unused": jnp.ones((150,))}
    found = psjax.infer_axes(apply, w, jnp.ones((3, 50)))
    assert psjax.fragments(found, 2).groups == (0, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_fragments=5), r"num_fragments=5\): the parameters have 4 leaves; .* 1 to 4"),
        (dict(num_fragments=0), r"num_fragments=0\)"),
        (dict(num_fragments=2, delay=2), r"delay=2\): a fragment is sent every 2 rounds .* 0 to 1"),
        (dict(num_fragments=2, delay=-1), r"delay=-1\)"),
        (dict(num_fragments=2, mixing=1.0), r"mixing=1.0\): pass the share"),
    ],
)
def test_a_wrong_number_is_refused(options, message):
    with pytest.raises(ValueError, match=r"fragments\(" + message):
        psjax.fragments(None, like=start(np.float32), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: ({**w, "e": w["a"]}, psjax.replicas({**w, "e": w["a"]}, 1)), r"differ in \['e'"),
        (
            lambda w: (
                w,
                psjax.select({"a": P("h"), "b": None, "c": None, "d": None}, {"h": [[0]]}, like=w),
            ),
            "each must hold all",
        ),
        (
            lambda w: (w, psjax.replicas(w, 1).drop(jax.tree.map(lambda _: True, w))),
            "without Selec",
        ),
    ],
)
def test_what_fragments_do_not_fit_is_refused(change, message):
    params = start(np.float32)
    plan = psjax.fragments(None, 2, like=params)
    local = psjax.local_update(quadratic, INNER)
    update = codec.compress(local, codec.identity(), "w", fragments=plan)
    params, selection = change(params)
    with pytest.raises(ValueError, match=r"compress\(fragments=...\): .*" + message):
        jax.vmap(lambda b: update(params, update.init(params), selection, b), axis_name="w")(
            jnp.ones((1, 1, J))
        )


def test_fragments_around_an_exchange_between_owners_are_refused():
    exchange = psjax.ist.exchange(psjax.local_update(quadratic, INNER), "w")
    plan = psjax.fragments(None, 2, like=start(np.float32))
    with pytest.raises(ValueError, match="whose workers are on axis 'w', pass neither"):
        codec.compress(exchange, codec.identity(), fragments=plan)
