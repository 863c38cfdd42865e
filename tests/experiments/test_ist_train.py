"""Trainings in independent subnets as a user runs them: resumed, over devices, diverged."""

import dataclasses
import functools
import json
import logging
import shutil

import jax
import numpy as np
import pytest
import tyro
from flax import linen as nn

import psjax
from experiments._lib import loop
from experiments._lib.checkpoint import Checkpoints
from experiments._lib.command import parse
from experiments._lib.loop import NotFiniteError
from experiments._lib.tables import read_rows, write_rows
from experiments.ist import run, train, training

SMALL = training.Config(
    dataset="digits",
    width=32,
    subnets=2,
    local_steps=2,
    batch_size=64,
    learning_rate=0.1,
    epochs=3,
)


def fit(folder, config=SMALL, **kwargs):
    return run.train(config, folder, report=kwargs.pop("report", lambda line: None), **kwargs)


def saved(folder, config=SMALL):
    """The newest checkpoint."""
    like = jax.eval_shape(lambda: training.build(config).state)
    like = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), like)
    return Checkpoints(folder / "checkpoints").restore(like, pytest.fail)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


class Compilations(logging.Handler):
    """What XLA compiles while this is open."""

    def __enter__(self):
        self.names, self.logger = [], logging.getLogger("jax")
        self.logger.addHandler(self)
        jax.config.update("jax_log_compiles", True)
        return self.names

    def __exit__(self, *_):
        jax.config.update("jax_log_compiles", False)
        self.logger.removeHandler(self)

    def emit(self, record):
        if (line := record.getMessage()).startswith("Finished XLA compilation"):
            self.names.append(line)


def state_after(config, spans):
    """The state after the rounds `first` to `last - 1` of every span, and what compiled for it."""
    program = training.build(config)
    state = program.state

    def call(state, first, last):
        indices, numbers = program.stream(first, last), (np.int32(first), np.int32(last - first))
        return program.rounds(state, program.seeds, indices, *numbers, program.train)

    state, metrics = call(state, *spans[0])
    with Compilations() as names:
        for span in spans[1:]:
            state, metrics = call(state, *span)
        jax.block_until_ready(state)
    return jax.device_get(state), metrics, names


# --------------------------------------------------------------------------------------------- loop


def test_the_command_reaches_nine_tenths_on_digits(tmp_path, capsys):
    sizes = "--width 64 --subnets 2 --local-steps 20 --batch-size 64 --epochs 12"
    options = f"--dataset digits --learning-rate 0.1 {sizes}"
    folder = tmp_path / "run"
    args = tyro.cli(train.Args, args=[*options.split(), "--out", str(folder)])
    assert train.main(args) == folder
    rows = read_rows(folder / "metrics.csv")
    # A round is longer than an epoch: of the epochs that end in it, the last is reported.
    assert [row["epoch"] for row in rows] == [1, 3, 5, 7, 8, 10, 12]
    row = rows[-1]
    assert row["test_accuracy"] > 0.9
    assert (row["round"], row["seed"], row["left_out"]) == (7, 0, 0)
    assert row["samples"] == 7 * 2 * 20 * 64 >= 12 * 1437
    assert (folder / "learning_curve.png").stat().st_size
    assert "test accuracy 0.9" in capsys.readouterr().out
    train.main(parse(train.Args, args=["--resume", str(folder), "--epochs", "14"]))
    assert read_rows(folder / "metrics.csv")[-1]["epoch"] == 14
    assert json.loads((folder / "config.json").read_text())["width"] == 64


