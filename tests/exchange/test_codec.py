"""Theorems about codecs and encoded means: what they lose, what they send, what they refuse."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import psjax
from psjax import codec, cost
from tests import separable_model as model

INTEGERS = {"int8": (codec.int8, 127, 8), "int4": (codec.int4, 7, 4), "int2": (codec.int2, 1, 2)}
each_integer = pytest.mark.parametrize("name", INTEGERS)
ALL = [codec.identity(), codec.cast(jnp.bfloat16), codec.cast(jnp.float16)]
ALL += [codec.int8(8), codec.int4(8), codec.int2(8), codec.top_k(0.3)]
ALL += [codec.error_feedback(codec.int2(8))]
each_codec = pytest.mark.parametrize("own", ALL, ids=repr)


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --------------------------------------------------------------------------------- one array


@each_integer
def test_in_expectation_what_is_decoded_is_what_was_encoded(name):
    """Of 4096 keys the mean is within 4 sigma, entry by entry; and no entry moves by a scale."""
    own, largest = INTEGERS[name][0](16), INTEGERS[name][1]
    x = normal(64) * np.repeat(10.0 ** np.arange(-2, 2), 16).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 4096)
    found = jax.jit(jax.vmap(lambda key: own.decode(own.encode(key, x), x)))(keys)
    found = np.asarray(found, np.float64)
    scale = np.repeat(np.abs(x).reshape(4, 16).max(axis=1) / largest, 16)
    above = x / scale - np.floor(x / scale)
    sigma = scale * np.sqrt(above * (1 - above) / len(keys))
    assert (np.abs(found.mean(axis=0) - x) <= 4 * sigma + 1e-6 * scale).all()
    assert (np.abs(found - x) < 1.00001 * scale).all()


def plain_integers(x, largest, bits, block):
    """Codes packed into bytes and scales, in loops; rounded to the nearest."""
    codes, scales = [], []
    for start in range(0, len(x), block):
        part = x[start : start + block]
        scales.append(max(abs(part)) / x.dtype.type(largest))
        codes += [int(np.rint(v / scales[-1])) for v in part]
    packed = []
    for start in range(0, len(codes), 8 // bits):
        byte = 0
        for place, code in enumerate(codes[start : start + 8 // bits]):
            byte += (code % 2**bits) << (place * bits)
        packed.append(byte)
    decoded = [code * scales[i // block] for i, code in enumerate(codes)]
    return packed, scales, decoded


@pytest.mark.usefixtures("x64")
@each_integer
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packed_bits_are_those_of_plain_loops(name, dtype):
    make, largest, bits = INTEGERS[name]
    own, x = make(12), normal(36, dtype=dtype)
    packed, scales = own.encode(None, x)
    expected, plain_scales, decoded = plain_integers(x, largest, bits, 12)
    assert np.asarray(packed).view(np.uint8).tolist() == expected
    close = dict(rtol=2 * np.finfo(dtype).eps)  # XLA divides by multiplying
    np.testing.assert_allclose(scales, plain_scales, **close)
    np.testing.assert_allclose(own.decode((packed, scales), x), decoded, **close)
    assert own.bytes(x.shape, dtype) == 36 * bits // 8 + 3 * x.itemsize


@each_codec
@pytest.mark.parametrize("shape", [(24,), (8, 5)])
def test_bytes_are_those_of_the_packed_arrays(own, shape):
    packed = own.encode(jax.random.key(0), normal(*shape))
    assert own.bytes(shape, jnp.float32) == sum(x.nbytes for x in packed)
    decoded = own.decode(packed, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert (decoded.shape, decoded.dtype) == (shape, jnp.float32)


def test_bytes_of_a_block_are_its_bits_and_one_scale():
    sizes = [own.bytes((64,), jnp.float32) for own in ALL[:6]]
    assert sizes == [256, 128, 128, 64 + 8 * 4, 32 + 8 * 4, 16 + 8 * 4]
    assert codec.top_k(0.1).bytes((1000,), jnp.float32) == 100 * (4 + 2)
    assert codec.top_k(0.1).bytes((100,), jnp.float32) == 10 * (4 + 1)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_a_cast_rounds_as_numpy_does(dtype):
    x = normal(50) * 100
    own = codec.cast(dtype)
    found = own.decode(own.encode(None, x), x)
    np.testing.assert_array_equal(found, x.astype(dtype).astype(np.float32))


@pytest.mark.parametrize("fraction", [0.01, 0.25, 1.0])
def test_top_k_keeps_the_largest(fraction):
    own, x = codec.top_k(fraction), normal(40)
    expected = np.zeros_like(x)
    for i in sorted(range(40), key=lambda i: -abs(x[i]))[: max(1, math.ceil(40 * fraction))]:
        expected[i] = x[i]
    np.testing.assert_array_equal(own.decode(own.encode(None, x), x), expected)


@each_integer
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_that_is_not_finite_is_decoded_as_nan_and_the_others_as_they_are(name, bad):
    own, x = INTEGERS[name][0](8), normal(24)
    clean = np.asarray(own.decode(own.encode(jax.random.key(0), x), x))
    x[9] = bad
    found = np.asarray(own.decode(own.encode(jax.random.key(0), x), x)).reshape(3, 8)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], clean.reshape(3, 8)[[0, 2]])


@pytest.mark.parametrize("own", [codec.top_k(0.1), codec.cast(jnp.bfloat16)], ids=repr)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_entry_that_is_not_finite_does_not_become_finite(own, bad):
    x = normal(20)
    x[3] = bad
    assert not np.isfinite(own.decode(own.encode(None, x), x)[3])


@each_codec
def test_numbers_below_the_smallest_normal_one_stay_small_and_finite(own):
    x = np.full(16, 1e-40, np.float32)
    x[8:] = [0.0, -0.0, 1e-45, -1e-42, 1e-38, 0.0, 0.0, 0.0]
    found = np.asarray(own.decode(own.encode(jax.random.key(0), x), x))
    assert np.isfinite(found).all()
    assert (np.abs(found) <= 1.2e-38).all()


@each_codec
def test_zeros_are_decoded_as_zeros(own):
    x = np.zeros(16, np.float32)
    np.testing.assert_array_equal(own.decode(own.encode(jax.random.key(0), x), x), x)


# ------------------------------------------------------------------------------------ their mean


def plain_mean(rows, encode_decode, block):
    """Shards to their owners, decoded, averaged, and encoded once more; float64, in loops."""
    n, size = len(rows), len(rows[0])
    length = block * math.ceil(math.ceil(size / n) / block)
    padded = [np.concatenate([row, np.zeros(n * length - size)]) for row in rows]
    mean = []
    for owner in range(n):
        at = slice(owner * length, (owner + 1) * length)
        total = np.zeros(length)
        for row in padded:
            total = total + encode_decode(row[at])
        mean.append(encode_decode(total / n))
    return np.concatenate(mean)[:size]


def int4_plain(x):
    if not x.any():
        return x
    blocks = [x[i : i + 4] for i in range(0, len(x), 4)]
    return np.concatenate([plain_integers(b, 7, 4, 4)[2] if b.any() else b for b in blocks])


def top_k_plain(x):
    out = np.zeros_like(x)
    for i in sorted(range(len(x)), key=lambda i: -abs(x[i]))[: math.ceil(0.3 * len(x))]:
        out[i] = x[i]
    return out


def mapped(fn, how, n):
    """`fn` of each of n workers' rows, to one result that all share."""
    devices = jax.devices()[:n]
    if how == "vmap":
        return jax.jit(jax.vmap(fn, out_axes=None, axis_name="workers"))
    if how == "pmap":
        return jax.pmap(fn, out_axes=None, axis_name="workers", devices=devices)
    mesh = jax.make_mesh((n,), ("workers",), axis_types=(AxisType.Auto,), devices=devices)
    body = lambda tree: fn(jax.tree.map(lambda x: x[0], tree))
    check = "False" not in how
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P("workers"), out_specs=P(), check_vma=check)
    )


