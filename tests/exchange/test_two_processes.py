"""Two real processes over a loopback interface of their own send what the ledger says."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The processes have a network to themselves, so that its counters and ports are theirs alone.
SCRIPT = """
ip link set lo up || exit 77
{python} -m tests.exchange.two_processes 127.0.0.1:4321 1 > /dev/null &
{python} -m tests.exchange.two_processes 127.0.0.1:4321 0
wait
"""


def test_two_processes_send_what_the_ledger_says_and_train_as_two_simulated_workers_do():
    """To three hundredths, for TCP has headers and acknowledgements; a million weights in int4."""
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rn", "true"], check=False).returncode:
        pytest.skip("no network namespace of one's own here")
    run = subprocess.run(
        [unshare, "-rn", "sh", "-c", SCRIPT.format(python=sys.executable)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if run.returncode == 77:
        pytest.skip("the network namespace has no loopback interface to set up")
    assert run.stdout, run.stderr
    counted, said, far = map(float, run.stdout.split()[-3:])
    shard = 64 * -(-1_000_000 // (2 * 64))
    assert said == 2 * 2 * (shard // 2 + 4 * shard // 64)
    assert said <= counted <= 1.03 * said
    assert far < 1e-6
