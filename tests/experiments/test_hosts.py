"""Several real processes on loopback: the same numbers as one, only one's own shards, resumption.

A process takes seconds to start, so that runs are shared between the tests.
"""

import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from experiments._lib.checkpoint import Checkpoints
from experiments._lib.folder import hold_folder, open_folder
from experiments.hosts import cluster, launch, methods, problem
from experiments.hosts import train as script
from experiments.hosts.watch import Watch

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Half of a process's time is compilation; without LLVM's optimizations it is half of that.
QUICKLY = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
TINY = (
    "--float64 --rounds 6 --report-every 6 --checkpoint-every 3 --width 32 --batch-size 32 "
    "--workers 4 --join-timeout 120"
).split()


PLAN = (
    "--model psnet --loss psl --optimizer adam --learning-rate 0.01 --batch-size 96 --rounds 6 "
    "--report-every 6 --checkpoint-every 3 --workers 4 --join-timeout 120"
).split()
ARGUMENTS = {
    "ist": TINY,
    "data-parallel": TINY,
    "cyclic": [*PLAN, "--float64"],
    "cyclic, float32": [*PLAN, "--loss", "psl-squared"],
    "score-exchange": [*PLAN, "--float64"],
}


def start(n, *arguments, module=("-m", "experiments.hosts.train"), each=(), env=lambda i: {}):
    """Start n processes; `[(exit code, output)]`. Process i has also the arguments `each[i]`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    processes = []
    for i in range(n):
        place = ["--coordinator", address, "--num-processes", str(n), "--process-id", str(i)]
        command = [sys.executable, *module, *map(str, arguments), *(place if n > 1 else [])]
        command += each[i] if each else []
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICKLY, **env(i)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        found = [(p.communicate(timeout=240)[0], p.returncode) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [(code, output) for output, code in found]


def train(n, folder, *arguments):
    """A training that ends well: the parameters, and what the processes said."""
    found = start(n, *arguments)
    assert [code for code, _ in found] == [0] * n, found
    return dict(np.load(folder / "params.npz")), [output for _, output in found]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`runs(method, n)`: folder, parameters and outputs of n processes; each run once."""
    base, done = tmp_path_factory.mktemp("hosts"), {}

    def get(method, n):
        if (method, n) not in done:
            folder = base / f"{method}-{n}"
            name = method.split(",")[0]
            arguments = (*ARGUMENTS[method], "--method", name, "--out", folder)
            done[method, n] = (folder, *train(n, folder, *arguments))
        return done[method, n]

    return get


def close(found, expected, tolerance=1e-10):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == np.float64
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance)


def same(found, expected):
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.parametrize(
    ("method", "n"),
    [
        ("ist", 2),
        ("ist", 4),
        ("data-parallel", 2),
        ("cyclic", 2),
        ("score-exchange", 2),
    ],
)
def test_many_processes_train_what_one_process_with_as_many_devices_trains(runs, method, n):
    close(runs(method, n)[1], runs(method, 1)[1])


def test_the_one_process_has_moved_its_parameters(runs):
    """Else the theorem above says nothing."""
    for method, model, path in (
        ("ist", "mlp", ("SubnetDense_0", "kernel_transposed")),
        ("cyclic", "psnet", ("Conv_0", "kernel")),
    ):
        _, params, _ = runs(method, 1)
        initial = problem.load(problem.Config(model=model, width=32)).params()
        for name in path:
            initial = initial[name]
        assert np.abs(params["/".join(path)] - initial).max() > 1e-2


def bytes_of_the_state(output):
    found = re.search(r"(\d+) of (\d+) bytes of the state", output)
    assert found, output
    return map(int, found.groups())


@pytest.mark.parametrize("n", [2, 4])
def test_a_process_holds_only_its_shards(runs, n):
    """All weights of this network are divided; the number of the round, 4 bytes, is everybody's."""
    for output in runs("ist", n)[2]:
        own, whole = bytes_of_the_state(output)
        assert own == (whole - 4) // n + 4 * (4 // n)  # devices of a process


