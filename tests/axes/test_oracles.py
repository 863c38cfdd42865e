"""Axes that other programs know: git-re-basin's specifications and the groups of DepGraph.

The networks are rebuilt in Flax from their descriptions. Shapes are enough: nothing is computed.
"""

import collections
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import psjax

FACTS = pathlib.Path(__file__).parents[3] / "shared" / "reference" / "coupled_axes.json"


def facts(program, network):
    if not FACTS.exists():
        pytest.skip(f"the groups, leaf by leaf, are in {FACTS}, which is not here")
    return json.loads(FACTS.read_text())[program]["networks"][network]


# ------------------------------------------------------------------------ git-re-basin's networks


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.relu(nn.Dense(512)(x))
        return nn.log_softmax(nn.Dense(10)(x))


class VGG16(nn.Module):
    @nn.compact
    def __call__(self, x):
        for number, width in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
            for _ in range(number):
                x = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3))(x)))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(512)(x))
        return nn.log_softmax(nn.Dense(10)(x))


class Shortcut(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), strides=2, use_bias=False, name="layers_0")(x)
        return nn.LayerNorm(name="layers_1")(x)


class Block(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        conv = lambda name, stride: nn.Conv(
            self.width, (3, 3), strides=stride, use_bias=False, name=name
        )
        y = nn.relu(nn.LayerNorm(name="norm1")(conv("conv1", self.stride)(x)))
        y = nn.LayerNorm(name="norm2")(conv("conv2", 1)(y))
        return nn.relu(y + (x if self.stride == 1 else Shortcut(self.width, name="shortcut")(x)))


class BlockGroup(nn.Module):
    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = Block(self.width, self.stride if i == 0 else 1, name=f"blocks_{i}")(x)
        return x


class ResNet20(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), use_bias=False, name="conv1")(x)
        x = nn.relu(nn.LayerNorm(name="norm1")(x))
        for i, width in enumerate((16, 32, 64)):
            x = BlockGroup(width, 1 if i == 0 else 2, name=f"blockgroups_{i}")(x)
        return nn.log_softmax(nn.Dense(10, name="dense")(x.mean((1, 2))))


GIT_RE_BASIN = {
    "mlp": (MLP, (2, 784), {512: 3}),
    "vgg16": (VGG16, (2, 32, 32, 3), {64: 2, 128: 2, 256: 3, 512: 8}),
    "resnet20": (ResNet20, (2, 32, 32, 3), {16: 4, 32: 4, 64: 4}),
}


def found(module, shape):
    """Shapes of the variables, and their axes."""
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    return variables, psjax.infer_axes(module.apply, variables, x)


def leaf(*names):
    return "".join(f"[{name!r}]" for name in names)


def inner(axes):
    """The groups that neither the inputs nor the results have."""
    kinds = ("hidden", "normalised")
    return {frozenset(axis.leaves) for axis in axes.axes.values() if axis.kind in kinds}


def test_the_groups_of_a_perceptron_by_hand():
    _, axes = found(MLP(), (2, 784))
    kernel, bias = (
        [leaf("params", f"Dense_{i}", name) for i in range(4)] for name in ("kernel", "bias")
    )
    hidden = {frozenset({(kernel[i], 1), (bias[i], 0), (kernel[i + 1], 0)}) for i in range(3)}
    assert inner(axes) == hidden
    assert axes["input_0"].leaves == ((kernel[0], 0),)
    assert set(axes["output_0"].leaves) == {(kernel[3], 1), (bias[3], 0)}
    assert not axes.fixed


@pytest.mark.parametrize("network", GIT_RE_BASIN)
def test_as_many_groups_of_each_size_as_git_re_basin_specifies(network):
    module, shape, groups = GIT_RE_BASIN[network]
    _, axes = found(module(), shape)
    kinds = ("hidden", "normalised")
    sizes = collections.Counter(a.size for a in axes.axes.values() if a.kind in kinds)
    assert sizes == groups


