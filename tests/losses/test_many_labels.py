"""The softmax over very many labels in chunks is the softmax; it never holds a row of scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from psjax import losses

B, H, L, K = 7, 5, 23, 4
CHUNKS = (1, 5, 22, 23, 1000)  # one label; not dividing L; all but one; L; more than L
named_chunks = pytest.mark.parametrize("chunk", CHUNKS)


def _case(seed=0, dtype=np.float64, batch=B):
    """Lists of 0 to K labels, padding in the middle too; the last sample has none."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, L, (batch, K))
    labels[rng.random((batch, K)) < 0.3] = L
    labels[0], labels[-1] = [3, L, 3, L - 1], L  # one label twice; no label
    arrays = rng.normal(size=(batch, H)), rng.normal(size=(H, L)), rng.normal(size=L)
    return *(jnp.asarray(x, dtype) for x in arrays), jnp.asarray(labels, jnp.int32)


def _by_loops(*arguments):
    """The formula, in NumPy, sample by sample and label by label."""
    hidden, kernel, bias, labels = (None if x is None else np.asarray(x) for x in arguments)
    out = np.zeros(len(hidden))
    for b in range(len(hidden)):
        scores = hidden[b] @ kernel + (0 if bias is None else bias)
        own = [scores[y] for y in labels[b] if y < len(scores)]
        if own:
            top = scores.max()
            out[b] = top + np.log(np.sum(np.exp(scores - top))) - sum(own) / len(own)
    return out


def _dense(hidden, kernel, bias, labels):
    """The same with whole rows of scores, for JAX to differentiate."""
    scores = hidden @ kernel + (0 if bias is None else bias)
    counts = jax.nn.one_hot(labels, kernel.shape[1], dtype=scores.dtype).sum(axis=1)
    number = counts.sum(axis=1)
    own = jnp.sum(counts * scores, axis=1) / jnp.maximum(number, 1)
    return jnp.where(number > 0, jax.nn.logsumexp(scores, axis=1) - own, 0)


def _scalar(fn, *chunk):
    """A sum in which every sample counts differently."""

    def scalar(hidden, kernel, bias, labels):
        values = fn(hidden, kernel, bias, labels, *chunk)
        return jnp.sum(values * jnp.cos(jnp.arange(values.size, dtype=values.dtype)))

    return scalar


