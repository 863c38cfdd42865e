"""The main job as a user runs it: interrupted, resumed, damaged, diverged."""

import dataclasses
import functools
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments._lib import program
from experiments._lib.checkpoint import Checkpoints
from experiments._lib.config import read_config
from experiments._lib.folder import open_folder
from experiments._lib.loop import NotFiniteError
from experiments._lib.signals import uninterrupted
from experiments._lib.tables import read_rows
from experiments.ist import train as ist_train
from experiments.psl import run, train, training

ROOT = pathlib.Path(__file__).parents[2]
SMALL = training.Config(compute="pairs", batch_size=240, epochs=6)
OPTIONS = ["--compute", "fused", "--batch-size", "240", "--checkpoint-every", "1"]


def _start(*options, first_lines=""):
    """The command, in a process of its own; `first_lines` of Python before it."""
    # A shell's background job, and whatever it starts, has SIGINT ignored: not what is tested.
    command = f"""{first_lines}
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = {["train", *map(str, options)]!r}
runpy.run_module("experiments.psl.train", run_name="__main__", alter_sys=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


@functools.cache
def _zeros(config):
    like = jax.eval_shape(lambda: training.build(config).state)
    return jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), like)


def _params(folder, epoch, config=SMALL):
    step, state = Checkpoints(folder / "checkpoints").restore(_zeros(config), pytest.fail)
    assert step == epoch
    return state["params"]


def _wait_for_epoch(folder, epoch, process):
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        path = folder / "metrics.csv"
        if path.exists() and len(path.read_text().splitlines()) > epoch:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    pytest.fail(f"epoch {epoch} was not reached")


def test_without_options_it_reaches_95_percent_on_digits(tmp_path):
    folder = train.main(train.Args(out=tmp_path / "run"))
    rows = read_rows(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == list(range(1, training.Config().epochs + 1))
    assert rows[-1]["test_accuracy"] >= 0.95


def test_interrupted_three_times_ends_bit_for_bit_like_an_uninterrupted_run(tmp_path):
    epochs = 40
    whole = _start("--out", tmp_path / "whole", "--epochs", epochs, *OPTIONS)
    process = _start("--out", tmp_path / "cut", "--epochs", epochs, *OPTIONS)
    for number, (kind, epoch) in enumerate(
        [(signal.SIGINT, 5), (signal.SIGTERM, 12), (signal.SIGKILL, 20)]
    ):
        _wait_for_epoch(tmp_path / "cut", epoch, process)
        process.send_signal(kind)
        code, output = _finish(process)
        assert code != 0, f"interruption {number} came too late: {output}"
        if kind != signal.SIGKILL:
            assert "continue with --resume" in output
        process = _start("--resume", tmp_path / "cut", "--checkpoint-every", 1)
    code, output = _finish(process)
    assert code == 0, output
    assert "continuing after epoch" in output
    code, output = _finish(whole)
    assert code == 0, output
    config = dataclasses.replace(SMALL, compute="fused", epochs=epochs)
    one, other = (_params(tmp_path / name, epochs, config) for name in ("whole", "cut"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert (tmp_path / "whole/metrics.csv").read_text() == (
        tmp_path / "cut/metrics.csv"
    ).read_text()
    for name in ("learning_curve.png", "config.json"):
        assert (tmp_path / "cut" / name).stat().st_size


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_saving_takes_effect_afterwards_and_a_second_one_at_once(kind):
    came = []
    before = signal.signal(kind, lambda number, _: came.append(number))
    own = signal.getsignal(kind)
    try:
        with uninterrupted():
            signal.raise_signal(kind)
            assert not came
        assert came == [kind]
        assert signal.getsignal(kind) is own
        with uninterrupted():
            signal.raise_signal(kind)
            signal.raise_signal(kind)
            assert len(came) == 2
        assert signal.getsignal(kind) is own
    finally:
        signal.signal(kind, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished small training, not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run.train(SMALL, folder, checkpoint_every=1, report=lambda line: None)
    return folder


def test_metrics_have_a_row_an_epoch_and_seed(trained):
    rows = read_rows(trained / "metrics.csv")
    assert [(row["epoch"], row["seed"]) for row in rows] == [(e, 0) for e in range(1, 7)]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]


def _damage(folder):
    """Cut every data file of a checkpoint in half, as a full disk or a crash might."""
    cut = 0
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            cut += 1
    assert cut


def test_a_damaged_newest_checkpoint_is_said_and_passed_over(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    _damage(folder / "checkpoints" / "6")
    lines = []
    rows = run.train(SMALL, folder, resume=True, checkpoint_every=1, report=lines.append)
    assert any("checkpoint of epoch 6 is damaged" in line for line in lines)
    assert "continuing after epoch 5." in lines
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, _params(folder, 6), _params(trained, 6))


def test_only_damaged_checkpoints_are_an_error_not_a_new_start(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for step in (folder / "checkpoints").iterdir():
        _damage(step)
    with pytest.raises(ValueError, match="none of the checkpoints of epochs .* can be read"):
        run.train(SMALL, folder, resume=True, report=lambda line: None)


def test_a_run_folder_that_exists_is_left_alone(trained):
    before = (trained / "metrics.csv").read_text()
    with pytest.raises(FileExistsError, match="exists; write --resume"):
        run.train(SMALL, trained)
    assert (trained / "metrics.csv").read_text() == before


@pytest.mark.parametrize("left", [(), ("config.json.tmp",)])
def test_a_folder_that_an_interrupted_start_left_empty_is_started_in(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    open_folder(SMALL, tmp_path, resume=False)
    assert read_config(tmp_path / "config.json", training.Config) == SMALL
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_of_other_files_is_no_run_folder(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"holds files but no run .*write another --out"):
        open_folder(SMALL, tmp_path, resume=False)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("script", [train, ist_train])
def test_no_epochs_between_checkpoints_are_refused_before_the_start(tmp_path, script):
    with pytest.raises(ValueError, match="--checkpoint-every 0: write 1 or more"):
        script.main(script.Args(out=tmp_path / "run", checkpoint_every=0))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(trained):
    other = dataclasses.replace(SMALL, model="lenet")
    with pytest.raises(ValueError, match="another training .model psnet there, lenet here"):
        run.train(other, trained, resume=True)


@pytest.mark.parametrize(
    ("batch_size", "words"),
    [
        (240, r"^loss \w+ at step 2 of epoch 7, seed 0; "),
        (1437, r"^NaN or Inf in the weights .* after step 1 of epoch 7, seed 0 \(loss \d\S*\); "),
    ],
    ids=["within an epoch", "in an epoch's last step"],
)
def test_divergence_stops_with_step_and_margin_and_keeps_the_last_checkpoint(
    trained, tmp_path, batch_size, words
):
    how = {"compute": "fused", "batch_size": batch_size, "optimizer": "sgd"}
    config = dataclasses.replace(SMALL, **how, learning_rate=1e38, epochs=8)
    good = _params(trained, 6)
    last = good["SeparableDense_1"]
    last["bias"] = last["bias"].at[:, 0].add(5.0)  # steep: one step leads beyond float32
    open_folder(config, tmp_path, resume=False)
    shutil.copy(trained / "metrics.csv", tmp_path)
    state = {"params": good, "opt_state": training.make_optimizer(config).init(good)}
    Checkpoints(tmp_path / "checkpoints").save(6, state)
    margin = r"the largest margin of step 1 was -?\d.*checkpoint is that of epoch 6; try a lower"
    with pytest.raises(NotFiniteError, match=words + margin):
        run.train(config, tmp_path, resume=True, checkpoint_every=1, report=lambda line: None)
    kept = _params(tmp_path, 6, config)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
    jax.tree.map(np.testing.assert_array_equal, kept, good)
    assert (tmp_path / "metrics.csv").read_text() == (trained / "metrics.csv").read_text()


def test_a_state_is_sound_where_every_number_in_it_is_finite():
    state = {
        "params": {"kernel": np.ones((4, 2, 3), np.float32), "bias": np.ones((4, 3), np.float32)},
        "opt_state": (np.zeros(4, np.int32), np.ones((4, 2, 3), np.float32)),
    }
    state["params"]["bias"][1, 2] = np.nan
    state["opt_state"][1][3, 0, 0] = np.inf
    np.testing.assert_array_equal(program.sound(state), [True, False, True, False])


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("loss", "margins", "sound", "words"),
    [
        ([[1, 2], [3, INF]], [[1, 2], [3, 4]], [1, 0], "loss inf at step 2 .*5; .* step 2 was 4"),
        ([[1, 2], [NAN, 3]], [[1, 2], [NAN, 4]], [0, 0], "at step 1 .*5; .* of epoch 6 was 7.5"),
        ([[NAN, 2], [3, 4]], [[INF, 2], [3, 4]], [0, 1], "at step 1 .*4; no margin until then"),
        (
            [[1, 2], [3, 4]],
            [[1, 2], [3, NAN]],
            [1, 0],
            r"after step 2 .*5 \(loss 4.* step 1 was 3",
        ),
    ],
)
def test_the_margin_is_the_last_that_is_known(loss, margins, sound, words):
    metrics = {"loss": np.array(loss, float), "max_margin": np.array(margins, float)}
    rows = [{"epoch": e, "seed": 5, "max_margin": m} for e, m in ((5, 1.0), (6, 7.5), (7, INF))]
    with pytest.raises(NotFiniteError, match=words):
        run.check_finite(metrics, np.array(sound, bool), rows, (4, 5), 8)


def _only_one_line_of_error(output):
    assert "Traceback" not in output, output
    assert "ERROR" not in output, output
    lines = output.replace("\r", "\n").splitlines()
    assert sum("could not be" in line for line in lines) == 1, output
    assert lines[-1].startswith("error: "), output


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(trained, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    limit = 8_000  # bytes a file: enough for the metrics, not for a checkpoint
    process = _start(
        *("--resume", folder, "--epochs", 8, "--checkpoint-every", 1),
        first_lines=f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit},) * 2)",
    )
    code, output = _finish(process)
    assert code != 0
    assert "checkpoint of epoch 7 could not be saved" in output, output
    assert "last good one is that of epoch 6" in output
    _only_one_line_of_error(output)
    rows = run.train(
        dataclasses.replace(SMALL, epochs=8), folder, resume=True, report=lambda line: None
    )
    assert rows[-1]["epoch"] == 8


def test_command_errors_are_one_line(tmp_path):
    code, output = _finish(_start("--dataset", "mnits", "--out", tmp_path / "x"))
    assert code != 0
    assert "Did you mean 'mnist'" in output
    assert "Traceback" not in output
