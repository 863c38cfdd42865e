"""The models of `psjax.models`, without the names of their axes."""

import jax.numpy as jnp

from psjax import models
from tests.axes.common import BATCH, images, integers, linen, normal


def _mlp(train=False, **options):
    model = models.MLP(5, (9, 11, 13), **options)
    mutable = ["batch_stats"] if train else False
    return linen(model, normal(BATCH, 7), train=train, mutable=mutable)


def _psnet(trunk=(7,), kernel_sizes=(3, 2), pools=(2, 1), **options):
    net = models.PSNet(5, trunk, 4, (9, 11), kernel_sizes, pools, **options)
    return linen(net, images(), gain=4.0)


def _lenet(**options):
    net = models.LeNet(5, (4, 7), (11, 13), (3, 2), (2, 1), **options)
    return linen(net, images(), gain=4.0)


def _vgg11():
    widths = (4, 0, 7, 0, 9, 10, 0, 11, 12, 0, 13, 14, 0)
    return linen(models.VGG11(6, widths, (15, 16)), images(32, channels=2))


def _sparse():
    """A sample's features, the last of them padding."""
    ids = integers(19, BATCH, 4).at[:, -1].set(19)
    return models.SparseMLP(14, 19, (8,), chunk_size=5), ids, normal(BATCH, 4)


def _sparse_mlp():
    return linen(*_sparse())


def _sparse_mlp_loss():
    model, ids, values = _sparse()
    apply, params, _ = linen(model, ids, values)
    labels = jnp.asarray([[0, 5], [13, 2], [7, 9]], jnp.int32)
    return (
        lambda p, ids, values, labels: model.apply(p, ids, values, labels, False, method="loss"),
        params,
        (ids, values, labels),
    )


MODELS = {
    "psjax-mlp": _mlp,
    "psjax-mlp-train": lambda: _mlp(train=True),
    "psjax-mlp-plain": lambda: _mlp(normalize=False),
    "psjax-mlp-normalized-output": lambda: _mlp(normalize_output=True, use_scale=False),
    "psjax-psnet": _psnet,
    "psjax-psnet-ideal": lambda: _psnet((), (3,), (2,)),
    "psjax-psnet-patches": lambda: _psnet(implementation="patches"),
    "psjax-lenet": _lenet,
    "psjax-lenet-native": lambda: _lenet(implementation="native"),
    "psjax-vgg11": _vgg11,
    "psjax-sparse-mlp": _sparse_mlp,
    "psjax-sparse-mlp-loss": _sparse_mlp_loss,
}