def _close(got, want, rtol=1e-12):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        np.testing.assert_allclose(g, w, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(("chunk", "biased"), [*((c, True) for c in CHUNKS), (5, False)])
def test_equals_the_formula_with_its_gradients(x64, chunk, biased):
    hidden, kernel, bias, labels = _case()
    arguments = (hidden, kernel, bias if biased else None, labels)
    argnums = (0, 1, 2) if biased else (0, 1)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        fn = jax.jit(lambda *x: losses.many_label_cross_entropy(*x, chunk_size=chunk))
        _close(fn(*arguments), _by_loops(*arguments))
        got = jax.jit(jax.grad(_scalar(fn), argnums))(*arguments)
    _close(got, jax.jit(jax.grad(_scalar(_dense), argnums))(*arguments))


def test_gradients_equal_finite_differences(x64):
    *arrays, labels = _case()
    loss = jax.jit(lambda *x: losses.many_label_cross_entropy(*x, labels, chunk_size=4))
    check_grads(loss, arrays, order=1, modes=["rev"])


def test_one_label_each_is_the_negative_log_likelihood(x64):
    hidden, kernel, bias, _ = _case()
    labels = jnp.arange(B) * 3
    got = losses.many_label_cross_entropy(hidden, kernel, bias, labels[:, None], chunk_size=6)
    _close(got, losses.nll_with_integer_labels(hidden @ kernel + bias, labels))


def test_an_empty_list_counts_nothing_whatever_its_sample_is(x64):
    hidden, kernel, bias, labels = _case()
    hidden = hidden.at[-1].set(jnp.inf)
    loss = lambda *x: losses.many_label_cross_entropy(*x, labels, chunk_size=4).sum()
    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(hidden, kernel, bias)
    others = lambda *x: losses.many_label_cross_entropy(*x, labels[:-1], chunk_size=4).sum()
    want, want_grads = jax.jit(jax.value_and_grad(others, (0, 1, 2)))(hidden[:-1], kernel, bias)
    assert np.all(grads[0][-1] == 0)
    _close((value, grads[0][:-1], *grads[1:]), (want, *want_grads))
    nothing = losses.many_label_cross_entropy(hidden, kernel, bias, labels[:, :0])
    np.testing.assert_array_equal(nothing, np.zeros(B))


def test_vmap_over_subnets_and_scan_over_steps(x64):
    """Subnets with kernels of their own, J steps each: as the loops do it."""
    cases = [[_case(seed=10 * s + j) for j in range(3)] for s in range(2)]
    kernels = jnp.stack([case[0][1] for case in cases])
    biases = jnp.stack([case[0][2] for case in cases])
    hidden = jnp.stack([jnp.stack([case[0] for case in steps]) for steps in cases])
    labels = jnp.stack([jnp.stack([case[3] for case in steps]) for steps in cases])

    def descend(fn, *chunk):
        def local(kernel, bias, hidden, labels):
            def step(carry, batch):
                value, grads = jax.value_and_grad(_scalar(fn, *chunk), (0, 1, 2))(
                    batch[0], *carry, batch[1]
                )
                carry = jax.tree.map(lambda x, g: x - 0.1 * g, carry, grads[1:])
                return carry, (value, grads[0])

            return jax.lax.scan(step, (kernel, bias), (hidden, labels))

        return local

    arguments = (kernels, biases, hidden, labels)
    got = jax.jit(jax.vmap(descend(losses.many_label_cross_entropy, 5)))(*arguments)
    dense = descend(_dense)
    each = [jax.jit(dense)(*(x[s] for x in arguments)) for s in range(2)]
    _close(got, jax.tree.map(lambda *x: jnp.stack(x), *each))


def test_vmap_of_the_samples_alone_does_not_repeat_the_kernel(x64):
    hidden, kernel, bias, labels = _case(batch=6)
    batches = hidden.reshape(3, 2, H), labels.reshape(3, 2, K)
    fn = lambda h, y: losses.many_label_cross_entropy(h, kernel, bias, y, chunk_size=5)
    _close(jax.vmap(fn)(*batches).reshape(-1), _dense(hidden, kernel, bias, labels))
    assert f"f64[3,{H},{L}]" not in str(jax.make_jaxpr(jax.vmap(fn))(*batches))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_shard_map_over_samples(x64, check_vma, inside):
    """The layer replicated, the samples split; differentiated inside and from outside."""
    arguments = _case(batch=8)
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    local = lambda *x: losses.many_label_cross_entropy(*x, chunk_size=5).sum()
    specs = (P("x"), P(), P(), P("x"))
    shard = lambda fn, out: jax.shard_map(
        fn, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check_vma
    )

    def body(*x):
        grads = jax.grad(local, (0, 1, 2))(*x)
        # With check_vma the gradients of what is replicated are summed already.
        return grads if check_vma else (grads[0], *jax.lax.psum(grads[1:], "x"))

    outside = lambda *x: shard(lambda *x: jax.lax.psum(local(*x), "x"), P())(*x)
    gradient = shard(body, (P("x"), P(), P())) if inside else jax.grad(outside, (0, 1, 2))
    want = jax.jit(jax.grad(lambda *x: _dense(*x).sum(), (0, 1, 2)))(*arguments)
    _close(jax.jit(gradient)(*arguments), want)


def test_shard_map_over_subnets(x64):
    """Every device its own layer, one sample list for all."""
    hidden, kernel, bias, labels = _case()
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    kernels, biases = jnp.stack([kernel, -kernel]), jnp.stack([bias, 2 * bias])
    loss = lambda w, b: losses.many_label_cross_entropy(hidden, w[0], b[0], labels, chunk_size=5)
    body = lambda w, b: jax.grad(lambda *x: loss(*x).sum(), (0, 1))(w, b)
    got = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x")))(
        kernels, biases
    )
    for s in range(2):
        want = jax.grad(lambda *x: _dense(hidden, *x, labels).sum(), (0, 1))(kernels[s], biases[s])
        _close([x[s] for x in got], want)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_mesh_with_one_axis_mapped_and_one_left_to_jax(x64, kind):
    """Samples split over both, the layer replicated: in `shard_map` it must vary as they do."""
    hidden, kernel, bias, labels = _case(batch=8)
    mesh = jax.make_mesh((2, 2), ("x", "y"), (kind,) * 2, devices=jax.devices()[:4])
    body = lambda *x: losses.many_label_cross_entropy(*x, chunk_size=5)
    with jax.set_mesh(mesh):
        over = jax.NamedSharding(mesh, P(("x", "y")))
        split = jax.shard_map(
            body, in_specs=(P("x"), P(), P(), P("x")), out_specs=P("x"), axis_names={"x"}
        )
        samples = [jax.device_put(x, over) for x in (hidden, labels)]
        got = jax.jit(split)(samples[0], kernel, bias, samples[1])
    _close(jax.device_get(got), _by_loops(hidden, kernel, bias, labels))