def test_with_data_parallelism_every_device_holds_everything(runs):
    for output in runs("data-parallel", 2)[2]:
        own, whole = bytes_of_the_state(output)
        assert own == 2 * whole


def test_of_a_plan_too_a_process_holds_only_its_shards(runs):
    """The store's arrays are padded to the workers; the number of the round is everybody's."""
    for output in runs("cyclic", 2)[2]:
        own, whole = bytes_of_the_state(output)
        copies = 2 * 2  # the round's number and Adam's count, on two devices
        assert own == (whole - 2 * 4) // 2 + 4 * copies


def without_the_end(folder, copy):
    """A run folder as it is when the training dies before the last checkpoint is complete."""
    shutil.copytree(folder, copy)
    (copy / "params.npz").unlink()
    last = copy / "checkpoints" / "6"
    (last / "commit_success.txt").unlink(missing_ok=True)
    last.rename(last.with_name("6.orbax-checkpoint-tmp"))
    return copy


def test_resumed_by_as_many_processes_it_ends_bit_for_bit_as_if_nothing_had_happened(
    runs, tmp_path
):
    """The last checkpoint was half written by a process that died: it is passed over."""
    folder, expected, _ = runs("ist", 2)
    folder = without_the_end(folder, tmp_path / "run")
    found, outputs = train(2, folder, "--resume", folder, *CADENCE)
    same(found, expected)
    assert "continuing after round 3." in outputs[0]
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"3", "6"}


def test_a_checkpoint_of_four_processes_is_continued_by_two(runs, tmp_path):
    """And a complete checkpoint that only one of them cannot read is passed over, by both."""
    folder, expected, _ = runs("ist", 4)
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    (copy / "params.npz").unlink()
    [path] = (copy / "checkpoints" / "6").rglob("ocdbt.process_3/d/*")
    path.write_bytes(path.read_bytes()[:10])
    found, outputs = train(2, copy, "--resume", copy, *CADENCE)
    close(found, expected)
    assert "checkpoint of round 6 could not be read by another process" in outputs[0]
    assert "checkpoint of round 6 is damaged" in outputs[1]
    assert "continuing after round 3." in outputs[0]


def test_an_error_without_words_is_a_damaged_checkpoint_too(monkeypatch, tmp_path):
    (tmp_path / "1").mkdir()

    def load(*_):
        raise AssertionError

    monkeypatch.setattr(Checkpoints, "_load", load)
    lines = []
    with pytest.raises(ValueError, match="none of the checkpoints"):
        Checkpoints(tmp_path).restore({}, lines.append)
    assert lines == ["checkpoint of epoch 1 is damaged (AssertionError); trying the one before."]


def test_a_plan_of_two_processes_is_continued_as_another_plan_by_three(runs, tmp_path):
    """Of four workers as of six, cyclic quorums as merged pairs: the same sum in another order."""
    folder, expected, _ = runs("cyclic", 2)
    copy = without_the_end(folder, tmp_path / "run")
    other = ("--method", "pairs", "--workers", "6")
    found, outputs = train(3, copy, "--resume", copy, *other, *CADENCE)
    close(found, expected)
    assert "continuing after round 3." in outputs[0]


def test_in_float32_it_is_the_same_to_1e_4_and_as_accurate(runs, tmp_path):
    folder, expected, _ = runs("cyclic, float32", 2)
    copy = without_the_end(folder, tmp_path / "run")
    found, _ = train(1, copy, "--resume", copy, "--method", "pairs", "--workers", "3", *CADENCE)
    for name in expected:
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-4)
    last = lambda folder: (folder / "metrics.csv").read_text().splitlines()[-1].split(",")
    assert last(copy)[:2] == last(folder)[:2]  # rounds, samples
    assert last(copy)[3] == last(folder)[3]  # accuracy


CADENCE = ("--report-every", "6", "--checkpoint-every", "3", "--join-timeout", "120")


