"""Nothing is dropped, nothing is doubled, and bad labels are caught on the host."""

import os
import pathlib
import sys
import types

import jax
import numpy as np
import pytest

from psjax import data, plan

LABELS = np.random.default_rng(0).integers(0, 7, 230)
LABELS = np.where(LABELS == 5, 3, LABELS)  # label 5 does not occur


@pytest.mark.parametrize("batch_size", [1, 20, 100, 230])
@pytest.mark.parametrize("kind", ["flat", "label", "tile"])
def test_each_sample_comes_once_with_its_weight(kind, batch_size):
    order = np.random.default_rng(1).permutation(len(LABELS))
    if kind == "flat":
        batches = data.batches(LABELS, batch_size, order)
    elif kind == "label":
        batches = data.batches_by_label(LABELS, 7, batch_size, order)
    else:
        batches = data.tiles_by_label(LABELS, 7, batch_size, 3, order)
    filled = batches.indices < len(LABELS)
    assert sorted(batches.indices[filled]) == list(range(len(LABELS)))
    np.testing.assert_array_equal(filled, batches.weights > 0)
    np.testing.assert_allclose(batches.weights.reshape(len(filled), -1).sum(1), 1, rtol=1e-6)
    for step, batch in enumerate(batches.indices):
        own = set(batch[batch < len(LABELS)])
        assert own == set(order[step * batch_size : (step + 1) * batch_size])


def _samples(labels, size, order):
    """The samples of each step, by label, in the epoch's order."""
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        yield [[i for i in batch if labels[i] == label] for label in range(max(labels) + 1)]


def _by_loops(labels, size, order, tile=None):
    """Indices, divisors and labels, sample by sample: a row for each label, or for each tile."""
    steps = []
    for own in _samples(labels, size, order):
        rows = list(enumerate(own))
        if tile is not None:
            rows = [(k, x[i : i + tile]) for k, x in rows for i in range(0, len(x), tile)]
        steps.append(rows)
    rows = max(len(step) for step in steps)
    width = tile or max(len(x) for step in steps for _, x in step)
    indices = np.full((len(steps), rows, width), len(labels), np.int32)
    names = np.full((len(steps), rows), max(labels) + 1, np.int32)
    for s, step in enumerate(steps):
        for r, (k, own) in enumerate(step):
            names[s, r] = k
            for i, x in enumerate(own):
                indices[s, r, i] = x
    sizes = np.array([len(order[i : i + size]) for i in range(0, len(order), size)])
    weights = np.where(indices < len(labels), 1 / sizes[:, None, None], 0)
    return indices, weights.astype(np.float32), names


@pytest.mark.parametrize("seed", range(12))
def test_batches_by_label_and_tiles_are_those_of_plain_loops(seed):
    """Bit for bit; labels that do not occur, orders that leave samples out or repeat them."""
    rng = np.random.default_rng(seed)
    num_samples, num_classes = int(rng.integers(1, 150)), int(rng.integers(1, 30))
    labels = rng.integers(0, num_classes, num_samples)
    labels[0] = num_classes - 1
    order = rng.integers(0, num_samples, int(rng.integers(1, 2 * num_samples + 1)))
    size, tile = int(rng.integers(1, len(order) + 1)), int(rng.integers(1, 6))
    rows = _by_loops(labels, size, order)
    got = data.batches_by_label(labels, num_classes, size, order)
    tiles = data.tiles_by_label(labels, num_classes, size, tile, order)
    for actual, expected in ((got, rows), (tiles, _by_loops(labels, size, order, tile))):
        for a, b in zip(actual, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    assert data.most_of_a_label(labels, num_classes, size, order) == rows[0].shape[2]


def test_a_thousand_classes_cost_no_loop_over_them(any_type):
    """A batch has 100 samples of 1000 labels: per label and step there is nothing to do."""
    labels = np.random.default_rng(0).integers(0, 1000, 60_000)
    make = {
        "rows": lambda: data.batches_by_label(labels, 1000, 100),
        "tiles": lambda: data.tiles_by_label(labels, 1000, 100, 4),
    }
    for fn in make.values():
        calls = []
        sys.setprofile(lambda _frame, event, _arg, calls=calls: calls.append(event))
        try:
            fn()
        finally:
            sys.setprofile(None)
        assert len(calls) < 1000


@pytest.mark.parametrize("kind", ["flat", "label", "tile"])
@pytest.mark.parametrize("wide", [True, False])
def test_weights_of_a_batch_sum_to_one_in_the_precision_of_jax(kind, wide):
    make = {
        "flat": lambda: data.batches(LABELS, 70),
        "label": lambda: data.batches_by_label(LABELS, 7, 70),
        "tile": lambda: data.tiles_by_label(LABELS, 7, 70, 3),
    }
    with jax.enable_x64(wide):
        weights = make[kind]().weights
    assert isinstance(weights, np.ndarray)
    assert weights.dtype == (np.float64 if wide else np.float32)
    sums = weights.reshape(4, -1).sum(1)
    np.testing.assert_allclose(sums, 1, rtol=1e-15 if wide else 1e-6)


def test_flat_batches_hold_the_samples_labels():
    batches = data.batches(LABELS, 50)
    assert batches.labels.shape == batches.indices.shape
    filled = batches.indices < 230
    np.testing.assert_array_equal(batches.labels[filled], LABELS[batches.indices[filled]])
    assert (batches.labels[~filled] == 0).all()


def test_take_gives_zeros_for_empty_slots_and_scales():
    x = np.arange(6, dtype=np.uint8).reshape(3, 2)
    got = data.take(x, np.array([[2, 3], [0, 3]]), 0.5)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, [[[2, 2.5], [0, 0]], [[0, 0.5], [0, 0]]])
    assert data.take(x, np.array([1])).dtype == np.uint8