HOW = ["vmap", "pmap", "shard_map", "shard_map, check_vma=False"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("how", "n", "own", "plain"),
    [(how, 2, codec.int4(4), int4_plain) for how in HOW]
    + [("vmap", 8, codec.int4(4), int4_plain), ("shard_map", 4, codec.top_k(0.3), top_k_plain)],
    ids=lambda x: getattr(x, "__name__", None) or repr(x),
)
def test_an_encoded_mean_is_that_of_plain_loops(how, n, own, plain):
    """Two leaves whose 19 entries no number of workers divides; rounded to the nearest."""
    rows = normal(n, 19, dtype=np.float64)
    tree = {"a": rows[:, :6].reshape(n, 2, 3), "b": rows[:, 6:]}
    found = mapped(lambda x: codec.mean(x, "workers", own), how, n)(tree)
    found = np.concatenate([np.ravel(found["a"]), found["b"]])
    np.testing.assert_allclose(found, plain_mean(rows, plain, own.block), rtol=1e-12, atol=1e-14)


def test_the_identity_s_mean_is_pmean_bit_for_bit():
    rows = normal(4, 19)
    found = mapped(lambda x: codec.mean(x, "workers", codec.identity()), "shard_map", 4)(rows)
    expected = mapped(lambda x: jax.lax.pmean(x, "workers"), "shard_map", 4)(rows)
    np.testing.assert_array_equal(found, expected)


