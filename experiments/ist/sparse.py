"""Sparse points with very many labels: rows of one width, the network, a round over the subnets."""

import dataclasses
import pathlib

import numpy as np

import psjax
from experiments._lib import program
from experiments.ist import training


@dataclasses.dataclass(frozen=True)
class Rows:
    """Points as rows of one width: `ids`, `values` `[N, width]` and `labels [N, most]`."""

    arrays: dict[str, np.ndarray]
    num_features: int
    num_labels: int

    def __len__(self):
        return len(self.arrays["ids"])

    def __getitem__(self, index) -> "Rows":
        return dataclasses.replace(self, arrays={k: x[index] for k, x in self.arrays.items()})


def padded(data: psjax.data.SparseDataset) -> Rows:
    """All points of a data set, padded past the end of features and labels."""
    points = np.arange(len(data.indptr) - 1)
    widest = lambda indptr: int(np.diff(indptr).max(initial=1))
    ids, values = psjax.data.pad_rows(
        data.indptr, data.indices, data.values, points, widest(data.indptr), data.num_features
    )
    labels, _ = psjax.data.pad_rows(
        data.label_indptr,
        data.label_indices,
        None,
        points,
        widest(data.label_indptr),
        data.num_labels,
    )
    arrays = {"ids": ids, "values": values, "labels": labels}
    return Rows(arrays, data.num_features, data.num_labels)


def load(folder: pathlib.Path) -> tuple[Rows, Rows]:
    """The training set and the test set.

    Raises:
      FileNotFoundError: no such files.
      ValueError: a damaged file; two files that are not of one data set.
    """
    parts = []
    for name in ("train.txt", "test.txt"):
        if not (folder / name).is_file():
            msg = (
                f"--data {folder}: no {name} there. It is a folder of train.txt and test.txt in "
                "the format of http://manikvarma.org/downloads/XC/XMLRepository.html (Bibtex)."
            )
            raise FileNotFoundError(msg)
        parts.append(padded(psjax.data.read_xc(folder / name)))
    train, test = parts
    sizes = [(len(p), p.num_features, p.num_labels) for p in parts]
    if sizes[0][1:] != sizes[1][1:] or min(sizes)[0] < 5:
        msg = (
            f"--data {folder}: train.txt and test.txt have {sizes} points, features and labels; "
            "they must be of one data set, of 5 points or more."
        )
        raise ValueError(msg)
    return train, test


def divide(train: Rows) -> tuple[Rows, Rows]:
    """A training set without every fifth point of a fixed random order, and those points."""
    order = np.random.default_rng(0).permutation(len(train))
    kept_back = len(train) // 5
    return train[np.sort(order[kept_back:])], train[np.sort(order[:kept_back])]


def make_model(rows: Rows, width: int) -> psjax.models.SparseMLP:
    return psjax.models.SparseMLP(rows.num_labels, rows.num_features, (width,))


ROW = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.float32)
"""Ids and values of a point, to initialise a network with."""


def shapes_of(net):
    """Axes and shapes of a network's parameters."""
    return tuple(tree["params"] for tree in program.shapes_of(net, *ROW))


def round_fn(config: training.Config, net):
    """`(params, opt_state, seed, round, index [n, J, B], data) -> params, opt_state, metrics`."""
    n, optimizer = config.subnets, training.make_optimizer(config)
    worker = net.subnet(n) if config.divided else net
    axes, _ = shapes_of(net)

    def one_round(params, opt_state, seed, round, index, data):
        def loss_fn(params, index):
            rows = (data[name][index] for name in ("ids", "values", "labels"))
            return worker.apply({"params": params}, *rows, method="loss").mean()

        if config.divided:
            selection = psjax.ist.membership(seed, round, axes, net.sizes, n)
            update = psjax.local_update(loss_fn, optimizer)
        else:
            selection = psjax.replicas(params, n)
            update = psjax.baselines.data_parallel(loss_fn, optimizer)
        return update(params, opt_state, selection, index)

    return one_round