def test_take_scales_in_float64_under_x64(x64):
    with jax.numpy_dtype_promotion("strict"):
        got = data.take(np.arange(256, dtype=np.uint8), np.arange(256), 1 / 255)
    np.testing.assert_allclose(got, np.arange(256) / 255, rtol=1e-15)


def test_rows_hold_their_label_and_slots_are_the_largest_count():
    batches = data.batches_by_label(LABELS, 7, 50)
    largest = max(np.bincount(LABELS[i : i + 50]).max() for i in range(0, 230, 50))
    assert batches.indices.shape == (5, 7, largest)
    np.testing.assert_array_equal(batches.labels, np.tile(np.arange(7), (5, 1)))
    for label in range(7):
        row = batches.indices[:, label]
        assert (LABELS[row[row < 230]] == label).all()
    assert (batches.indices[:, 5] == 230).all()  # an absent class has empty slots
    assert batches.padding_factor == batches.indices.size / 230


def test_tiles_hold_one_label_each_and_follow_the_true_counts():
    batches = data.tiles_by_label(LABELS, 7, 50, 4)
    for step, labels in enumerate(batches.labels):
        counts = np.bincount(LABELS[step * 50 : (step + 1) * 50], minlength=7)
        assert np.sum(labels < 7) == np.ceil(counts / 4).sum()
        for tile, label in zip(batches.indices[step], labels):
            assert (LABELS[tile[tile < 230]] == label).all()
    assert batches.padding_factor < data.batches_by_label(LABELS, 7, 50).padding_factor


def test_stratified_batches_share_each_label_out_evenly():
    labels = np.repeat(np.arange(10), 40)
    order = data.stratified_order(labels, 10, 100, seed=3)
    assert sorted(order) == list(range(400))
    assert data.most_of_a_label(labels, 10, 100, order) == 10
    assert data.batches_by_label(labels, 10, 100, order).padding_factor == 1
    assert not np.array_equal(order, data.stratified_order(labels, 10, 100, seed=4))
    for seed in range(5):  # uneven labels: at most one sample more than the share, rounded up
        order = data.stratified_order(LABELS, 7, 50, seed)
        share = np.ceil(np.bincount(LABELS, minlength=7) * 50 / 230).astype(int)
        for i in range(0, 200, 50):
            counts = np.bincount(LABELS[order[i : i + 50]], minlength=7)
            assert (counts <= share + 1).all()


def test_digits_are_there_offline_and_split_without_overlap():
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert train.images.shape == (1437, 8, 8, 1)
    assert test.images.shape == (360, 8, 8, 1)
    assert train.images.dtype == np.uint8
    assert train.images.max() * train.scale == 1
    assert set(train.labels) == set(test.labels) == set(range(10))
    # Are the two splits all of scikit-learn's images, each once?
    from sklearn.datasets import load_digits

    ours = np.concatenate([train.images, test.images]).reshape(-1, 64)
    theirs = load_digits().data.astype(np.uint8)
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs))


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_tfds_sets_come_in_their_own_order(name, shape):
    folder = pathlib.Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not prepared in TFDS_DATA_DIR")
    test = data.load(name, "test")
    assert test.images.shape == (10000, *shape)
    assert test.images.dtype == np.uint8
    assert test.images.max() * test.scale == 1
    assert np.bincount(test.labels).size == test.num_classes == 10
    import tensorflow_datasets as tfds

    records = tfds.data_source(name, split="test")
    for i in (0, 1, 9999):
        np.testing.assert_array_equal(test.images[i], records[i]["image"])
        assert test.labels[i] == records[i]["label"]


