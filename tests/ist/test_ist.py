"""Theorems about independent subnets: who owns a neuron, what calibration corrects, what biases."""

import dataclasses
import functools
import itertools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import psjax

N = 3  # subnets
AXES = {"first": P(None, "h1"), "middle": P("h1", "h2"), "last": P("h2", None)}
KINDS = {  # sizes of the axes; stratified
    "even": ({"h1": 6, "h2": 9}, False),
    "uneven": ({"h1": 7, "h2": 8}, False),
    "stratified": ({"h1": 9, "h2": 18}, True),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
DRAWS = 20_000
# A mean of many draws lies within 5 standard errors of its expectation but once in 1.7 million.
SIGMAS = 5


def membership(seed, round, kind="uneven"):
    sizes, stratified = KINDS[kind]
    return psjax.ist.membership(seed, round, AXES, sizes, N, stratified)


@functools.cache
def draws(kind):
    """Index sets of the rounds 0, 1, ...: `{axis: [DRAWS, N, m]}`."""
    rows = jax.jit(jax.vmap(lambda round: membership(0, round, kind).indices))(jnp.arange(DRAWS))
    return jax.tree.map(np.asarray, rows)


@functools.cache
def indicators(kind):
    """m[draw, s, i] of every axis, whether subnet s holds neuron i."""
    sizes, _ = KINDS[kind]
    holds = lambda rows, size: (rows[..., None] == np.arange(size)).any(axis=2)
    return {name: holds(rows, sizes[name]) for name, rows in draws(kind).items()}


def assert_probability(events, probability):
    """`events [DRAWS, ...]` of this probability each, by the standard error of a proportion."""
    error = np.sqrt(probability * (1 - probability) / len(events))
    assert np.abs(events.mean(axis=0) - probability).max() < SIGMAS * error


def close(actual, expected, tolerance=1e-12):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


# ------------------------------------------------------------------------------ who owns a neuron


@each_kind
def test_each_neuron_has_one_owner(kind):
    for holds in indicators(kind).values():
        np.testing.assert_array_equal(holds.sum(axis=1), 1)


@each_kind
def test_shares_differ_by_one_row_at_most_and_are_sorted_with_padding_last(kind):
    sizes, _ = KINDS[kind]
    for name, rows in draws(kind).items():
        size = sizes[name]
        assert rows.shape == (DRAWS, N, -(-size // N))
        lengths = (rows < size).sum(axis=2)
        np.testing.assert_array_equal(lengths.max(axis=1) - lengths.min(axis=1), int(size % N > 0))
        assert (rows <= size).all()
        assert (np.diff(rows) > 0).all()  # the size itself is padding, at most one in a share


@each_kind
def test_a_neuron_is_in_a_subnet_with_probability_one_over_n(kind):
    for holds in indicators(kind).values():
        assert_probability(holds, 1 / N)


@each_kind
def test_owners_of_different_layers_have_covariance_zero(kind):
    """E[m_{s,i} m_{s',i'}] = 1/n^2 for all subnets s, s' and neurons i, i' of two layers."""
    first, second = indicators(kind)["h1"], indicators(kind)["h2"]
    for s in range(N):
        for i in range(first.shape[2]):
            assert_probability(first[:, s, i, None, None] & second, 1 / N**2)


def test_the_short_shares_of_different_layers_are_independent():
    lengths = {
        name: rows < KINDS["uneven"][0][name] for name, rows in draws("uneven").items()
    }  # where the last place of a share is filled, the share is long
    first, second = (lengths[name][..., -1] for name in ("h1", "h2"))
    assert_probability(first, (7 % N) / N)
    assert_probability(second, (8 % N) / N)
    assert_probability(first[:, :, None] & second[:, None], (7 % N) * (8 % N) / N**2)


def test_stratified_every_subnet_gets_as_many_rows_of_every_owners_block():
    for name, size in KINDS["stratified"][0].items():
        owners = draws("stratified")[name] // (size // N)
        for owner in range(N):
            np.testing.assert_array_equal((owners == owner).sum(axis=2), size // N**2)


def test_the_same_seed_and_round_give_the_same_subnets_and_others_give_others():
    draw = jax.jit(lambda seed, round: membership(seed, round).indices)
    same = lambda a, b: all(np.array_equal(a[name], b[name]) for name in a)
    assert same(draw(0, 3), draw(0, 3))
    different = [draw(0, 3), draw(0, 4), draw(1, 3), draw(3, 1), draw(3, 0)]
    assert not any(same(a, b) for a, b in itertools.combinations(different, 2))
    assert draw._cache_size() == 1


@pytest.mark.parametrize("number", [-1, np.int64(-1), 2**32])
def test_a_round_has_a_number_from_0_on(number):
    with pytest.raises(ValueError, match=rf"round_number={number}\): pass an integer from 0"):
        membership(0, number)


def test_seed_and_round_may_be_numbers_traced_or_mapped():
    plain = membership(0, 5, "even")
    traced = jax.jit(lambda seed, round: membership(seed, round, "even"))(0, 5)
    jax.tree.map(np.testing.assert_array_equal, traced, plain)
    mapped = {name: rows[5] for name, rows in draws("even").items()}
    jax.tree.map(np.testing.assert_array_equal, plain.indices, mapped)


# ---------------------------------------------------------------- equation (2): with which factor?


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def push(selection, params):
    """sum_s m_s W (m_s f) of (2) with f linear, and the output of every subnet by itself."""
    own = selection.gather(params)
    outputs = jnp.einsum("sij,si->sj", own["w"], own["f"])
    return selection.scatter_add({**own, "out": outputs}, params)["out"], outputs


@functools.cache
def pushed(kind, names):
    """W f, and what `push` makes of it in every draw, for a layer from axis to axis of `names`."""
    sizes, (before, after) = KINDS[kind][0], names
    rows, columns = sizes.get(before, 5), sizes.get(after, 4)
    params = {"w": normal(rows, columns), "f": normal(rows), "out": np.zeros(columns)}
    axes = {"w": P(before, after), "f": P(before), "out": P(after)}
    divided = {name: sizes[name] for name in names if name}
    draw = lambda: psjax.ist.membership(0, 0, axes, divided, N)
    blank = dataclasses.replace(jax.eval_shape(draw), valid=np.ones(N, bool))
    push_one = lambda indices: push(dataclasses.replace(blank, indices=indices), params)
    summed, single = jax.jit(jax.vmap(push_one))({name: draws(kind)[name] for name in divided})
    return params["f"] @ params["w"], np.asarray(summed), np.asarray(single)


def mean_and_error(values):
    return values.mean(axis=0), values.std(axis=0) / np.sqrt(len(values))


@each_kind
def test_between_hidden_layers_the_unbiased_factor_is_n(x64, kind):
    whole, summed, _ = pushed(kind, ("h1", "h2"))
    mean, error = mean_and_error(N * summed)
    assert (np.abs(mean - whole) < SIGMAS * error).all()


@each_kind
def test_the_printed_factor_n_squared_is_n_times_too_large(x64, kind):
    """The proof in section 3.1 drops the sum over s, which is worth n."""
    whole, summed, _ = pushed(kind, ("h1", "h2"))
    mean, error = mean_and_error(N**2 * summed)
    assert (np.abs(mean - N * whole) < SIGMAS * error).all()
    assert (np.abs(mean - whole) > SIGMAS * error).any()


@each_kind
def test_into_the_last_layer_the_sum_needs_no_factor_and_one_subnet_alone_n(x64, kind):
    whole, summed, single = pushed(kind, ("h1", None))
    np.testing.assert_allclose(summed, np.broadcast_to(whole, summed.shape), rtol=1e-10)
    mean, error = mean_and_error(N * single)
    assert (np.abs(mean - whole) < SIGMAS * error).all()
    assert (N * single.std(axis=0) > 0.1 * np.abs(whole)).all()  # in the mean only


def test_out_of_the_first_layer_there_is_no_factor(x64):
    whole, summed, _ = pushed("uneven", (None, "h1"))
    np.testing.assert_allclose(summed, np.broadcast_to(whole, summed.shape), rtol=1e-12)


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_the_exact_mean_over_all_partitions_of_a_linear_network(x64, hidden_layers):
    """The summed output has the mean W..W x / n^(hidden layers - 1): no draws, all partitions."""
    width, n = 4, 2
    sizes = [3, *[width] * hidden_layers, 2]
    layers = [f"h{i}" for i in range(hidden_layers)]
    names = [None, *layers, None]
    kernels = [normal(*shape) for shape in itertools.pairwise(sizes)]
    axes = [P(*pair) for pair in itertools.pairwise(names)]
    x = normal(3)
    halves = [[rows, sorted({*range(width)} - {*rows})] for rows in map(list, _halves(width))]
    every = np.array(list(itertools.product(halves, repeat=hidden_layers)))
    like = psjax.select(axes, {name: halves[0] for name in layers}, like=kernels)

    def output(partition):
        indices = {name: partition[i] for i, name in enumerate(layers)}
        own = dataclasses.replace(like, indices=indices).gather(kernels)
        return jnp.sum(jax.vmap(lambda w: functools.reduce(jnp.matmul, w, x))(own), axis=0)

    mean = jnp.mean(jax.jit(jax.vmap(output))(every), axis=0)
    whole = functools.reduce(np.matmul, kernels, x)
    np.testing.assert_allclose(n ** (hidden_layers - 1) * mean, whole, rtol=1e-12)


def _halves(width):
    return itertools.combinations(range(width), width // 2)


# ------------------------------------------------------------------------------------- calibration

NETS = {
    "1 layer": psjax.models.MLP(3, (6,)),
    "2 layers and the output": psjax.models.MLP(3, (6, 5), normalize_output=True),
    "3 layers": psjax.models.MLP(3, (6, 5, 4)),
    "no scale, no shift": psjax.models.MLP(3, (6, 5), use_scale=False, use_bias=False),
    "convolutions": psjax.models.VGG11(3, (4, 0), (6,), implementation="native"),
}
each_net = pytest.mark.parametrize("name", NETS)


def samples(name, batches=4, batch=5):
    """Batches whose statistics differ: each has its own mean and scale."""
    shape = (4, 4, 2) if name == "convolutions" else (7,)
    x = normal(batches, batch, *shape)
    each = np.arange(1.0, batches + 1).reshape(-1, *[1] * (x.ndim - 1))
    return jnp.asarray(each * x - each**2)


def perturbed(tree, seed=1):
    """Scales and shifts start at 1 and 0; a test must see them."""
    leaves, treedef = jax.tree.flatten(tree)
    moved = [x + 0.3 * normal(*x.shape, seed=(seed + i)) for i, x in enumerate(leaves)]
    return treedef.unflatten(moved)


def init(net, x):
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    axes = nn.get_partition_spec(variables)["params"]
    params = nn.unbox(jax.jit(net.init)(jax.random.key(0), x))["params"]
    return perturbed(params), axes


@functools.cache
def calibrated(name):
    """A net, its variables with calibrated statistics, the samples, and several scores of them."""
    net, x = NETS[name], samples(name)
    every = x.reshape(-1, *x.shape[2:])
    params, _ = init(net, x[0])

    @jax.jit
    def run(params):
        variables = {"params": params, "batch_stats": psjax.ist.calibrate(net, params, x)}
        scores = {
            "all": net.apply(variables, every),
            "first": net.apply(variables, every[:1]),
            "train": net.apply({"params": params}, every, train=True),
        }
        return variables, scores

    return net, *run(params), every


def by_hand(net, params, a):
    """Layer by layer over all samples: mean and population variance of every norm's input."""
    found = {}

    def normalized(z, i):
        norm = params.get(f"SubnetNorm_{i}", {})
        mean = z.sum(axis=0) / len(z)
        var = ((z - mean) ** 2).sum(axis=0) / len(z)
        found[f"SubnetNorm_{i}"] = {"mean": mean, "var": var}
        return norm.get("scale", 1) * (z - mean) / np.sqrt(var + 1e-5) + norm.get("bias", 0)

    for i in range(len(net.hidden)):
        layer = params[f"SubnetDense_{i}"]
        kernel = layer["kernel_transposed"].T if i == 0 else layer["kernel"]
        a = np.maximum(normalized(a @ kernel, i), 0)
    last = params[f"SubnetDense_{len(net.hidden)}"]
    z = a @ last["kernel"] + last.get("bias", 0)
    return found, normalized(z, len(net.hidden)) if net.normalize_output else z


@pytest.mark.parametrize("name", [name for name in NETS if name != "convolutions"])
def test_calibration_is_mean_and_variance_of_all_samples_layer_by_layer(x64, name):
    net, variables, scores, x = calibrated(name)
    params = jax.tree.map(np.asarray, variables["params"])
    statistics, expected = by_hand(net, params, np.asarray(x))
    close(variables["batch_stats"], statistics, 1e-10)
    close(scores["all"], expected, 1e-10)


@each_net
def test_calibrated_prediction_is_normalisation_over_the_calibrating_samples(x64, name):
    _, _, scores, _ = calibrated(name)
    close(scores["all"], scores["train"], 1e-10)


@each_net
def test_one_image_is_predicted_as_it_is_among_others(x64, name):
    _, _, scores, _ = calibrated(name)
    close(scores["first"], scores["all"][:1])


def test_a_model_of_several_arguments_is_calibrated_with_a_tuple_of_batches(x64):
    net = psjax.models.SparseMLP(num_labels=4, num_features=9, hidden=(5,))
    rng = np.random.default_rng(0)
    batches = jnp.asarray(rng.integers(0, 9, (3, 6, 2))), jnp.asarray(rng.normal(size=(3, 6, 2)))
    every = [x.reshape(-1, x.shape[-1]) for x in batches]
    variables = jax.jit(net.init)(jax.random.key(0), *every)

    @jax.jit
    def scores(params):
        statistics = psjax.ist.calibrate(net, params, batches)
        predicted = net.apply({"params": params, "batch_stats": statistics}, *every)
        return predicted, net.apply({"params": params}, *every, train=True)

    close(*scores(nn.unbox(variables)["params"]), 1e-10)


@pytest.mark.parametrize("how", ["flax", "orbax"])
def test_saving_and_loading_keeps_the_statistics(x64, how, tmp_path):
    _, variables, _, _ = calibrated("2 layers and the output")
    # Orbax loads in a thread of its own, which does not see the fixture's double precision.
    variables = jax.tree.map(lambda x: x.astype(jnp.float32), variables)
    assert set(variables["batch_stats"]) == {"SubnetNorm_0", "SubnetNorm_1", "SubnetNorm_2"}
    if how == "flax":
        blank = jax.tree.map(jnp.zeros_like, variables)
        loaded = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(variables))
    else:
        ocp.save(tmp_path / "1", variables)
        like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        loaded = ocp.load(tmp_path / "1", jax.tree.map(like, variables))
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def test_of_one_hidden_layer_only_normalised_scores_have_other_statistics_in_a_subnet(x64):
    net, x, n = psjax.models.MLP(3, (6,), normalize_output=True), samples("1 layer"), 3
    params, axes = init(net, x[0])
    selection = psjax.ist.membership(0, 0, axes, net.sizes, n)
    whole = jax.jit(lambda params: psjax.ist.calibrate(net, params, x))(params)
    of_all = jax.jit(jax.vmap(lambda own: psjax.ist.calibrate(net.subnet(n), own, x)))
    seen = of_all(jax.jit(selection.gather)(params))
    for e in range(n):
        statistics = jax.tree.map(lambda v, e=e: v[e], seen)
        rows = selection.indices["hidden_0"][e]
        hidden = {name: v[rows] for name, v in whole["SubnetNorm_0"].items()}
        close(statistics["SubnetNorm_0"], hidden)
        assert (statistics["SubnetNorm_1"]["var"] < 0.9 * whole["SubnetNorm_1"]["var"]).all()


@pytest.mark.parametrize(
    ("names", "missing"), [((), "mean and no var"), (["mean"], "var"), (["var"], "mean")]
)
@pytest.mark.parametrize("mutable", [False, ["batch_stats"]])
def test_prediction_without_statistics_names_calibrate(x64, names, missing, mutable):
    net, variables, _, x = calibrated("1 layer")
    statistics = variables["batch_stats"]["SubnetNorm_0"]
    some = {"SubnetNorm_0": {name: statistics[name] for name in names}}
    given = {"params": variables["params"], **({"batch_stats": some} if names else {})}
    message = rf"SubnetNorm_0: prediction .* has no {missing} here; .*psjax\.ist\.calibrate"
    with pytest.raises(ValueError, match=message):
        net.apply(given, x, mutable=mutable)


def test_the_statistics_of_init_are_where_running_averages_start_and_normalise_nothing(x64):
    """No error, and nothing but a factor of nearly 1: `calibrate`'s take their place."""
    norm, x = psjax.nn.SubnetNorm(use_scale=False, use_bias=False), jnp.asarray(normal(7, 4))
    statistics = norm.init(jax.random.key(0), x, train=False)
    close(norm.apply(statistics, x, train=False), x / np.sqrt(1 + norm.epsilon))
    calibrated = {"batch_stats": psjax.ist.calibrate(norm, {}, x[None], train=False)}
    close(norm.apply(calibrated, x, train=False), norm.apply({}, x, train=True))


def test_nothing_to_calibrate_is_refused():
    net = psjax.models.MLP(3, (6,), normalize=False)
    params, _ = init(net, jnp.ones((5, 7)))
    with pytest.raises(ValueError, match=r"MLP\): it has no psjax\.nn\.SubnetNorm"):
        psjax.ist.calibrate(net, params, jnp.ones((2, 5, 7)))


@pytest.mark.parametrize("shape", [(), (0, 5, 7)])
def test_no_batch_to_calibrate_with_is_refused(shape):
    with pytest.raises(ValueError, match=r"got shape .*; pass \[K, B, ...\], K >= 1"):
        psjax.ist.calibrate(NETS["1 layer"], {}, jnp.ones(shape))


# ---------------------------------------------------------------- what calibration is worth: digits

SEEDS, ROUNDS, STEPS, BATCH, WIDTH = 3, 60, 10, 32, 256
SUBNETS = 8


@functools.cache
def accuracy(hidden_layers, normalize, n=SUBNETS):
    """Test accuracy of n subnets put together, mean over seeds, in percent.

    With running statistics that travelled with the subnets and with calibrated ones, if normalised.
    """
    train, test = (psjax.data.load("digits", split) for split in ("train", "test"))
    x, y = psjax.data.take(train.images, np.arange(len(train.labels)), train.scale), train.labels
    test_x = psjax.data.take(test.images, np.arange(len(test.labels)), test.scale)
    net = psjax.models.MLP(10, (WIDTH,) * hidden_layers, normalize=normalize)
    small = net.subnet(n)
    axes = nn.get_partition_spec(jax.eval_shape(net.init, jax.random.key(0), x[:1]))
    mutable = ("batch_stats",) if normalize else ()

    def loss_fn(variables, index):
        scores, moved = small.apply(variables, x[index], train=True, mutable=[*mutable])
        own = jnp.asarray(y)[index]
        loss = optax.softmax_cross_entropy_with_integer_labels(scores, own).mean()
        return (loss, moved) if mutable else loss

    optimizer = optax.sgd(0.05)
    update = psjax.local_update(loss_fn, optimizer, mutable=mutable)
    right = lambda variables: jnp.mean(jnp.argmax(net.apply(variables, test_x), -1) == test.labels)

    def one_seed(seed):
        key = jax.random.key(seed)
        variables = nn.unbox(net.init(key, x[:1]))
        state = optimizer.init({"params": variables["params"]})

        def one_round(carry, round):
            selection = psjax.ist.membership(seed, round, axes, net.sizes, n)
            shape = (n, STEPS, BATCH)
            index = jax.random.randint(jax.random.fold_in(key, round), shape, 0, len(y))
            return update(*carry, selection, index)[:2], None

        (variables, _), _ = jax.lax.scan(one_round, (variables, state), jnp.arange(ROUNDS))
        if not normalize:
            return [right(variables)]
        statistics = psjax.ist.calibrate(net, variables["params"], x[None])
        by_its_batch = net.apply(variables, test_x, train=True, mutable=[])[0]
        return [
            right(variables),
            right({**variables, "batch_stats": statistics}),
            jnp.mean(jnp.argmax(by_its_batch, -1) == test.labels),
        ]

    # Unlike the other tests this one trains for a while: conftest's level 0 would not be enough.
    level = {"xla_backend_optimization_level": 1}
    train = jax.jit(lambda seeds: jax.lax.map(one_seed, seeds), compiler_options=level)
    right_each = train(jnp.arange(SEEDS))
    return [100 * float(a.mean()) for a in right_each]


def test_three_hidden_layers_lose_five_points_without_calibration():
    travelled, corrected, normalized_by_the_test_set = accuracy(3, normalize=True)
    assert corrected > 85
    assert corrected - travelled >= 5
    assert corrected > normalized_by_the_test_set - 1  # with it none is lost


def test_one_hidden_layer_has_nothing_to_correct():
    """Its inputs are whole in a subnet too."""
    travelled, corrected, _ = accuracy(1, normalize=True)
    assert corrected > 95
    assert abs(corrected - travelled) <= 1


def test_without_normalisation_subnets_do_not_make_a_network():
    """Section 5: "will simply not work"; the same network in one piece trains."""
    assert accuracy(3, normalize=False)[0] < 50
    assert accuracy(3, normalize=False, n=1)[0] > 95


# ------------------------------------------------------------------------------------ diagnostics


def squared_loss(params, batch):
    return jnp.mean((functools.reduce(jnp.matmul, params, batch["x"]) - batch["y"]) ** 2)


def linear_loss(params, batch):
    """The gradient with respect to the scores knows nothing of them: no residual, no bias of it."""
    return jnp.mean(functools.reduce(jnp.matmul, params, batch["x"]) * batch["y"])


def linear_network(hidden_layers, width=6):
    sizes = [4, *[width] * hidden_layers, 3]
    layers = [f"h{i}" for i in range(hidden_layers)]
    params = [jnp.asarray(normal(*shape)) for shape in itertools.pairwise(sizes)]
    axes = [P(*pair) for pair in itertools.pairwise([None, *layers, None])]
    batch = {"x": jnp.asarray(normal(5, 4)), "y": jnp.asarray(normal(5, 3))}
    return params, axes, layers, batch


def gradient_bias(loss_fn, params, selections, batch):
    """Of a loss that does not know how many neurons there are."""
    measure = functools.partial(psjax.ist.gradient_bias, loss_fn, loss_fn)
    return jax.jit(measure)(params, selections, batch)


def same_everywhere(tree, value, tolerance=1e-12):
    np.testing.assert_allclose(jax.tree.leaves(tree), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["replicas", "one subnet"])
def test_replicas_and_one_subnet_have_no_gradient_bias(x64, kind):
    params, axes, layers, batch = linear_network(2)
    one = psjax.select(axes, dict.fromkeys(layers, [range(6)]), like=params)
    selection = psjax.replicas(params, N) if kind == "replicas" else one
    bias = gradient_bias(squared_loss, params, [selection] * 2, batch)
    same_everywhere(bias.cosine, 1)
    same_everywhere(bias.norm_ratio, 1)
    same_everywhere(bias.distance, 0)


@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_of_a_linear_network_and_loss_every_gradient_shrinks_by_n_a_hidden_pair(x64, hidden_layers):
    """Exact over n^(hidden layers - 1) draws, the shares turned: every path is whole in one.

    A gradient is a sum over paths, and a path counts in the draws in which one subnet holds all its
    neurons. With two hidden layers the ratio is 1/n, of all three kernels.
    """
    params, axes, layers, batch = linear_network(hidden_layers)
    n = 2
    shares = np.arange(6).reshape(n, -1)
    turns = itertools.product(range(n), repeat=hidden_layers - 1)
    selections = [
        psjax.select(
            axes,
            {name: np.roll(shares, turn, 0) for name, turn in zip(layers, (0, *turned))},
            like=params,
        )
        for turned in turns
    ]
    bias = gradient_bias(linear_loss, params, selections, batch)
    ratio = n ** (1.0 - hidden_layers)
    same_everywhere(bias.cosine, 1)
    same_everywhere(bias.norm_ratio, ratio)
    same_everywhere(bias.distance, 1 - ratio)


def test_outside_interpolation_the_gradient_bias_does_not_vanish(x64):
    """One hidden layer, squared loss: a subnet misses the residual of the whole."""
    params, axes, _, batch = linear_network(1)
    shares = np.random.default_rng(0).permuted(np.tile(range(6), (4, 1)), axis=1)
    selections = [psjax.select(axes, {"h0": x.reshape(N, -1)}, like=params) for x in shares]
    bias = gradient_bias(squared_loss, params, selections, batch)
    assert min(bias.distance) > 0.1
    exact = gradient_bias(linear_loss, params, selections, batch)
    same_everywhere(exact.distance, 0)  # and without a residual it is none


def test_no_selection_has_no_gradient_bias():
    params, _, _, batch = linear_network(1)
    with pytest.raises(ValueError, match="there is no selection; pass one per draw"):
        psjax.ist.gradient_bias(squared_loss, squared_loss, params, [], batch)


# ----------------------------------------------------------------------------- Adam's own counting


def test_where_all_entries_take_all_steps_a_count_an_entry_is_adam(x64):
    params, _, _, batch = linear_network(2)
    results = []
    for scale in (optax.scale_by_adam, psjax.ist.scale_by_adam):
        optimizer = optax.chain(scale(b1=0.8, b2=0.95, eps=1e-4), optax.scale(-0.1))

        def step(carry, _, optimizer=optimizer):
            params, state = carry
            updates, state = optimizer.update(jax.grad(squared_loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        start = params, optimizer.init(params)
        (end, (moments, _)), _ = jax.jit(lambda c, s=step: jax.lax.scan(s, c, length=20))(start)
        results.append((end, moments.mu, moments.nu))
    close(*results)


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("sizes", "n", "stratified", "message"),
    [
        ({"h1": 7, "h2": 8}, 8, False, "num_subnets=8 exceeds size 7 of axis 'h1'"),
        ({"h3": 8}, 2, False, r"no parameter has an axis 'h3'; the named ones are \['h1'"),
        ({"h1": 7}, 0, False, "num_subnets=0"),
        ({"h1": 7}, -1, False, "num_subnets=-1"),
        ({}, 2, False, "pass the name and size of every axis"),
        ({"h1": 7}, 2, True, "axis 'h1' has size 7, which 2 \\* 2 must divide"),
        ({"h1": 6}, 3, True, "axis 'h1' has size 6, which 3 \\* 3 must divide"),
    ],
)
def test_subnets_that_cannot_be_are_refused(sizes, n, stratified, message):
    with pytest.raises(ValueError, match=message):
        psjax.ist.membership(0, 0, AXES, sizes, n, stratified)


@pytest.mark.parametrize("n", [0, 6])
def test_a_model_refuses_more_subnets_than_neurons_and_none(n):
    with pytest.raises(ValueError, match=rf"subnet\({n}\): .*a number of subnets from 1 to 5"):
        NETS["2 layers and the output"].subnet(n)