@pytest.mark.parametrize(
    "options",
    [{"devices": "shard_map"}, {"optimizer": "adam", "normalization": "travelling", "seeds": 2}],
)
def test_interrupted_and_resumed_ends_bit_for_bit_as_uninterrupted(options, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, epochs=5, **options)
    rows = fit(tmp_path / "whole", config)

    def interrupt(path, rows, write=write_rows):
        write(path, rows)
        if rows[-1]["epoch"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "write_rows", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path / "cut", config, checkpoint_every=2)
    assert Checkpoints(tmp_path / "cut" / "checkpoints").steps() == [2]
    lines = []
    again = fit(tmp_path / "cut", config, resume=True, report=lines.append)
    assert "continuing after epoch 2." in lines
    equal(saved(tmp_path / "cut", config), saved(tmp_path / "whole", config))
    whole, cut = ([{**row, "seconds": 0} for row in r] for r in (rows, again))
    assert [row["epoch"] for row in whole] == [e for e in range(1, 6) for _ in range(config.seeds)]
    for one, other in zip(whole, cut, strict=True):
        assert one == pytest.approx(other, rel=1e-5)  # the CSV has 6 digits


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 3, "subnets": 5, "optimizer": "adam-entry", "learning_rate": 1e-2},
        {"method": "ist-fixed", "optimizer": "momentum", "clip": 1.0, "learning_rate": 3e-2},
        {"stratified": True, "normalization": "none", "optimizer": "adamw", "learning_rate": 1e-2},
        {"method": "local-sgd", "normalize_output": False, "calibration_batches": 1},
        {"method": "data-parallel", "scale_shift": False, "seeds": 2},
        {"method": "data-parallel-dropout"},
    ],
)
def test_methods_and_options_train(options, tmp_path):
    rows = fit(tmp_path / "run", dataclasses.replace(SMALL, epochs=2, **options))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["test_accuracy"] > 0.4
    assert "test_accuracy_uncalibrated" not in rows[0]


def test_one_compilation_for_a_whole_training(tmp_path):
    config = dataclasses.replace(SMALL, epochs=4, local_steps=7)
    assert len({training.make_stream(config, 1437).rounds(e) % 4 for e in range(5)}) > 1
    with Compilations() as names:
        fit(tmp_path / "run", config)
    assert sum("jit(rounds)" in name for name in names) == 1, names


# ------------------------------------------------------------------------------------------- stream


def test_the_stream_is_every_epoch_once_and_loses_no_step():
    config = dataclasses.replace(SMALL, subnets=3, local_steps=4, batch_size=5, seeds=2)
    stream, size = training.make_stream(config, 143), 3 * 4 * 5
    seen, at = [[], []], 0
    for epoch in (1, 2, 7):
        last = stream.rounds(epoch) if epoch < 7 else at + stream.most_rounds
        rounds = stream(at, last)
        assert rounds.shape == (2, 3, 3, 4, 5)
        for own, part in zip(seen, rounds[:, : last - at]):
            own.append(np.swapaxes(part, 1, 2).ravel())  # a step of all workers after the other
        at = last
    for seed, own in enumerate(map(np.concatenate, seen)):
        assert len(own) == at * size
        for epoch in range(len(own) // 143):
            np.testing.assert_array_equal(
                own[143 * epoch : 143 * (epoch + 1)], stream.order(seed, epoch)
            )


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        ("pmap", {"optimizer": "adam", "learning_rate": 1e-2}),
        ("pmap", {"method": "local-sgd"}),
        ("shard_map", {"subnets": 3}),  # one of the two devices has one subnet
        ("shard_map", {"method": "data-parallel-dropout"}),
    ],
)
def test_devices_agree_with_one_and_never_recompile(devices, options, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    config = dataclasses.replace(SMALL, width=15, **options)
    spans = [(0, 1), (1, 4), (4, 5)]
    expected, _, none = state_after(config, spans)
    state, metrics, names = state_after(dataclasses.replace(config, devices=devices), spans)
    assert names == none == []
    assert metrics["finite"].shape == (
        1,
        training.make_stream(config, 1437).most_rounds,
        config.subnets,
    )
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, state, expected)


# ------------------------------------------------------------------------------------------- faults


@pytest.fixture
def one_bad_sample(monkeypatch):
    """NaN in a training sample that the calibration does not use; returns its index."""
    bad, load = int(np.random.default_rng(0).permutation(1437)[-1]), training.load

    def load_bad(config, split, data_dir=None):
        data, classes = load(config, split, data_dir)
        x = data["x"].astype(np.float32)
        if split == "train":
            x[bad] = np.nan
        return {**data, "x": x}, classes

    monkeypatch.setattr(training, "load", load_bad)
    return bad