def _temporary_bytes(fn, *shapes):
    return jax.jit(fn).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("differentiated", [False, True])
def test_memory_is_of_the_chunk_not_of_the_labels(differentiated):
    """Beside two blocks [B, chunk] and two of columns [H, chunk], next to nothing is held."""
    batch, hidden, many, listed, chunk = 64, 16, 200_000, 5, 4096
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((batch, listed), jnp.int32)
    fn = lambda *x: losses.many_label_cross_entropy(*x, chunk_size=chunk).mean()
    fn = jax.value_and_grad(fn, (0, 1, 2)) if differentiated else fn
    used = _temporary_bytes(fn, of(batch, hidden), of(hidden, many), of(many), labels)
    assert used < 4 * chunk * (2 * batch + 2 * hidden) + 2**18
    assert used < batch * many * 4 / 10  # a tenth of one block of scores, of which dense holds two


def test_memory_of_top_k_is_of_the_chunk():
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    fn = lambda *x: losses.top_k_labels(*x, k=5, chunk_size=4096)
    used = _temporary_bytes(fn, of(64, 16), of(16, 200_000), of(200_000))
    assert used < 64 * 200_000 * 4 / 10


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores_are_finite_in_float32(size):
    """Scores of 1e4 in one chunk, of -1e4 in another; and all of them that far from 0."""
    labels = jnp.array([[0, 8], [4, 8]])
    hidden = jnp.ones((2, 1))
    loss = jax.jit(lambda *x: losses.many_label_cross_entropy(*x, None, labels, chunk_size=3))
    for kernel in (jnp.full((1, 8), size), jnp.full((1, 8), size).at[0, 3:5].multiply(-1)):
        grads = jax.jit(jax.grad(lambda *x: loss(*x).sum(), (0, 1)))(hidden, kernel)
        np.testing.assert_allclose(
            loss(hidden, kernel), _by_loops(hidden, kernel, None, labels), rtol=1e-6
        )
        assert all(jnp.isfinite(g).all() for g in grads)


def test_labels_masked_by_minus_infinity_have_no_part(x64):
    hidden, kernel, bias, _ = _case()
    labels = jnp.full((B, 1), 20)
    masked = bias.at[:10].set(-jnp.inf)
    loss = lambda w, b, y: losses.many_label_cross_entropy(hidden, w, b, y, chunk_size=5)
    got = jax.jit(jax.value_and_grad(lambda w: loss(w, masked, labels).sum()))(kernel)
    rest = lambda w: loss(w[:, 10:], bias[10:], labels - 10).sum()
    _close(got, jax.jit(jax.value_and_grad(rest))(kernel))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    hidden, kernel, bias, labels = _case(dtype=np.float32)
    narrow = tuple(x.astype(dtype) for x in (hidden, kernel, bias))
    loss = jax.jit(lambda *x: losses.many_label_cross_entropy(*x, labels, chunk_size=5))
    assert loss(*narrow).dtype == jnp.float32
    got = jax.jit(jax.grad(lambda *x: loss(*x).sum(), (0, 1, 2)))(*narrow)
    assert all(g.dtype == dtype for g in got)
    wide = [x.astype(jnp.float32) for x in narrow]
    _close(loss(*narrow), _dense(*wide, labels), 1e-5)
    want = jax.jit(jax.grad(lambda *x: _dense(*x, labels).sum(), (0, 1, 2)))(*wide)
    _close([g.astype(jnp.float32) for g in got], want, 1e-5 if dtype == jnp.float32 else 5e-2)


def test_labels_out_of_range_give_nan_never_a_number():
    labels = jnp.array([[-1, 0], [9, 0], [9, 10], [0, 8]])
    hidden, kernel = jnp.ones((4, 2)), jnp.ones((2, 8))
    loss = jax.jit(lambda h: losses.many_label_cross_entropy(h, kernel, None, labels, chunk_size=3))
    gradient = jax.jit(jax.grad(lambda h: loss(h).sum()))(hidden)
    assert np.array_equal(jnp.isnan(loss(hidden)), [True, True, True, False])
    assert np.array_equal(jnp.isnan(gradient).all(axis=1), [True, True, True, False])