@pytest.mark.parametrize("network", GIT_RE_BASIN)
def test_the_groups_of_git_re_basin_are_found_no_more_and_no_fewer(network):
    module, shape, _ = GIT_RE_BASIN[network]
    known = facts("git_re_basin", network)
    variables, axes = found(module(), shape)
    own = jax.tree_util.tree_leaves_with_path(variables)
    path = lambda name: leaf("params", *name.split("/"))
    assert {jax.tree_util.keystr(p): list(x.shape) for p, x in own} == {
        path(name): shape for name, shape in known["leaves"].items()
    }
    groups = {
        frozenset((path(name), dim) for name, dim in group["axes"])
        for group in known["groups"].values()
    }
    assert inner(axes) == groups


# --------------------------------------------------------------------------- torchvision's networks

# Layers have torchvision's names, so that a side of a layer is a set of dimensions of leaves.


def norm(name):
    return nn.BatchNorm(use_running_average=True, name=name)


def conv(width, side, name, stride=1, groups=1, bias=False):
    pad = (side - 1) // 2
    return nn.Conv(
        width,
        (side, side),
        strides=stride,
        padding=pad,
        feature_group_count=groups,
        use_bias=bias,
        name=name,
    )


class ResNet(nn.Module):
    """Blocks of two layers, or of three with four times the width at the end."""

    blocks: tuple[int, ...]
    deep: bool

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm("bn1")(conv(64, 7, "conv1", stride=2)(x)))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, number in enumerate(self.blocks):
            for i in range(number):
                stride = 2 if stage > 0 and i == 0 else 1
                x = self.block(x, 64 * 2**stage, f"layer{stage + 1}.{i}", stride)
        return nn.Dense(1000, name="fc")(x.mean((1, 2)))

    def block(self, x, width, name, stride):
        layers = [(width, 3, stride), (width, 3, 1)]
        if self.deep:
            layers = [(width, 1, 1), (width, 3, stride), (4 * width, 1, 1)]
        y = x
        for i, (n, side, step) in enumerate(layers):
            y = conv(n, side, f"{name}.conv{i + 1}", stride=step)(y)
            y = norm(f"{name}.bn{i + 1}")(y)
            y = nn.relu(y) if i + 1 < len(layers) else y
        if x.shape != y.shape:
            x = conv(y.shape[-1], 1, f"{name}.downsample.0", stride=stride)(x)
            x = norm(f"{name}.downsample.1")(x)
        return nn.relu(x + y)


class VGG11(nn.Module):
    @nn.compact
    def __call__(self, x):
        place = 0
        for width in (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None):
            if width is None:
                x, place = nn.max_pool(x, (2, 2), strides=(2, 2)), place + 1
            else:
                x = nn.relu(conv(width, 3, f"features.{place}", bias=True)(x))
                place += 2
        x = x.reshape(x.shape[0], -1)  # 7 by 7, as after torchvision's adaptive pooling
        x = nn.relu(nn.Dense(4096, name="classifier.0")(x))
        x = nn.relu(nn.Dense(4096, name="classifier.3")(x))
        return nn.Dense(1000, name="classifier.6")(x)


