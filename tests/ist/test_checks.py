"""Theorems about what `check_subnets` finds, and what it lets pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

import psjax


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape)


def check(net, n, *x, train=True, biases=1):
    """Of a model with normal weights: normalised by the batch if `train`, else by statistics."""
    variables = jax.eval_shape(net.init, jax.random.key(0), *x)
    axes, shapes = nn.get_partition_spec(variables), nn.unbox(variables)
    if train:
        axes, shapes = ({"params": tree["params"]} for tree in (axes, shapes))
    leaves, treedef = jax.tree.flatten(shapes)
    variables = treedef.unflatten(
        [0.3 * normal(*x.shape, seed=1 + i) for i, x in enumerate(leaves)]
    )
    scale = lambda path, x: jnp.asarray(biases * x if "bias" in keystr(path) else np.abs(x))
    weight = lambda path, x: jnp.asarray(x) if x.ndim > 1 else scale(path, x)
    variables = jax.tree_util.tree_map_with_path(weight, variables)
    selection = psjax.ist.membership(0, 0, axes, net.sizes, n)
    apply = lambda net: jax.jit(lambda variables, *x: net.apply(variables, *x, train=train))
    psjax.ist.check_subnets(apply(net), apply(net.subnet(n)), variables, selection, *x)


ALONE = {"normalize": False, "normalize_output": True}
PARTS = {  # models, and whether they are normalised by the batch
    "one layer": (psjax.models.MLP(3, (12,)), True),
    "no layer is normalised": (psjax.models.MLP(3, (12, 11), normalize=False), True),
    "the output is, too": (psjax.models.MLP(3, (12, 11), normalize_output=True), True),
    "the output alone is": (psjax.models.MLP(3, (12, 11), **ALONE), True),
    "by given statistics": (psjax.models.MLP(3, (12, 11), normalize_output=True), False),
    "no scale, no shift": (psjax.models.MLP(3, (12, 11), use_scale=False, use_bias=False), True),
    "convolutions": (psjax.models.VGG11(3, (4, 0), (12,), implementation="native"), True),
    "sparse": (psjax.models.SparseMLP(4, 9, (11,)), True),
}


@pytest.mark.parametrize("biases", [1, 0])
@pytest.mark.parametrize("name", PARTS)
def test_subnets_of_the_models_are_parts_of_them(name, biases):
    """12 or 11 neurons among 3; with biases and shifts, and with zeros as at the start; float32."""
    net, train = PARTS[name]
    ids = np.random.default_rng(0).integers(0, 9, (4, 2))
    image = normal(5, 4, 4, 2).astype(np.float32)
    x = (ids, image[0, 0]) if name == "sparse" else (image,)
    check(net, 3, *x, train=train, biases=biases)


def test_subnets_of_a_partitioned_network_are_parts_of_it():
    """Neurons of a class are divided; normalised scores are no sum over them."""
    net = psjax.models.psnet("digits")
    small = net.clone(hidden=tuple(-(-n // 3) for n in net.hidden))
    x = jnp.asarray(normal(5, 8, 8, 1), jnp.float32)
    variables = jax.jit(net.init)(jax.random.key(0), x)
    axes = nn.get_partition_spec(variables)
    sizes = {f"hidden_{i}": n for i, n in enumerate(net.hidden)}
    selection = psjax.ist.membership(0, 0, axes, sizes, 3)
    for output in (lambda c: c, nn.log_softmax):
        of = lambda net, output=output: lambda w, x: output(net.apply(w, x))
        psjax.ist.check_subnets(of(net), of(small), nn.unbox(variables), selection, x)


softmax = functools.partial(jax.nn.softmax, axis=-1)
standardised = lambda x, axis: (
    (x - x.mean(axis, keepdims=True)) / (x.std(axis, keepdims=True) + 1e-3)
)
LAYERS = {
    "layer normalisation": lambda x: standardised(x, -1),
    "softmax": softmax,
    "mean": lambda x: x - x.mean(-1, keepdims=True),
    "L2": lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True),
    "L1": lambda x: x / (1e-3 + jnp.abs(x).sum(-1, keepdims=True)),
    "largest": lambda x: x / (1e-3 + jnp.abs(x).max(-1, keepdims=True)),
    "maximum": lambda x: nn.relu(x) / (1 + nn.relu(x).max(-1, keepdims=True)),
    "winner takes all": lambda x: jnp.where(x == x.max(-1, keepdims=True), x, 0),
    "winner of relu": lambda x: (y := nn.relu(x)) * (y == y.max(-1, keepdims=True)),
    "gate": lambda x: x * nn.sigmoid(x.sum(-1, keepdims=True)),
    "sorted": lambda x: jnp.sort(x, axis=-1),
    "largest two": lambda x: jnp.where(x >= jax.lax.top_k(x, 2)[0][..., -1:], x, 0),
    "neighbour": lambda x: x * (2 + jnp.roll(x, 1, axis=-1)),
    "cumulative sum": lambda x: jnp.cumsum(x, axis=-1),
}
OUTPUTS = {
    "as they are": lambda x: x,
    "by the batch": lambda x: standardised(x, 0),
    "softmax": softmax,
}


def check_layer(layer, after, output, skip=0):
    """Two hidden layers, `layer` after one of them; `output` of the scores."""
    axes = {"a": P(None, "h1"), "b": P("h1", "h2"), "c": P("h2", None), "bias": P("h1"), "d": P()}
    axes["skip"] = P("h1", None)
    shapes = {"a": (7, 4), "b": (4, 6), "c": (6, 3), "bias": (4,), "d": (3,), "skip": (4, 3)}
    params = {name: jnp.asarray(normal(*shape)) for name, shape in shapes.items()}

    def fn(params, x):
        x = jnp.tanh(x @ params["a"] + params["bias"])
        x = layer(x) if after == 1 else x
        scores = skip * x @ params["skip"] + params["d"]
        x = jnp.tanh(x @ params["b"])
        x = layer(x) if after == 2 else x
        return output(scores + x @ params["c"])

    shares = {"h1": [[0, 2], [1, 3]], "h2": [[0, 1, 4], [2, 3, 5]]}
    selection = psjax.select(axes, shares, like=params)
    psjax.ist.check_subnets(fn, fn, params, selection, jnp.asarray(normal(5, 7)))


@pytest.mark.parametrize("output", ["as they are", "by the batch"])
@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_reduces_over_a_divided_axis_is_found_and_the_axis_named(
    x64, layer, after, output
):
    with pytest.raises(ValueError, match=r"an axis that is divided, one of \['h1', 'h2'\]"):
        check_layer(LAYERS[layer], after, OUTPUTS[output])


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_layer_that_reduces_over_nothing_passes(x64, output):
    check_layer(jnp.sin, 1, OUTPUTS[output])


@pytest.mark.parametrize("output", OUTPUTS)
def test_neurons_may_reach_the_scores_through_several_leaves(x64, output):
    check_layer(jnp.sin, 1, OUTPUTS[output], skip=1)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_reduces_is_found_beside_a_skip_connection(x64, layer):
    with pytest.raises(ValueError, match="an axis that is divided"):
        check_layer(LAYERS[layer], 1, softmax, skip=1)


def check_gate(fn):
    """`fn(h, v)` gives the scores of one hidden layer h with output weights v."""
    axes = {"u": P(None, "h"), "v": P("h", None)}
    params = {"u": jnp.asarray(normal(7, 6)), "v": jnp.asarray(normal(6, 3))}
    selection = psjax.select(axes, {"h": [[0, 3], [1, 4], [2, 5]]}, like=params)
    scores = lambda w, x: fn(jnp.tanh(x @ w["u"]), w["v"])
    psjax.ist.check_subnets(scores, scores, params, selection, jnp.asarray(normal(5, 7)))


def scanned(h, v):
    """One sample after the other."""
    return jax.lax.scan(lambda carry, row: (carry, gated(row[None], v)[0]), 0, h)[1]


gated = lambda h, v: (h * nn.sigmoid((h @ v)[:, :1])) @ v
custom = jax.custom_jvp(gated)
custom.defjvps(None, None)
GATES = {
    "plain": gated,
    "jit": jax.jit(gated),
    "checkpoint": jax.checkpoint(gated),
    "scan": scanned,
    "vmap": jax.vmap(lambda h, v: gated(h[None], v)[0], (0, None)),
    "cond": lambda h, v: jax.lax.cond(h.ndim == 2, gated, jnp.matmul, h, v),
    "custom_jvp": custom,
    "squeezed": lambda h, v: (h * nn.sigmoid(nn.relu(h @ v) @ v.T)) @ v,
    "added": lambda h, v: jnp.tanh(h + (h @ v)[:, :1]) @ v,
    "largest": lambda h, v: nn.relu(h[..., None] * v).max(1),
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_that_sees_all_neurons_is_found(x64, name):
    with pytest.raises(ValueError, match=r"are not a sum over the subnets.*axis 'h'"):
        check_gate(GATES[name])


def test_a_maximum_that_changes_nothing_at_the_given_weights_is_found(x64):
    largest = np.linalg.norm(np.tanh(normal(5, 7) @ normal(7, 6)))
    clipped = lambda h, v: (h * jnp.minimum(1, 1.001 * largest / jnp.linalg.norm(h))) @ v
    with pytest.raises(ValueError, match=r"are not a sum over the subnets.*axis 'h'"):
        check_gate(clipped)


FREE = {  # of the scores, whatever is done to them
    "gate": lambda c: c * nn.sigmoid(c[:, :1]),
    "log-softmax": nn.log_softmax,
    "jit": jax.jit(nn.softmax),
    "sorted": lambda c: jnp.sort(c, axis=-1),
    "scan": lambda c: jax.lax.scan(lambda s, row: (s + row, s * row), c[0], c)[1],
    "scan in reverse": lambda c: jax.lax.scan(
        lambda s, row: (s + row, s * row), c[0], c, reverse=True
    )[1],
    "attention over samples": lambda c: nn.softmax(c @ c.T) @ c,
}


@pytest.mark.parametrize("name", FREE)
def test_a_gate_of_the_scores_is_no_layer_that_reduces(x64, name):
    check_gate(lambda h, v: FREE[name](h @ v))


def check_residual(layer, same_axis=False):
    """Two residual blocks on a stream that is whole, `layer` within each."""
    second = "h1" if same_axis else "h2"
    axes = {"a": P(None, "h1"), "b": P("h1", None), "c": P(None, second), "d": P(second, None)}
    axes["head"] = P()
    shapes = {"a": (5, 4), "b": (4, 5), "c": (5, 4), "d": (4, 5), "head": (5, 3)}
    params = {name: jnp.asarray(normal(*shape)) for name, shape in shapes.items()}
    shares = dict.fromkeys({"h1", second}, [[0, 2], [1, 3]])
    selection = psjax.select(axes, shares, like=params)

    def fn(w, x):
        x = x + layer(jnp.tanh(x @ w["a"])) @ w["b"]
        x = standardised(x, -1)  # the stream is whole: a layer normalisation reduces over nothing
        return (x + layer(jnp.tanh(x @ w["c"])) @ w["d"]) @ w["head"]

    psjax.ist.check_subnets(fn, fn, params, selection, jnp.asarray(normal(6, 5)))


def test_a_residual_network_passes_if_each_block_has_an_axis_of_its_own(x64):
    check_residual(jnp.sin)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_that_reduces_is_found_in_residual_blocks(x64, layer):
    with pytest.raises(ValueError, match="an axis that is divided"):
        check_residual(LAYERS[layer])


def check_attention(between_heads):
    """Two causal attention blocks of four heads, an axis each, beside a key that is no weight."""
    blocks, time = range(2), 5
    kernels = {f"{n}{i}": (8, 4, 3) for n in "qkv" for i in blocks}
    axes = {name: P(None, f"heads_{name[1]}") for name in kernels}
    kernels |= {f"o{i}": (4, 3, 8) for i in blocks}
    axes |= {f"o{i}": P(f"heads_{i}") for i in blocks} | {"key": P()}
    params = {
        n: jnp.asarray(normal(*s, seed=ord(n[0])) / 2, jnp.float32) for n, s in kernels.items()
    }
    params["key"] = jax.random.key(0)
    shares = {f"heads_{i}": [[0, 1 + i], [2 - i, 3]] for i in blocks}
    selection = psjax.select(axes, shares, like=params)
    past = np.tril(np.ones((time, time), bool))

    def fn(w, x):
        for i in blocks:
            y = standardised(x, -1)
            q, k, v = (jnp.einsum("btd,dhk->bthk", y, w[f"{n}{i}"]) for n in "qkv")
            a = softmax(jnp.where(past, jnp.einsum("bthk,bshk->bhts", q, k), -1e9))
            a = jnp.einsum("bhts,bshk->bthk", between_heads(a), v)
            x = x + jnp.einsum("bthk,hkd->btd", a, w[f"o{i}"])
        return nn.log_softmax(x)

    x = jnp.asarray(normal(6, time, 8), jnp.float32)
    psjax.ist.check_subnets(fn, fn, params, selection, x)


def test_heads_of_attention_are_independent():
    """In float32, where much depends on little: what is mixed is not read off the values."""
    check_attention(lambda a: a)


def test_a_gate_between_heads_is_found():
    with pytest.raises(ValueError, match="an axis that is divided, one of .*heads_0"):
        check_attention(lambda a: a * jnp.cumsum(a, axis=1))


def test_elements_that_share_rows_are_parts_of_the_network_though_they_meet_in_it(x64):
    """In the network the one row in common sees what the elements see of the layer before."""
    fn = lambda w, x: jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["c"]
    axes = {"a": P(None, "h1"), "b": P("h1", "h2"), "c": P("h2", None)}
    shapes = {"a": (7, 4), "b": (4, 6), "c": (6, 3)}
    params = {name: jnp.asarray(normal(*shape)) for name, shape in shapes.items()}
    selection = psjax.select(axes, dict.fromkeys(["h1", "h2"], [[0, 1], [1, 2]]), like=params)
    psjax.ist.check_subnets(fn, fn, params, selection, jnp.asarray(normal(5, 7)))