def test_a_label_is_the_same_number_in_every_type(x64):
    """Also with more labels than the type can hold."""
    labels = np.array([[0, 44], [255, 3]], np.uint8)
    rng = np.random.default_rng(0)
    hidden, kernel = jnp.asarray(rng.normal(size=(2, 3))), jnp.asarray(rng.normal(size=(3, 300)))

    @jax.jit
    def run(labels):
        loss = lambda *x: losses.many_label_cross_entropy(*x, None, labels, chunk_size=70).sum()
        return jax.value_and_grad(loss, (0, 1))(hidden, kernel)

    got, want = run(labels), run(labels.astype(np.int32))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert np.isfinite(got[0])


def test_a_label_that_int32_would_wrap_into_range_gives_nan(x64):
    labels = jnp.array([[1, 8], [2**32 + 1, 8], [2**32 + 8, 1]])
    loss = lambda h: losses.many_label_cross_entropy(h, jnp.ones((2, 8)), None, labels)
    np.testing.assert_array_equal(np.isnan(jax.jit(loss)(jnp.ones((3, 2)))), [False, True, True])


@named_chunks
@pytest.mark.parametrize("k", [1, 3, 21, L])
def test_top_k_is_that_of_all_scores(x64, chunk, k):
    """Small integers: many ties, across chunks too."""
    hidden, kernel, bias, _ = (jnp.round(x) for x in _case())
    got = losses.top_k_labels(hidden, kernel, bias, k, chunk_size=chunk)
    scores = hidden @ kernel + bias
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, jax.lax.top_k(scores, k)[1])
    without = losses.top_k_labels(hidden, kernel, None, k, chunk_size=chunk)
    np.testing.assert_array_equal(without, jax.lax.top_k(hidden @ kernel, k)[1])


def test_top_k_under_vmap_and_shard_map(x64):
    hidden, kernel, bias, _ = _case(batch=6)
    want = jax.lax.top_k(hidden @ kernel + bias, 3)[1]
    fn = lambda h, w, b: losses.top_k_labels(h, w, b, 3, chunk_size=4)
    mesh = jax.make_mesh((2,), ("x",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.shard_map(fn, mesh=mesh, in_specs=(P("x"), P(), P()), out_specs=P("x"))
    np.testing.assert_array_equal(jax.jit(spread)(hidden, kernel, bias), want)
    batched = jax.vmap(fn, (0, None, None))(hidden.reshape(3, 2, H), kernel, bias)
    np.testing.assert_array_equal(batched.reshape(6, 3), want)


@pytest.mark.usefixtures("any_type")
def test_bad_input_is_named():
    hidden, kernel, bias, labels = _case(dtype=np.float32)
    loss, top = losses.many_label_cross_entropy, losses.top_k_labels
    with pytest.raises(ValueError, match=r"hidden has shape \(7, 4\) and kernel \(5, 23\); pass"):
        loss(hidden[:, :4], kernel, bias, labels)
    with pytest.raises(ValueError, match=r"bias has shape \(22,\) and kernel \(5, 23\); pass bias"):
        loss(hidden, kernel, bias[1:], labels)
    with pytest.raises(ValueError, match=r"labels have shape \(7,\) and hidden \(7, 5\); pass"):
        loss(hidden, kernel, bias, labels[:, 0])
    with pytest.raises(ValueError, match="at least one label"):
        loss(hidden, kernel[:, :0], None, labels)
    with pytest.raises(ValueError, match="chunk_size=0; pass 1 or more"):
        loss(hidden, kernel, bias, labels, chunk_size=0)
    with pytest.raises(TypeError, match="labels are float32; pass integers"):
        loss(hidden, kernel, bias, labels.astype(jnp.float32))
    with pytest.raises(TypeError, match="dtypes are float32, bfloat16, float32; pass one float"):
        loss(hidden, kernel.astype(jnp.bfloat16), bias, labels)
    with pytest.raises(TypeError, match="dtypes are int32, int32; pass one floating dtype"):
        top(hidden.astype(int), kernel.astype(int), None, 1)
    with pytest.raises(ValueError, match="k=24 with 23 labels; k must be from 1 to 23"):
        top(hidden, kernel, bias, 24)
    with pytest.raises(ValueError, match="k=0 with 23 labels"):
        top(hidden, kernel, bias, 0)
    with pytest.raises(ValueError, match="chunk_size=-1; pass 1 or more"):
        top(hidden, kernel, bias, 1, chunk_size=-1)