class MobileNetV2(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu6(norm("features.0.1")(conv(32, 3, "features.0.0", stride=2)(x)))
        stages = [
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ]
        place = 1
        for factor, width, number, stride in stages:
            for i in range(number):
                x = self.block(x, factor, width, f"features.{place}", stride if i == 0 else 1)
                place += 1
        x = nn.relu6(norm("features.18.1")(conv(1280, 1, "features.18.0")(x)))
        return nn.Dense(1000, name="classifier.1")(x.mean((1, 2)))

    def block(self, x, factor, width, name, stride):
        y, first = x, int(factor > 1)
        wide = factor * x.shape[-1]
        if first:
            y = nn.relu6(norm(f"{name}.conv.0.1")(conv(wide, 1, f"{name}.conv.0.0")(y)))
        own = f"{name}.conv.{first}"
        y = conv(wide, 3, f"{own}.0", stride=stride, groups=wide)(y)
        y = nn.relu6(norm(f"{own}.1")(y))
        y = conv(width, 1, f"{name}.conv.{first + 1}")(y)
        y = norm(f"{name}.conv.{first + 2}")(y)
        return x + y if x.shape == y.shape else y


class ViT(nn.Module):
    """`vit_b_16`; the attention has a kernel each for queries, keys, values and the result."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(768, (16, 16), strides=(16, 16), padding="VALID", name="conv_proj")(x)
        x = x.reshape(x.shape[0], -1, 768)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, 768))
        x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, 768)), x], axis=1)
        table = "encoder.pos_embedding"
        x = x + self.param(table, nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(12):
            name = f"encoder.layers.encoder_layer_{i}"
            y = nn.LayerNorm(name=f"{name}.ln_1")(x)
            x = x + nn.MultiHeadDotProductAttention(12, name=f"{name}.self_attention")(y)
            y = nn.LayerNorm(name=f"{name}.ln_2")(x)
            y = nn.gelu(nn.Dense(3072, name=f"{name}.mlp.0")(y))
            x = x + nn.Dense(768, name=f"{name}.mlp.3")(y)
        x = nn.LayerNorm(name="encoder.ln")(x)
        return nn.Dense(1000, name="heads.head")(x[:, 0])


RESNET18 = ResNet((2, 2, 2, 2), deep=False)
RESNET50 = ResNet((3, 4, 6, 3), deep=True)
MOBILENET = {16: 1, 24: 1, 32: 2, 64: 1, 96: 2, 144: 2, 160: 1, 192: 3, 320: 1, 384: 4, 576: 3}
MOBILENET |= {960: 3, 1280: 1, 1000: 1}
# Groups of each size, the network's outputs among them.
DEPGRAPH = {
    "resnet18": (RESNET18, 64, {64: 3, 128: 3, 256: 3, 512: 3, 1000: 1}),
    "resnet50": (RESNET50, 64, {64: 7, 128: 8, 256: 13, 512: 7, 1024: 1, 2048: 1, 1000: 1}),
    "vgg11": (VGG11(), 224, {64: 1, 128: 1, 256: 2, 512: 4, 4096: 2, 1000: 1}),
    "mobilenet_v2": (MobileNetV2(), 64, MOBILENET),
    "vit_b_16": (ViT(), 224, {768: 1, 3072: 12, 1000: 1}),
}
# DepGraph is not told of heads and prunes an attention's inner rows together with the stream around
# it: it has no group of its own for them. In each of the 12 layers they are three axes: the 12
# heads, and inside every head the 64 rows that queries and keys share and the 64 of the values.
HEADS = {"vit_b_16": {12: 12, 64: 24}}


@pytest.mark.parametrize("network", DEPGRAPH)
def test_as_many_groups_of_each_size_as_depgraph_and_the_heads_that_it_is_not_told(network):
    module, side, groups = DEPGRAPH[network]
    _, axes = found(module, (2, side, side, 3))
    sizes = collections.Counter(a.size for a in axes.axes.values() if a.kind != "input")
    assert sizes == {**groups, **HEADS.get(network, {})}
    assert not axes.unknown


@pytest.mark.parametrize("network", DEPGRAPH)
def test_the_groups_of_depgraph_are_found_layer_by_layer(network):
    module, side, _ = DEPGRAPH[network]
    known = facts("torch_pruning", network)
    variables, axes = found(module, (2, side, side, 3))
    groups = collections.Counter(
        frozenset(place for member in group["members"] for place in places(variables, member))
        for group in known["groups"]
    )
    own = collections.Counter(
        frozenset(axis.leaves)
        for axis in axes.axes.values()
        if axis.kind != "input" and not is_inside_attention(axis)
    )
    assert own == groups
    heads = [axis for axis in axes.axes.values() if is_inside_attention(axis)]
    assert collections.Counter(axis.size for axis in heads) == HEADS.get(network, {})


def is_inside_attention(axis):
    """Whether only an attention's kernels and biases have it."""
    return all("self_attention" in path for path, _ in axis.leaves)


def places(variables, member):
    """Dimensions of leaves that are a side of a layer of DepGraph's."""
    layer, kind, side, _ = member
    layer = layer.removeprefix("parameter ")
    own = {c: {layer: leaves[layer]} for c, leaves in variables.items() if layer in leaves}
    for path, x in jax.tree_util.tree_leaves_with_path(own):
        name, last = jax.tree_util.keystr(path), len(x.shape) - 1
        kernel = name.endswith("['kernel']")
        if kind == "MultiheadAttention":  # what enters and leaves it
            if "['out']" in name:
                yield name, last
            elif kernel:
                yield name, 0
        elif side == "out":
            yield name, last
        elif kernel:
            yield name, last - 1