def test_processes_that_were_asked_for_other_things_are_refused_before_they_begin(tmp_path):
    """Each item and the process are named, in both; and no run folder is made."""
    other = ["--seed", "7", "--report-every", "5", "--num-processes", "3", "--out", tmp_path / "b"]
    arguments = (*TINY, "--method", "ist", "--seed", "0", "--out", tmp_path / "a")
    found = start(2, *arguments, each=([], list(map(str, other))))
    assert [code for code, _ in found] == [launch.FAILED, launch.MISSING], found
    for _, output in found:
        assert "process 1 has configuration.seed 7, the others 0" in output
        assert 'process 1 has arguments.report_every "5", the others "6"' in output
        assert "process 1 has arguments.out " in output
        assert "process 1 has processes 3, the others 2" in output
        assert "Continue with --resume" not in output
    assert not list(tmp_path.iterdir())


DIFFER = """
import sys, dataclasses
import numpy as np
from experiments.hosts import cluster, methods, problem, train
cluster.initialize(cluster="slurm", timeout=120)
me = cluster.process_id()
print(f"process {me} of {cluster.num_processes()} with {cluster.coordinator()}")
config = problem.Config(workers=2, width=16, rounds=2)
task = problem.load(config)
what = train.made(task, methods.make(task, methods.workers_mesh(2)))
what["version"] = train.version()
cluster.agree(what, name="same")
other = dataclasses.replace(task, train={**task.train, "y": np.roll(task.train["y"], 1)})
changed = {
    "data": {**what, "data": other.fingerprint()},
    "plan": {**what, "plan": {**what["plan"], "method": "local-sgd"}},
    "version": {**what, "version": {**what["version"], "source": "another"}},
}
for name, mine in changed.items():
    try:
        cluster.agree(mine if me == 1 else what, name=name)
    except cluster.ClusterError as error:
        print(f"{name}: {error}")
"""


def slurm_job():
    """A number, and the port that JAX makes of it, which is free."""
    for job in range(os.getpid(), os.getpid() + 100):
        port = job % 2**12 + 65536 - 2**12
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", port)):
                return job, port
    pytest.fail("no port is free")


@pytest.fixture(scope="module")
def compared():
    """Two processes of a Slurm job, which JAX finds by its variables, compare this and that."""
    job, port = slurm_job()
    variables = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
    }
    env = lambda i: {**variables, "SLURM_PROCID": str(i)}
    return port, start(2, module=("-c", DIFFER), env=env)


def test_the_processes_of_a_slurm_job_find_one_another(compared):
    port, found = compared
    for i, (_, output) in enumerate(found):
        assert f"process {i} of 2 with 127.0.0.1:{port}" in output


def test_other_data_another_plan_or_version_are_refused_by_name(compared):
    for code, output in compared[1]:
        assert code == 0, output
        assert re.search('data: .*process 1 has data "', output)
        assert re.search('plan: .*process 1 has plan.method "local-sgd", the others "ist"', output)
        assert re.search("version: .*process 1 has version.source", output)


