"""Networks for subnets: layers equal Flax's, subnets fit, what is sparse stays sparse."""

import functools
import itertools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import psjax
from tests.ist.test_ist import normal, perturbed


def close(actual, expected, tolerance=1e-12):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


def unboxed(net, *args, **kwargs):
    """Perturbed variables, and their axes."""
    variables = jax.eval_shape(functools.partial(net.init, **kwargs), jax.random.key(0), *args)
    blank = jax.tree.map(lambda x: np.ones(x.shape), nn.unbox(variables))
    return perturbed(blank), nn.get_partition_spec(variables)


# ------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize("shape", [(7, 4), (3, 5, 2, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_subnet_norm_is_flaxs_batch_norm(x64, shape, affine):
    """Training, its running averages, and prediction with them; the features are the last axis."""
    options = {"use_scale": affine, "use_bias": affine, "momentum": 0.8, "epsilon": 1e-3}
    own, flax = psjax.nn.SubnetNorm("h", **options), nn.BatchNorm(**options)
    x = jnp.asarray(3 + 2 * normal(*shape))
    variables, _ = unboxed(own, x, train=True)

    @jax.jit
    def run(variables):
        mutable = ["batch_stats"]
        return {
            "train": own.apply(variables, x, train=True, mutable=mutable),
            "predict": own.apply(variables, x, train=False),
        }, {
            "train": flax.apply(variables, x, use_running_average=False, mutable=mutable),
            "predict": flax.apply(variables, x, use_running_average=True),
        }

    close(*run(variables))


def test_training_needs_no_statistics_and_changes_them_only_where_they_are_mutable(x64):
    norm, x = psjax.nn.SubnetNorm("h"), jnp.asarray(normal(7, 4))
    variables, _ = unboxed(norm, x, train=True)
    alone = norm.apply({"params": variables["params"]}, x, train=True)
    close(alone, norm.apply(variables, x, train=True))
    _, moved = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    assert set(moved) == {"batch_stats"}
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (moved, variables))))


def test_the_axis_of_the_neurons_is_named_in_parameters_and_statistics():
    _, axes = unboxed(psjax.nn.SubnetNorm("h"), jnp.ones((7, 4)), train=True)
    own = P("h")
    assert axes == {
        "params": {"scale": own, "bias": own},
        "batch_stats": {"mean": own, "var": own},
    }