def test_in_expectation_an_encoded_mean_is_the_mean():
    """Of 2048 keys; rounded by the workers and once more by the owner of the shard."""
    own, x = codec.int8(4), np.full((4, 4), [127.0, 0.5, -3.25, 10.1], np.float32)
    mean = jax.vmap(lambda x, k: codec.mean(x, "w", own, k), (0, None), None, axis_name="w")
    keys = jax.random.split(jax.random.key(0), 2048)
    found = np.asarray(jax.jit(jax.vmap(mean, (None, 0)))(x, keys), np.float64)
    assert (np.abs(found.mean(axis=0) - x[0]) <= 4 * np.sqrt(0.25 * 2 / len(keys))).all()


@pytest.mark.usefixtures("x64")
def test_with_error_feedback_what_was_sent_and_what_is_kept_add_up():
    n, own = 4, codec.error_feedback(codec.int2(4))
    step = jax.jit(
        jax.vmap(
            lambda x, e: codec.mean(x, "workers", own, residual=e),
            out_axes=(None, 0),
            axis_name="workers",
        )
    )
    residual, sent, total = np.zeros((n, 19)), np.zeros(19), np.zeros(19)
    for number in range(5):
        x = normal(n, 19, seed=number, dtype=np.float64)
        mean, residual = step(x, residual)
        sent, total = sent + mean, total + x.mean(axis=0)
    np.testing.assert_allclose(sent + residual.mean(axis=0), total, rtol=1e-12, atol=1e-12)
    assert np.abs(residual).max() < 10


# ------------------------------------------------------------------------------------ its bytes


@pytest.mark.parametrize("how", ["pmap", "shard_map"])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_the_compiled_program_sends_the_packed_bits_and_the_scales(how, n):
    """Each worker sends n - 1 encoded shards to their owners, and its own to n - 1 others."""
    x = jnp.asarray(normal(n, 1000))
    few = [codec.int4(64), codec.top_k(0.1)]
    for own in ALL[1:7] if (how, n) == ("shard_map", 2) else few[: 1 + (how == "shard_map")]:
        fn = lambda x, own=own: codec.mean(x, "workers", own, jax.random.key(0))
        ledger = cost.ledger(mapped(fn, how, n).lower(x).compile(), metrics_below=1)
        shard = own.block * math.ceil(math.ceil(1000 / n) / own.block)
        assert ledger.bytes_per_device == 2 * (n - 1) * own.bytes((shard,), jnp.float32)
        assert ledger.bytes == cost.encoded_mean(1000, n, own)
        assert {c.kind for c in ledger.collectives} <= {"all-to-all", "all-gather"}


def test_the_formula_of_the_identity_is_a_ring_all_reduce():
    x = jnp.asarray(normal(4, 1000))
    fn = lambda x: codec.mean(x, "workers", codec.identity())
    ledger = cost.ledger(mapped(fn, "shard_map", 4).lower(x).compile())
    assert ledger.bytes == cost.encoded_mean(1000, 4, codec.identity()) == 2 * 3 * 4000


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: codec.int8(0), r"int8\(block=0\): pass a positive number"),
        (lambda: codec.int4(7), r"int4\(block=7\): pass a multiple of 2, for as many numbers"),
        (lambda: codec.int2(6), r"int2\(block=6\): pass a multiple of 4"),
        (lambda: cost.encoded_mean(0, 2, codec.int8()), r"encoded_mean\(num_floats=0\)"),
        (lambda: codec.top_k(0.0), r"top_k\(fraction=0.0\): pass a fraction .* above 0"),
        (lambda: codec.top_k(1.5), r"top_k\(fraction=1.5\)"),
        (lambda: codec.int8(8).encode(None, np.zeros(12, np.float32)), "12 entries is not a whole"),
    ],
)
def test_a_wrong_number_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: codec.cast(jnp.int8), r"cast\(dtype=int8\): pass a dtype of floats"),
        (lambda: codec.int8(2).encode(None, np.zeros(4, np.int32)), r"the array is int32\[4\]"),
        (lambda: codec.top_k(0.5).encode(None, np.zeros(4, np.complex64)), r"complex64\[4\]"),
        (lambda: codec.error_feedback(ALL[-1]), "the error is kept once"),
        (
            lambda: codec.mean({"a": jnp.zeros(2, jnp.int32)}, "w", codec.int8(2)),
            r"mean\(tree\): \['a'\] is int32\[2\]",
        ),
    ],
)
def test_what_is_no_float_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize("residual", [None, jnp.zeros(4)])
def test_a_residual_and_error_feedback_belong_together(residual):
    own = ALL[-1] if residual is None else codec.int8(4)
    with pytest.raises(ValueError, match=r"mean\(codec=.*residual="):
        codec.mean(jnp.zeros(4), "w", own, residual=residual)


