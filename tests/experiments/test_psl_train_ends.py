"""How a training ends that is interrupted at any moment, or cannot write; how soon it begins."""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from experiments._lib.checkpoint import Checkpoints
from experiments._lib.signals import Interruption, Tolerant
from experiments._lib.tables import write_rows

ROOT = pathlib.Path(__file__).parents[2]
QUICK = ("--compute", "fused", "--batch-size", "1437", "--checkpoint-every", "1")


def start(*options, first_lines="", script="psl", **streams):
    """The command in a process of its own; `first_lines` of Python before it."""
    # A shell's background job, and whatever it starts, has SIGINT ignored: not what is tested.
    command = f"""{first_lines}
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv = {["train", *map(str, options)]!r}
runpy.run_module("experiments.{script}.train", run_name="__main__", alter_sys=True)
"""
    return subprocess.Popen(
        [sys.executable, "-c", command],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **streams},
    )


def finish(process, timeout=300):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


# -------------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("seconds", [0.2, 1.0, 2.0])
@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_while_xla_compiles_it_ends_in_the_usual_way(tmp_path, kind, seconds):
    """The default compiles its epoch for seconds, in a thread that no signal stops."""
    process = start("--out", tmp_path / "run")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("padding: "):
            break
    time.sleep(seconds)
    process.send_signal(kind)
    code, output = finish(process)
    assert (code, output.splitlines()[-1]) == (
        1,
        "interrupted; continue with --resume and the run folder.",
    )
    assert "Traceback" not in output


SWALLOWED = """
import signal
from experiments._lib import loop
write = loop.write_rows

def write_and_swallow(path, rows):
    write(path, rows)
    if rows[-1]["epoch"] == 2:
        try:  # as a callback of JAX, or a destructor
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            print("swallowed")

loop.write_rows = write_and_swallow
"""


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("psl", QUICK),
        ("ist", ("--dataset", "digits", "--width", "8", "--subnets", "2", "--local-steps", "1")),
    ],
)
def test_a_signal_that_a_callback_swallows_ends_the_training_all_the_same(
    tmp_path, script, options
):
    lines = SWALLOWED
    process = start(
        "--out", tmp_path / "run", "--epochs", 30, *options, first_lines=lines, script=script
    )
    code, output = finish(process)
    assert code == 1, output
    assert "swallowed" in output
    assert "interrupted; continue with --resume" in output
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 3


def test_a_signal_in_a_callback_of_the_garbage_collector_ends_the_training_at_once(tmp_path):
    lines = """
import gc, signal, time
from experiments.psl import training

def callback(phase, info):
    if phase == "stop":
        gc.callbacks.remove(callback)
        signal.raise_signal(signal.SIGTERM)

def build(*_):
    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)
    print("slept")

training.build = build
"""
    code, output = finish(start("--out", tmp_path / "run", first_lines=lines))
    assert code == 1
    assert output == "\ninterrupted; continue with --resume and the run folder.\n"


def test_a_signal_that_became_another_error_is_still_an_interruption(tmp_path):
    lines = """
import signal
from experiments.psl import training

def build(*_):
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt as error:
        raise RuntimeError("INTERNAL: callback failed") from error

training.build = build
"""
    code, output = finish(start("--out", tmp_path / "run", first_lines=lines))
    assert code == 1
    assert output == "\ninterrupted; continue with --resume and the run folder.\n"