STRANGE = r"""
import pathlib, socket, sys, time
from jax._src import distributed
from experiments.hosts import cluster
from experiments.hosts.watch import Watch
address, processes, process = sys.argv[2], int(sys.argv[4]), int(sys.argv[6])
cluster.initialize(address, processes, process, timeout=120)
port = int(address.rpartition(":")[2])
if process == 0:
    listening = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in pathlib.Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.rpartition(":")[2], 16) == port:
                listening.add(local.rpartition(":")[0])
    print("listening:", sorted(listening))
    for other in ("127.0.0.1", "127.0.0.2", "::1"):
        try:
            socket.create_connection((other, port), timeout=5).close()
            print(f"reached at {other}.")
        except OSError:
            print(f"not reached at {other}.")
with Watch(deadline=60 if process else 10, start=60) as watch:
    client = distributed.global_state.client
    watch.at(0, "batch")
    if process == 0:
        for key, value in {
            "9": b"[0, 1, 1]",
            "-1": b"[0, 1, 1]",
            "x": b"[0, 1, 1]",
            "note/1": b"{",
            "note/0": b'{"by": 7, "process": 1, "why": "no"}',
            "error/one": b"no",
            "else/1": b"no",
            "error/1": b"\xff\xfe",
        }.items():
            client.key_value_set_bytes(f"psjax/live/{key}", value, allow_overwrite=True)
        for value in (b"", b"\xff", b"[]", b"[0, 1]", b"[0, 77, 1]", b'["0", 1, 1]', b"null"):
            client.key_value_set_bytes("psjax/live/1", value, allow_overwrite=True)
            time.sleep(0.1)
        until = time.monotonic() + 7  # process 1 itself writes there too
        while "psjax/live/1" not in watch.odd and time.monotonic() < until:
            client.key_value_set_bytes("psjax/live/1", value, allow_overwrite=True)
            time.sleep(0.05)
        watch.at(1, "step")
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def strange():
    """Two processes, in whose store something else writes; process 1 does not go on."""
    return start(2, module=("-c", STRANGE))


def test_the_coordinator_of_one_host_listens_on_loopback_alone(strange):
    output = strange[0][1]
    loopback = "(0000000000000000FFFF0000)?0100007F"  # 127.0.0.1, which IPv6 writes longer
    assert re.search(rf"listening: \['{loopback}'\]", output), output
    assert "\nreached at 127.0.0.1." in output
    assert "not reached at 127.0.0.2." in output
    assert "not reached at ::1." in output


def test_what_else_writes_to_the_store_is_named_and_the_deadline_still_works(strange):
    (code, output), (other, _) = strange
    assert (code, other) == (launch.MISSING, 1)
    for key in ("9", "-1", "x", "note/1", "note/0", "error/one", "else/1", "error/1", "1"):
        assert output.count(f"'psjax/live/{key}' is b") == 1, key
    assert re.search("process 1 is late: it is still in 'batch' of round 0", output)


def test_a_coordinator_at_an_address_of_another_host_is_named():
    with pytest.raises(cluster.ClusterError, match="listen on port 1234 of 192.0.2.1: .*BIND"):
        cluster.initialize("192.0.2.1:1234", 2, 0)


def test_where_the_coordinator_listens_can_be_another_address(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_BIND_ADDRESS", "127.0.0.2:1234")
    joined = mock.Mock()
    monkeypatch.setattr("jax.distributed.initialize", joined)
    cluster.initialize("192.0.2.1:1234", 2, 0)
    assert joined.call_args.kwargs["coordinator_bind_address"] == "127.0.0.2:1234"
    monkeypatch.delenv("JAX_COORDINATOR_BIND_ADDRESS")
    cluster.initialize("localhost:1234", 2, 0)
    assert joined.call_args.kwargs["coordinator_bind_address"] == "localhost:1234"


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1}', "[" * 10000])
def test_what_no_process_says_at_the_start_is_named(monkeypatch, text):
    client = mock.Mock(blocking_key_value_get=mock.Mock(return_value=text))
    monkeypatch.setattr(cluster.distributed.global_state, "client", client)
    with pytest.raises(cluster.ClusterError, match="process 0 says .*something else writes there"):
        cluster.agree({"a": 1})


def test_a_port_in_use_is_named():
    with socket.socket(socket.AF_INET6) as s:
        s.bind(("::", 0))
        s.listen()
        port = s.getsockname()[1]
        with pytest.raises(cluster.ClusterError, match=f"cannot listen on port {port} of"):
            cluster.initialize(f"127.0.0.1:{port}", 2, 0)


def test_a_coordinator_that_nobody_hears_is_named():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(cluster.ClusterError, match=f"nobody listens at 127.0.0.1:{port}"):
        cluster.initialize(f"127.0.0.1:{port}", 2, 1, timeout=0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", None, 0), "write --num-processes and --process-id too"),
        (("127.0.0.1", 2, 0), "write host:port"),
        ((None, 2, 0), "write --coordinator"),
        (("127.0.0.1:1", 2, 2), "write 0 to 1"),
        (("127.0.0.1:1", 0, 0), "write 1 or more"),
        (("127.0.0.1:99999", 2, 0), "write host:port"),
    ],
)
def test_half_an_address_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        cluster.initialize(*arguments)


@pytest.mark.parametrize("option", ["checkpoint_every", "report_every"])
def test_no_rounds_between_reports_are_refused_before_anybody_joins(option):
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')} 0: write 1 or more"):
        script.main(script.Args(**{option: 0}))


def test_no_cluster_to_detect_is_named():
    [(code, output)] = start(1, "--cluster", "auto", "--join-timeout", "60")
    assert code == 1
    assert "JAX finds no such cluster here" in output
    assert "write --coordinator host:port" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(learning_rate=-0.1), "--learning-rate -0.1: write a number above 0"),
        (dict(learning_rate=float("nan")), "--learning-rate nan: write a number above 0"),
        (dict(seed=-1), "--seed -1: write a number between 0 and 2147483647"),
        (dict(seed=2**31), "--seed 2147483648: write a number between 0 and 2147483647"),
        (dict(rounds=0), "--rounds 0: write 1 or more"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        problem.Config(**arguments)


def test_a_folder_in_which_another_process_trains_is_refused(tmp_path):
    folder = tmp_path / "run"
    with hold_folder(problem.Config(rounds=2, workers=1), folder, resume=False):
        [(code, output)] = start(1, "--resume", str(folder))
    assert code == 1
    assert f"run folder {folder} is in use by process {os.getpid()}" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=32, workers=3), "--batch-size 32 --workers 3: write a batch"),
        (dict(method="its"), "Did you mean 'ist'?"),
        (dict(width=20, workers=4), "write --width 32"),
        (dict(model="psnet", workers=1), "write --model mlp"),
        (dict(method="cyclic", loss="psl", workers=1), "write --model psnet"),
        (dict(method="pairs", model="psnet", workers=1), "write --loss psl"),
        (dict(method="cyclic", model="psnet", loss="psl", local_steps=2, workers=1), "write 1."),
    ],
)
def test_a_method_that_cannot_be_is_refused(arguments, message):
    config = problem.Config(**arguments)
    mesh = methods.workers_mesh(config.workers)
    with pytest.raises(ValueError, match=re.escape(message)):
        methods.make(problem.load(config), mesh)


def test_more_workers_than_devices_are_refused():
    with pytest.raises(ValueError, match=r"the processes have \[8\] devices; write 8 or fewer"):
        methods.workers_mesh(9)


def test_samples_of_a_step_do_not_depend_on_the_number_of_workers():
    two, four = (
        problem.load(problem.Config(workers=n, batch_size=32, local_steps=3)).samples(5)
        for n in (2, 4)
    )
    assert two.shape == (2, 3, 16)
    as_steps = lambda x: np.swapaxes(x, 0, 1).reshape(3, 32)
    np.testing.assert_array_equal(as_steps(two), as_steps(four))


def test_the_launcher_goes_on_with_the_same_arguments_but_another_folder_option():
    arguments = ["--method", "ist", "--out", "a", "--seed=3"]
    assert launch._value(arguments, "--out") == "a"
    assert launch._value(arguments, "--seed") == "3"
    assert launch._without(arguments, "--out", "--seed") == ["--method", "ist"]


def test_a_launcher_that_is_ended_ends_what_it_has_started(tmp_path):
    wait = tmp_path / "wait.sh"
    wait.write_text("echo $$\nexec sleep 600\n")
    command = [sys.executable, "-m", "experiments.hosts.launch", "--prefix", f"sh {wait}", "--"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        started = [int(process.stdout.readline().split()[1]) for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
    for number in started:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.parametrize(
    ("code", "starts"), [(-signal.SIGKILL, 3), (1, 3), (None, 3), (launch.FAILED, 1)]
)
def test_the_launcher_starts_again_smaller_unless_it_would_fail_again(
    monkeypatch, tmp_path, capsys, code, starts
):
    numbers = []

    def run(n, *_):
        numbers.append(n)
        return {n - 1: code}

    monkeypatch.setattr(launch, "run", run)
    arguments = ["--elastic", "--processes", "3", "--", "--out", str(tmp_path / "run")]
    assert launch.main(arguments) == 1
    assert numbers == [3, 2, 1][:starts]
    assert "--resume" not in capsys.readouterr().out  # there is no run folder


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(75, "", True), (75, "9", True), (75, "10", False), (78, "", False), (137, "", True)],
)
def test_a_slurm_job_goes_back_into_the_queue_if_that_may_help(tmp_path, code, restarts, again):
    for name, line in (("srun", f"exit {code}"), ("scontrol", 'echo "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"}
    env |= {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    job = ["bash", ROOT / "experiments/hosts/slurm.sh", tmp_path / "run"]
    found = subprocess.run(job, env=env, capture_output=True, text=True)
    assert found.returncode == code
    assert found.stdout == ("requeue 17\n" if again else "")


def test_only_where_the_workers_share_one_sum_may_their_number_change(tmp_path):
    for method, allowed in (("data-parallel", True), ("ist", False), ("local-sgd", False)):
        folder, config = tmp_path / method, problem.Config(method=method, workers=4)
        open_folder(config, folder, False, script._free)
        other = problem.Config(method=method, workers=2, rounds=900)
        if allowed:
            open_folder(other, folder, True, script._free)
        else:
            with pytest.raises(ValueError, match=r"another training \(workers 4 there, 2 here\)"):
                open_folder(other, folder, True, script._free)


def test_a_run_folder_that_is_not_shared_is_named(tmp_path):
    with pytest.raises(cluster.ClusterError, match="process 0 does not see run folder"):
        script._check_shared(tmp_path)


class Ended(BaseException):
    """In the place of the process's end; its exit code."""