def test_codecs_of_equal_numbers_are_equal():
    assert codec.int4(64) == codec.int4(64) != codec.int4(32)
    names = "identity() cast(bfloat16) cast(float16) int8(8) int4(8) int2(8) top_k(0.3)".split()
    assert [repr(own) for own in ALL] == [*names, "error_feedback(int2(8))"]
    assert isinstance(codec.int2(4), psjax.codec.Codec)
    assert len({*ALL, *ALL}) == len(ALL)


# ------------------------------------------------------------------- gradients of plans and scores


def plan_step(kind, own, key=None):
    """A step of a plan, or of score exchange, over 8 workers, and its arguments."""
    C, W = 10, 8
    plan = {"cyclic": psjax.plan.cyclic, "elements": psjax.plan.elements}.get(kind)
    w = model.init(C, jnp.float32)
    store = psjax.plan.Store(model.AXES, w, W)
    shards = store.shard(w)
    specs = store.specs(shards, "workers")
    x, labels = model.make_data(C, 40, jnp.float32)
    if plan is None:
        scores = lambda w, batch: model.scores(w, batch["x"])
        loss = lambda scores, batch: jnp.mean(
            jax.nn.logsumexp(scores, axis=1)
            - jnp.take_along_axis(scores, batch["label"][:, None], axis=1)[:, 0]
        )
        body = psjax.baselines.score_exchange(scores, loss, store, "workers", own)
        batch, where = {"x": x, "label": jnp.asarray(labels)}, P()
    else:
        plan = plan(C, W)
        rows = plan.batches(labels, 40)
        x = np.pad(x, [(0, 1), (0, 0)])  # the empty slot
        batch = {"x": x[rows.indices[0]], "weight": jnp.asarray(rows.weights[0], jnp.float32)}
        body = psjax.plan.value_and_grad(model.element, plan, store, "workers", own)
        where = P("workers")

    def step(shards, batch):
        batch = batch if plan is None else jax.tree.map(lambda x: x[0], batch)
        return body(shards, batch, key)[1]

    mesh = jax.make_mesh((W,), ("workers",), axis_types=(AxisType.Auto,))
    fn = jax.shard_map(step, mesh=mesh, in_specs=(specs, where), out_specs=specs)
    return jax.jit(fn).lower(shards, batch).compile(), (shards, batch)


@pytest.mark.parametrize("kind", ["cyclic", "elements", "scores"])
def test_gradients_of_plans_and_scores_return_encoded(kind):
    """Near those that return as they are, in fewer bytes; weights and scores go as they are."""
    exact, arguments = plan_step(kind, None)
    encoded, _ = plan_step(kind, codec.int8(8), jax.random.key(0))
    pairs = list(zip(*(jax.tree.leaves(f(*arguments)) for f in (exact, encoded)), strict=True))
    for a, b in pairs:
        assert np.abs(a - b).max() < 0.1 * np.abs(a).max() + 1e-6
    assert any((a != b).any() for a, b in pairs)
    sent = [cost.ledger(program).bytes for program in (exact, encoded)]
    assert 0.5 < sent[1] / sent[0] < 0.99


def test_a_plan_has_no_place_for_error_feedback():
    with pytest.raises(
        ValueError, match=r"plan.value_and_grad\(codec=error_feedback.*keeps no err"
    ):
        plan_step("cyclic", ALL[-1])