def test_an_interruption_is_remembered():
    interruption = Interruption()
    interruption.check()
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        interruption(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
        interruption.check()


# --------------------------------------------------------------------------------- nowhere to write


@pytest.fixture
def small_disk(tmp_path):
    """A folder with room for 100 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    library = ctypes.CDLL(None, use_errno=True)
    if library.mount(b"psjax", os.fsencode(folder), b"tmpfs", 0, b"size=100k"):
        pytest.skip(f"cannot mount a small disk: {os.strerror(ctypes.get_errno())}")
    yield folder
    assert library.umount(os.fsencode(folder)) == 0


def test_a_full_disk_is_one_line(small_disk):
    code, output = finish(start("--out", small_disk / "run", "--epochs", 3, *QUICK))
    assert code == 1
    lines = output.replace("\r", "\n").splitlines()
    assert "Traceback" not in output
    assert lines[-1].startswith("error: checkpoint of epoch 1 could not be saved under"), output
    assert "No space left on device. The last good one" in lines[-1]
    assert sum("No space left" in line for line in lines) == 1


def test_metrics_that_cannot_be_written_are_named_and_the_old_ones_stay(small_disk):
    path = small_disk / "metrics.csv"
    write_rows(path, [{"epoch": 1}])
    (small_disk / "other").write_bytes(bytes(80_000))
    with pytest.raises(OSError, match=r"metrics.csv could not be written: No space left on devi"):
        write_rows(path, [{"epoch": e} for e in range(10_000)])
    assert path.read_text() == "epoch\n1\n"
    assert sorted(p.name for p in small_disk.iterdir()) == ["metrics.csv", "other"]


def test_with_stderr_closed_it_works_on(tmp_path):
    process = start(
        *("--out", tmp_path / "run", "--epochs", 2, *QUICK),
        first_lines="import os, sys; os.close(2); sys.stderr = None",
        stderr=None,
    )
    code, output = finish(process)
    assert code == 0
    assert "test accuracy" in output
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [1, 2]


@pytest.mark.parametrize("where", ["/dev/full", "pipe"])
def test_where_messages_cannot_be_written_it_works_on(tmp_path, where):
    if where == "pipe":  # whose reader is gone
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(where, os.O_WRONLY)
    process = start("--out", tmp_path / "run", "--epochs", 2, *QUICK, stderr=writer)
    os.close(writer)
    code, output = finish(process)
    assert code == 0
    assert "test accuracy" in output
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [1, 2]


def test_a_tolerant_stream_is_the_stream_where_that_can_be_written(capsys):
    stream = Tolerant(sys.stdout)
    print("a line", file=stream, flush=True)
    assert capsys.readouterr().out == "a line\n"
    assert stream.isatty() == sys.stdout.isatty()


# --------------------------------------------------------------------------------------------- soon


COUNTS = """
import atexit, logging, sys
import jax

names = []

class Compilations(logging.Handler):
    def emit(self, record):
        line = record.getMessage()
        if line.startswith("Finished XLA compilation"):
            names.append(line.split()[4])

logger = logging.getLogger("jax")
logger.addHandler(Compilations())
logger.propagate = False
jax.config.update("jax_log_compiles", True)
atexit.register(lambda: print("compiled", len(names), *names))
"""


@pytest.mark.parametrize("command", ["start", "resume"])
def test_the_main_job_compiles_four_programs(tmp_path_factory, command):
    """The initial weights, an epoch, whether the state is finite, the accuracy: nothing else."""
    folder = tmp_path_factory.getbasetemp() / "counted"
    where = ("--out", folder) if command == "start" else ("--resume", folder, "--epochs", 3)
    if command == "resume" and not folder.exists():
        pytest.skip("needs the run that the other case starts")
    if command == "start":
        where = (*where, "--epochs", 1)
    code, output = finish(start(*where, first_lines=COUNTS))
    assert code == 0, output
    [line] = [line for line in output.splitlines() if line.startswith("compiled ")]
    assert int(line.split()[1]) <= 4, line


SAME_NUMBERS = """
import jax, numpy as np
from experiments.{0} import training

def optimized(start, seeds):
    return jax.jit(lambda seeds: jax.lax.map(start, seeds))(np.asarray(seeds, np.int32))

config = training.Config({1})
soon = jax.device_get(training.build(config).state)
training.initial_states = optimized
well = jax.device_get(training.build(config).state)
jax.tree.map(np.testing.assert_array_equal, soon, well)
print("equal", len(jax.tree.leaves(well)))
"""


@pytest.mark.parametrize(("script", "options"), [("psl", "seeds=2"), ("ist", "dataset='digits'")])
def test_initial_weights_compiled_soon_are_those_compiled_well(script, options):
    command = [sys.executable, "-c", SAME_NUMBERS.format(script, options)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert "equal" in found.stdout, found.stderr