def test_any_tfds_image_set_loads_by_name(tmp_path):
    import tensorflow_datasets as tfds

    def sources(self, split, decoders=None, deserialize_method=None):
        rng = np.random.default_rng(0)
        image = lambda: rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        return _Records([{"image": image(), "label": int(i % 100)} for i in range(120)])

    with tfds.testing.mock_data(as_data_source_fn=sources):
        train = data.load("cifar100", data_dir=str(tmp_path))
    assert train.images.shape == (120, 32, 32, 3)
    assert train.num_classes == 100


class _Records(list):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


def _mocked(records):
    import tensorflow_datasets as tfds

    return tfds.testing.mock_data(as_data_source_fn=lambda *_, **__: _Records(records))


def test_images_of_different_sizes_are_named(tmp_path):
    shapes = [(32, 32, 3), (20, 30, 3), (32, 32, 3), (64, 10, 3)]
    records = [{"image": np.zeros(shape, np.uint8), "label": 0} for shape in shapes]
    match = (
        r"load\('cifar100', split='train'\): the images have 3 shapes, from \(20, 30, 3\) to "
        r"\(64, 10, 3\); .*tfds.data_source\('cifar100'\), resize"
    )
    with _mocked(records), pytest.raises(ValueError, match=match):
        data.load("cifar100", data_dir=str(tmp_path))


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    "read", [data.load, lambda *args, **kw: data.load_classes([3], *args, **kw)]
)
@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        ([3, -1], ValueError, r"label -1 of sample 1 is outside \[0, 100\)"),
        ([3, 100], ValueError, r"label 100 of sample 1 is outside \[0, 100\)"),
        ([3, 1.7], TypeError, "labels are float64; pass integers"),
        ([], ValueError, r"labels have shape \(0,\); pass a non-empty"),
    ],
)
def test_labels_of_a_tfds_set_are_checked(tmp_path, read, labels, error, match):
    """Some sets have a split without labels, where all are -1."""
    records = [{"image": np.zeros((32, 32, 3), np.uint8), "label": label} for label in labels]
    with (
        _mocked(records),
        pytest.raises(error, match=rf"load\('cifar100', split='test'\): {match}"),
    ):
        read("cifar100", "test", data_dir=str(tmp_path))


def test_a_split_that_the_set_does_not_have_is_named(tmp_path, monkeypatch):
    """Not as one that could be prepared."""
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", {"train": None, "validation": None})
    match = r"split='test'\): the set has no such split, only \['train', 'validation'\]"
    with pytest.raises(ValueError, match=match):
        data.load("cifar100", "test", data_dir=str(tmp_path))


def test_a_set_of_another_kind_is_refused(monkeypatch):
    import tensorflow_datasets as tfds

    image, several = (
        tfds.features.Image(),
        tfds.features.Sequence(tfds.features.ClassLabel(num_classes=3)),
    )
    for features in (
        None,
        tfds.features.FeaturesDict({"image": image}),
        tfds.features.FeaturesDict({"image": image, "label": np.float32}),
        tfds.features.FeaturesDict({"image": image, "label": several}),
    ):
        builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
        monkeypatch.setattr(tfds, "builder", lambda *_, builder=builder, **__: builder)
        with pytest.raises(ValueError, match=r"load\('mnist'\): not an image classification set"):
            data.load("mnist")


def own_batches_are_the_whole_ones(name):
    """A plan's worker that reads its own classes sees the samples that the whole set has there."""
    halves = plan.cyclic(10, 5)
    whole = data.load(name, "test")
    rows = halves.batches(whole.labels, 50)
    for w in (0, 3):
        wanted = halves.labels[w][halves.labels[w] < halves.num_classes]
        own = data.load_classes(wanted, name, "test")
        assert set(own.dataset.labels.tolist()) == set(wanted.tolist())
        np.testing.assert_array_equal(own.all_labels, whole.labels)
        index = rows.indices[:3, w]
        mine = data.take(own.dataset.images, own.places[index])
        np.testing.assert_array_equal(mine, data.take(whole.images, index))


def test_a_worker_reads_its_own_classes():
    own_batches_are_the_whole_ones("digits")