@pytest.fixture
def watch(monkeypatch):
    """Of process 1 of 2, which hears of the coordinator; without its threads."""

    def leave(code):
        raise Ended(code)

    monkeypatch.setattr(os, "_exit", leave)
    watch = Watch(deadline=0.5)
    watch.me, watch.processes = 1, 2
    watch.client = watch.shell = mock.MagicMock()
    watch.heard = time.monotonic() + 1000
    return watch


def failing(watch, error):
    """The exit code of a process that fails in a step."""
    watch.at(3, "step")
    try:
        raise error
    except type(error) as caught:
        with pytest.raises(Ended) as ended:
            watch.__exit__(type(caught), caught, caught.__traceback__)
    return ended.value.args[0]


def test_what_fails_by_itself_says_how_and_would_again(watch, capsys):
    """Where it is no error that says in a line what to do, the traceback is there."""
    assert failing(watch, KeyError("x")) == launch.FAILED
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "error: process 1: it failed in 'step' of round 3: KeyError: 'x'." in said
    assert "Continue with --resume" in said


def test_what_fails_beside_a_silent_one_says_both(watch, capsys):
    watch.seen[0] = ("[3, 1, 5]", time.monotonic() - 0.4)
    assert failing(watch, ValueError("no data")) == launch.MISSING
    said = capsys.readouterr().err
    assert "error: process 1: process 0 has not been heard of for 0 s" in said
    assert "; process 1 failed in 'step' of round 3: no data." in said
    assert "Traceback" not in said


def test_a_process_that_was_frozen_says_so_and_blames_nobody(watch, capsys):
    watch.looked = watch.heard = time.monotonic() - 100
    with pytest.raises(Ended, match="1"):
        watch._look()
    assert "error: process 1: it was itself stopped for 100 s" in capsys.readouterr().err


def test_a_last_barrier_that_nobody_comes_to_is_an_error_like_others(watch, monkeypatch, capsys):
    watch.seen[0] = ("[3, 1, 5]", time.monotonic() - 0.4)
    monkeypatch.setattr(cluster, "barrier", mock.Mock(side_effect=RuntimeError("timed out")))
    with pytest.raises(Ended, match=str(launch.MISSING)):
        watch.__exit__(None, None, None)
    assert "process 0 has not been heard of" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), ValueError("closed")])
def test_a_process_ends_also_where_nothing_can_be_written(watch, monkeypatch, failure):
    log = mock.Mock(spec=io.TextIOBase, write=mock.Mock(side_effect=failure))
    monkeypatch.setattr(sys, "stderr", log)
    with pytest.raises(Ended, match=str(launch.MISSING)):
        watch._end(0, "is gone")
    assert log.write.called
    assert watch.shell.communicate.called