@pytest.mark.parametrize("in_axis", [None, "a"])
@pytest.mark.parametrize("out_axis", [None, "b"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_subnet_dense_is_flaxs_dense_with_the_transposed_kernel_where_only_outputs_are_divided(
    x64, in_axis, out_axis, use_bias
):
    """Under its own name, so that a square kernel of another network is never taken transposed."""
    layer = psjax.nn.SubnetDense(5, in_axis, out_axis, use_bias)
    x = jnp.asarray(normal(7, 4))
    variables, axes = unboxed(layer, x)
    plain = dict(variables["params"])
    rows_first = in_axis is None and out_axis is not None
    name = "kernel_transposed" if rows_first else "kernel"
    plain["kernel"] = plain.pop(name).T if rows_first else plain[name]
    expected_axes = (out_axis, in_axis) if rows_first else (in_axis, out_axis)
    assert axes["params"][name] == P(*expected_axes)
    assert axes["params"].get("bias") == (P(out_axis) if use_bias else None)
    close(layer.apply(variables, x), nn.Dense(5, use_bias).apply({"params": plain}, x))


@pytest.mark.parametrize("axes", [("a", "b"), (None, "b")])
def test_subnet_dense_begins_he_normal_in_both_layouts(axes):
    """The variance of a kernel is 2 / inputs."""
    inputs, outputs = 100, 400
    layer = psjax.nn.SubnetDense(outputs, *axes)
    params = nn.unbox(layer.init(jax.random.key(0), jnp.ones((1, inputs))))["params"]
    kernel = params["kernel" if axes[0] else "kernel_transposed"]
    error = np.sqrt(2 / kernel.size)  # of a variance of so many normal numbers, relative
    assert abs(kernel.var() * inputs / 2 - 1) < 5 * error


def test_a_kernel_where_its_transpose_must_be_is_refused():
    net, x = psjax.models.MLP(3, (4,)), jnp.ones((2, 4))
    params = nn.unbox(net.init(jax.random.key(0), x))["params"]
    first = params["SubnetDense_0"]
    match = r"SubnetDense_0: .* 'kernel', .* \('hidden_0'\); pass its transpose .*_transposed'"
    for own in ({"kernel": first["kernel_transposed"]}, {"kernel": jnp.ones((4, 4)), **first}):
        with pytest.raises(ValueError, match=match):
            net.apply({"params": {**params, "SubnetDense_0": own}}, x, train=True)


# ------------------------------------------------------------------------------------------ models

B, K = 5, 3
IDS = jax.ShapeDtypeStruct((B, K), jnp.int32)
VALUES = jax.ShapeDtypeStruct((B, K), jnp.float32)
MODELS = {  # and its arguments
    "mlp": (psjax.models.MLP(3, (12, 11)), [jax.ShapeDtypeStruct((B, 4, 2), jnp.float32)]),
    "vgg11": (
        psjax.models.VGG11(3, (4, 0, 5, 0), (12, 11)),
        [jax.ShapeDtypeStruct((B, 8, 8, 3), jnp.float32)],
    ),
    "sparse": (psjax.models.SparseMLP(7, 13, (12,)), [IDS, VALUES]),
}
each_model = pytest.mark.parametrize("name", MODELS)


def shapes(net, args):
    return jax.eval_shape(functools.partial(net.init, train=True), jax.random.key(0), *args)


def test_the_layers_of_an_mlp():
    net, args = MODELS["mlp"]
    params = jax.tree.map(jnp.shape, nn.unbox(shapes(net, args))["params"])
    inputs, first, second, scores = 4 * 2, 12, 11, 3
    norm = lambda width: {"scale": (width,), "bias": (width,)}
    assert params == {
        "SubnetDense_0": {"kernel_transposed": (first, inputs)},
        "SubnetNorm_0": norm(first),
        "SubnetDense_1": {"kernel": (first, second)},
        "SubnetNorm_1": norm(second),
        "SubnetDense_2": {"kernel": (second, scores), "bias": (scores,)},
    }
    assert net.sizes == {"hidden_0": first, "hidden_1": second}
    assert net.subnet(4) == net.clone(hidden=(3, 3))
    assert net.subnet(1) == net
    plain = nn.unbox(shapes(net.clone(normalize=False, normalize_output=True), args))["params"]
    assert {layer: set(leaves) for layer, leaves in plain.items()} == {
        "SubnetDense_0": {"kernel_transposed", "bias"},
        "SubnetDense_1": {"kernel", "bias"},
        "SubnetDense_2": {"kernel"},
    }


@each_model
@pytest.mark.parametrize("n", [2, 3, 11])
def test_a_gathered_subnet_is_the_module_of_a_subnet(name, n):
    """Flax refuses other shapes; n = 3 divides 12, 2 does not divide 11, 11 leaves one row each."""
    net, args = MODELS[name]
    boxed = shapes(net, args)
    variables, axes = nn.unbox(boxed), nn.get_partition_spec(boxed)

    def apply(variables, *args):
        selection = psjax.ist.membership(0, 0, axes, net.sizes, n)
        own = jax.tree.map(lambda x: x[-1], selection.gather(variables))
        run = lambda train: net.subnet(n).apply(own, *args, train=train)
        return own, run(True), run(False)

    own, *scores = jax.eval_shape(apply, variables, *args)
    assert {x.shape for x in scores} == {(B, 7 if name == "sparse" else 3)}
    assert own == nn.unbox(shapes(net.subnet(n), args))


WHOLE = {
    "mlp": {"SubnetDense_2/bias"},
    "vgg11": {
        "convolution_0",
        "convolution_2",
        "SubnetNorm_0/scale",
        "SubnetNorm_0/bias",
        "SubnetNorm_1/scale",
        "SubnetNorm_1/bias",
        "SubnetDense_2/bias",
    },
    "sparse": {"bias"},
}


@each_model
def test_convolutions_their_norms_and_the_output_bias_are_whole_all_else_is_divided(name):
    net, args = MODELS[name]
    axes = nn.get_partition_spec(shapes(net, args))["params"]
    flat = jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, P))
    whole = [path for path, spec in flat if not set(spec) & set(net.sizes)]
    names = {"/".join(key.key for key in path) for path in whole}
    assert names == WHOLE[name]