@pytest.mark.parametrize("outside", [10, 11, -1])
def test_a_class_that_is_not_in_the_data_is_refused(outside):
    """Also the first past the end: a plan for 11 classes must not lose one in silence."""
    match = rf"no sample of 'train' is labelled \[{outside}\]; .* from 0 to 9"
    for classes in ([outside], [3, outside]):
        with pytest.raises(ValueError, match=match):
            data.load_classes(classes)


def test_a_worker_decodes_only_the_images_of_its_own_classes():
    if not (pathlib.Path(os.environ.get("TFDS_DATA_DIR", "nowhere")) / "mnist").is_dir():
        pytest.skip("mnist is not prepared in TFDS_DATA_DIR")
    own_batches_are_the_whole_ones("mnist")


def test_a_set_that_is_not_prepared_says_how_to(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not prepared.*download_and_prepare"):
        data.load("fashion_mnist", data_dir=str(tmp_path))


ORDERED = {
    "flat": data.batches,
    "label": lambda labels, *args: data.batches_by_label(labels, 7, *args),
    "tile": lambda labels, size, order: data.tiles_by_label(labels, 7, size, 3, order),
    "most": lambda labels, *args: data.most_of_a_label(labels, 7, *args),
}


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize("kind", ORDERED)
@pytest.mark.parametrize(
    ("order", "error", "match"),
    [
        ([0, -1, 3], ValueError, r"entry 1 is -1; pass positions in \[0, 230\)"),
        ([0, 3, 230], ValueError, r"entry 2 is 230; pass positions in \[0, 230\)"),
        ([0.0, 1.5], TypeError, r"it is float64; pass integers in \[0, 230\)"),
        ([True, False], TypeError, "it is bool; pass integers"),
        ([], ValueError, r"it has shape \(0,\); pass a non-empty \[M\], or None"),
        ([[0, 1]], ValueError, r"it has shape \(1, 2\); pass a non-empty \[M\]"),
    ],
)
def test_an_order_that_is_not_one_is_refused(kind, order, error, match):
    with pytest.raises(error, match=rf"batches\(order=...\): {match}"):
        ORDERED[kind](LABELS, 1, order)


def test_an_order_may_leave_samples_out_and_draw_one_twice():
    order = [4, 9, 4]
    np.testing.assert_array_equal(data.batches(LABELS, 3, order).indices, [order])
    batches = data.batches_by_label(LABELS, 7, 3, order)
    assert sorted(batches.indices[batches.weights > 0]) == sorted(order)
    np.testing.assert_allclose(batches.weights.sum(), 1)


@pytest.mark.usefixtures("any_type")
@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        ([0.5, 1.7, 2.0], TypeError, "labels are float64; pass integers"),
        ([0, -1], ValueError, "label -1 of sample 1 is outside"),
        ([0, 2**31], ValueError, "label 2147483648 of sample 1 is outside"),
        ([], ValueError, r"labels have shape \(0,\); pass a non-empty"),
        ([[0, 1]], ValueError, r"labels have shape \(1, 2\)"),
    ],
)
def test_labels_of_flat_batches_are_checked(labels, error, match):
    with pytest.raises(error, match=rf"batches\(labels\): {match}"):
        data.batches(labels, 2)


@pytest.mark.usefixtures("any_type")
def test_bad_input_is_named():
    for name in ("mnits", "MNIST", "Mnits"):
        with pytest.raises(ValueError, match="Did you mean 'mnist'"):
            data.load(name)
    with pytest.raises(ValueError, match="pass 'train' or 'test'"):
        data.load("digits", "validation")
    with pytest.raises(ValueError, match=r"label 7 of sample 2 is outside \[0, 7\)"):
        data.check_labels([0, 1, 7], 7)
    with pytest.raises(ValueError, match="label -1 of sample 0"):
        data.check_labels([-1, 1], 7)
    with pytest.raises(TypeError, match="labels are float64; pass integers"):
        data.check_labels([0.0, 1.0], 7)
    with pytest.raises(ValueError, match="pass a non-empty"):
        data.check_labels(np.zeros(0, int), 7)
    with pytest.raises(ValueError, match=r"batches\(batch_size=0\)"):
        data.batches(LABELS, 0)
    with pytest.raises(
        ValueError, match=r"batches\(batch_size=231\): pass an integer from 1 to 230"
    ):
        data.batches(LABELS, 231)
    with pytest.raises(ValueError, match="slots=2.*so that nothing is dropped"):
        data.batches_by_label(LABELS, 7, 50, slots=2)
    with pytest.raises(ValueError, match="tiles=2"):
        data.tiles_by_label(LABELS, 7, 50, 4, tiles=2)
    with pytest.raises(ValueError, match="tile=0"):
        data.tiles_by_label(LABELS, 7, 50, 0)