def test_subnets_that_are_not_finite_are_left_out_counted_and_named(one_bad_sample, tmp_path):
    lines = []
    rows = fit(tmp_path / "run", report=lines.append)
    stream = training.make_stream(SMALL, 1437)
    indices = stream(0, stream.rounds(1))[0]
    [[round, subnet]] = np.argwhere(np.any(indices == one_bad_sample, axis=(2, 3)))
    assert rows[0]["left_out"] == 1
    assert rows[-1]["test_accuracy"] > 0.5
    assert np.isfinite(rows[0]["train_loss"])
    words = f"epoch 1, seed 0: NaN or Inf, left out of its round: subnet {subnet} in round {round}."
    assert lines[0] == words


def test_of_many_that_were_left_out_the_first_are_named():
    finite = np.ones((2, 3, 4), bool)
    finite[1, 1:, :3] = False
    [line] = run.left_out(finite, (7, 8), 10)
    assert line.startswith("seed 8: NaN or Inf, left out of its round: subnet 0 in round 11, ")
    assert line.endswith("subnet 1 in round 12 and 1 more.")


def test_data_parallel_stops_at_the_first_loss_that_is_not_finite(one_bad_sample, tmp_path):
    stream = training.make_stream(SMALL, 1437)
    indices = stream(0, stream.rounds(1))[0]
    bad_round = int(np.argmax(np.any(indices == one_bad_sample, axis=(1, 2, 3))))
    config = dataclasses.replace(SMALL, method="data-parallel")
    with pytest.raises(NotFiniteError, match=rf"round {bad_round} \(epoch 1\), seed 0: every"):
        fit(tmp_path / "run", config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished small training, not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    fit(folder, dataclasses.replace(SMALL, epochs=2))
    return folder


def test_divergence_keeps_the_last_good_checkpoint(trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    before = saved(trained)

    def diverge(config, num_samples, make=training.make_optimizer):
        return make(dataclasses.replace(config, learning_rate=1e38), num_samples)

    monkeypatch.setattr(training, "make_optimizer", diverge)
    with pytest.raises(NotFiniteError, match="last good checkpoint is that of epoch 2; try"):
        fit(tmp_path / "run", dataclasses.replace(SMALL, epochs=4), resume=True)
    equal(saved(tmp_path / "run"), before)


@pytest.mark.parametrize("method", ["ist", "local-sgd", "data-parallel"])
def test_decay_is_two_trainings_one_after_the_other(method):
    # An epoch's 1437 samples are 12 local steps of 2 workers with 64 each, rounded up: 6 rounds.
    full = dataclasses.replace(SMALL, method=method)
    tenth = dataclasses.replace(full, learning_rate=full.learning_rate * 0.1)
    decaying = dataclasses.replace(full, decay_after=1)

    def six_rounds(config, first, state=None):
        program = training.build(config)
        rows = program.stream(first, first + 6), np.int32(first), np.int32(6)
        state, _ = program.rounds(state or program.state, program.seeds, *rows, program.train)
        return jax.device_get(state)

    before, before_decay = six_rounds(full, 0), six_rounds(decaying, 0)
    # Two programs, one with the rate as a constant: float32's last bit. A step at the other rate
    # would be 1e-3.
    close = lambda a, b: jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a, b
    )
    close(before_decay["params"], before["params"])
    after, after_decay = six_rounds(tenth, 6, before), six_rounds(decaying, 6, before_decay)
    close(after_decay["params"], after["params"])


def test_an_epoch_of_unknown_length_cannot_decay():
    with pytest.raises(ValueError, match="decay_after=30: epochs of unknown length; pass num_sam"):
        training.make_optimizer(dataclasses.replace(SMALL, decay_after=30))


def test_a_run_folder_is_left_alone(trained, tmp_path):
    before = (trained / "metrics.csv").read_text()
    with pytest.raises(FileExistsError, match="exists; write --resume"):
        fit(trained)
    other = dataclasses.replace(SMALL, method="local-sgd")
    with pytest.raises(ValueError, match="another training .method ist there, local-sgd here"):
        fit(trained, other, resume=True)
    assert (trained / "metrics.csv").read_text() == before
    with pytest.raises(ValueError, match="no run there"):
        train.main(train.Args(resume=tmp_path / "nothing"))


def test_without_a_prepared_set_the_default_is_digits(tmp_path):
    assert training.resolve(training.Config(), str(tmp_path)).dataset == "digits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "spoken_digt"}, "Did you mean 'spoken_digit'"),
        ({"method": "localsgd"}, "Did you mean 'local-sgd'"),
        ({"optimizer": "adamentry"}, "Did you mean 'adam-entry'"),
        ({"normalization": "traveling"}, "Did you mean 'travelling'"),
        ({"devices": "shardmap"}, "Did you mean 'shard_map'"),
        ({"depth": 1}, "--depth 1: write 2 or more"),
        ({"local_steps": 0}, "--local-steps 0: write 1 or more"),
        ({"decay_after": 0}, "--decay-after 0: write 1 or more"),
        ({"batch_size": 1}, "--batch-size 1: write 2 or more"),
        ({"model": "vgg11"}, "images of 32x32; write --dataset cifar10 or cifar100"),
        ({"width": 3, "subnets": 4}, "--subnets 4: the hidden layers have 3 neurons"),
        ({"stratified": True, "width": 30, "subnets": 4}, "--width that is n blocks of n"),
        ({"normalization": "travelling", "method": "local-sgd"}, "write --method ist"),
    ],
)
def test_bad_options_say_what_to_write(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


# ---------------------------------------------------------------------------------------------- VGG


def test_vgg11_in_subnets_averages_convolutions_and_divides_the_dense_layers(monkeypatch):
    """Section 4.3, by the program that `--model vgg11` runs: a round of two subnets by hand."""
    rng = np.random.default_rng(0)
    data = {
        "x": rng.integers(0, 256, (16, 32, 32, 3), np.uint8),
        "y": rng.integers(0, 3, 16),
        "scale": np.float32(1 / 255),
        "shift": np.float32(0),
    }
    monkeypatch.setattr(training, "load", lambda *_: (data, 3))
    small = functools.partial(psjax.models.VGG11, convolutions=(4, 0))
    monkeypatch.setattr(psjax.models, "VGG11", small)
    config = training.Config(
        dataset="cifar10",
        model="vgg11",
        width=6,
        subnets=2,
        local_steps=1,
        batch_size=8,
        learning_rate=0.1,
    )
    program = training.build(config)
    one = lambda tree: jax.tree.map(lambda x: x[0], jax.device_get(tree))  # the only seed's
    before, indices = one(program.state["params"]), program.stream(0, 1)
    state, metrics = program.rounds(
        program.state, program.seeds, indices, np.int32(0), np.int32(1), program.train
    )
    after = one(state["params"])
    assert np.isfinite(metrics["loss"]).all()

    init = functools.partial(program.net.init, jax.random.key(0))
    axes = nn.get_partition_spec(jax.eval_shape(init, np.float32(data["x"])))
    selection = psjax.ist.membership(0, 0, axes["params"], program.net.sizes, 2)

    @jax.jit
    @jax.vmap
    @jax.grad
    def gradients(params, index):
        x, y = training.inputs(program.train, index), program.train["y"][index]
        scores = program.net.subnet(2).apply({"params": params}, x, train=True)
        return psjax.losses.nll_with_integer_labels(scores, y).mean()

    own = gradients(selection.gather(before), indices[0, 0, :, 0])
    name = "convolution_0"
    mean = before[name] - 0.1 * np.mean(own[name], axis=0)
    np.testing.assert_allclose(after[name], mean, rtol=1e-4, atol=1e-5)
    assert not np.allclose(after[name], before[name], atol=1e-4)
    held = selection.counts(before)
    for i, kernel in enumerate(("kernel_transposed", "kernel", "kernel")):
        name = f"SubnetDense_{i}"
        moved = after[name][kernel] != before[name][kernel]
        assert moved.any()
        assert not moved[np.asarray(held[name][kernel]) == 0].any()
    assert 0 < held["SubnetDense_1"]["kernel"].mean() < 1