def test_weights_of_vgg11():
    """For 32x32 images of 3 channels, 100 labels; the last pooling leaves one pixel."""
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    params = nn.unbox(shapes(psjax.models.VGG11(), [image]))["params"]
    channels = [3, 64, 128, 256, 256, 512, 512, 512, 512]
    convolutions = sum(9 * a * b for a, b in itertools.pairwise(channels))
    features = sum(channels[1:])
    hidden, labels = 4096, 100
    size = lambda start: sum(
        x.size
        for name, leaves in params.items()
        if name.startswith(start)
        for x in jax.tree.leaves(leaves)
    )
    assert size("convolution") == convolutions == 9_217_728
    assert convolutions + features == 9_220_480  # with the biases that a norm makes superfluous
    assert size("SubnetDense") == 512 * hidden + hidden**2 + hidden * labels + labels
    assert size("SubnetNorm") == 2 * features + 2 * 2 * hidden


# --------------------------------------------------------------------------------- sparse features


@functools.cache
def sparse():
    """Variables and arguments of a small SparseMLP; rows with padding and with an id twice."""
    net = psjax.models.SparseMLP(num_labels=7, num_features=13, hidden=(6,), chunk_size=3)
    ids = np.random.default_rng(0).integers(0, 13, (B, K))
    ids[0, 1] = ids[1, 2] = ids[1, 0] = 13
    ids[2, 0] = ids[2, 1]
    labels = np.array([[0, 7], [6, 3], [2, 7], [5, 1], [4, 7]], np.int32)  # 7 is padding
    variables, _ = unboxed(net, IDS, VALUES, train=True)
    variables["batch_stats"] = jax.tree.map(np.abs, variables["batch_stats"])
    variables = jax.tree.map(jnp.asarray, variables)
    return net, variables, jnp.asarray(ids, jnp.int32), normal(B, K), labels


def dense_scores(variables, ids, values, train):
    variables = jax.tree.map(np.asarray, variables)
    params, stats = variables["params"], variables["batch_stats"]["norm"]
    x = np.zeros((B, 13 + 1))
    for b, k in np.ndindex(B, K):
        x[b, ids[b, k]] += values[b, k]
    z = x[:, :13] @ params["embedding"]
    mean, var = (z.mean(0), z.var(0)) if train else (stats["mean"], stats["var"])
    z = params["norm"]["scale"] * (z - mean) / np.sqrt(var + 1e-5) + params["norm"]["bias"]
    return np.maximum(z, 0) @ params["kernel"] + params["bias"]


@pytest.mark.parametrize("train", [True, False])
def test_sparse_scores_are_a_product_with_the_dense_features(x64, train):
    net, variables, ids, values, _ = sparse()
    scores = net.apply(variables, ids, values, train=train)
    close(scores, dense_scores(variables, np.asarray(ids), values, train))


@pytest.mark.parametrize("train", [True, False])
def test_sparse_loss_is_the_softmax_formula(x64, train):
    net, variables, ids, values, labels = sparse()
    loss = net.apply(variables, ids, values, labels, train, method="loss")
    scores = dense_scores(variables, np.asarray(ids), values, train)
    for b in range(B):
        own = [y for y in labels[b] if y < 7]
        close(loss[b], np.log(np.sum(np.exp(scores[b]))) - np.mean(scores[b, own]), 1e-10)


@pytest.mark.parametrize("k", [1, 5, 7])
def test_sparse_top_k_is_an_argsort(x64, k):
    net, variables, ids, values, _ = sparse()
    best = net.apply(variables, ids, values, k, method="top_k")
    scores = dense_scores(variables, np.asarray(ids), values, False)
    np.testing.assert_array_equal(best, np.argsort(-scores, axis=1)[:, :k])


def test_padding_contributes_nothing_to_scores_or_gradient(x64):
    """Whatever its value is; rows of padding alone are rows of zeros."""
    net, variables, ids, values, labels = sparse()
    padding = np.asarray(ids) == 13

    @jax.jit
    def value_and_grad(values):
        loss = lambda params: jnp.sum(
            net.apply({"params": params}, ids, values, labels, method="loss")
        )
        return jax.value_and_grad(loss)(variables["params"])

    results = [value_and_grad(np.where(padding, filler, values)) for filler in (0.0, -50.0)]
    jax.tree.map(np.testing.assert_array_equal, *results)
    held = np.isin(np.arange(13), ids)
    gradient = np.asarray(results[0][1]["embedding"])
    assert not held.all()
    np.testing.assert_array_equal(gradient[~held], 0)
    assert np.abs(gradient[held]).max() > 0
    scores = lambda ids, values: net.apply(variables, ids, values)
    close(scores(jnp.full_like(ids, 13), values), scores(ids, np.zeros_like(values)))


def intermediate_shapes(jaxpr):
    """Shapes of all that a program computes, bodies of loops and functions included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from intermediate_shapes(inner)


@pytest.mark.parametrize("what", ["gradient of the loss", "top_k", "features", "all scores"])
def test_no_array_has_the_batch_and_all_features_or_all_labels(what):
    """But that of all scores, [B, L]: what the test would see."""
    features, labels, batch = 100_003, 200_003, 61
    net = psjax.models.SparseMLP(labels, features, (8,), chunk_size=1000)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    args = [integers(batch, K), of(batch, K)]
    variables = nn.unbox(shapes(net, args))
    if what == "gradient of the loss":
        args = [*args, integers(batch, 4)]
        apply = lambda params, *args: net.apply({"params": params}, *args, method="loss").sum()
        fn, first = jax.grad(apply), variables["params"]
    elif what == "top_k":
        fn, first = lambda v, *args: net.apply(v, *args, 5, method="top_k"), variables
    elif what == "features":
        fn, first = lambda v, *args: net.apply(v, *args, True, method="_features"), variables
    else:
        fn, first = net.apply, variables
    found = set(intermediate_shapes(jax.make_jaxpr(fn)(first, *args).jaxpr))
    assert any(batch in shape for shape in found)
    large = {s for s in found if np.prod(s, dtype=float) >= batch * min(features, labels)}
    assert large == ({(batch, labels)} if what == "all scores" else set())


def test_convolutions_under_divided_dense_layers_are_averaged():
    """Section 4.3: every subnet trains them whole; a round leaves the mean of what they became."""
    n, steps = 2, 2
    net = psjax.models.VGG11(num_classes=3, convolutions=(4, 0, 5, 0), hidden=(6, 4))
    x = jax.random.normal(jax.random.key(0), (n, steps, 5, 8, 8, 3))
    y = jax.random.randint(jax.random.key(1), (n, steps, 5), 0, 3)
    variables = net.init(jax.random.key(2), x[0, 0])
    params, axes = nn.unbox(variables)["params"], nn.get_partition_spec(variables)["params"]
    small = net.subnet(n)

    def loss_fn(params, batch):
        scores = small.apply({"params": params}, batch["x"], train=True)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch["y"])
        return jnp.mean(losses)

    optimizer = optax.sgd(0.1)
    selection = psjax.ist.membership(0, 0, axes, net.sizes, n)
    update = jax.jit(psjax.local_update(loss_fn, optimizer))
    new, _, _ = update(params, optimizer.init(params), selection, {"x": x, "y": y})

    def alone(own, batches):
        step = lambda w, batch: (
            jax.tree.map(lambda a, g: a - 0.1 * g, w, jax.grad(loss_fn)(w, batch)),
            None,
        )
        return jax.lax.scan(step, own, batches)[0]

    ends = jax.jit(jax.vmap(alone))(selection.gather(params), {"x": x, "y": y})
    for name in ("convolution_0", "convolution_2"):
        mean = np.mean(np.asarray(ends[name]), axis=0)
        np.testing.assert_allclose(new[name], mean, rtol=1e-4, atol=1e-5)
        assert not np.allclose(new[name], params[name], atol=1e-4)
