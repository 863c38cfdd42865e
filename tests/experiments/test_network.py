"""The benchmark of slow links: its arithmetic, its refusals, and one training over two hosts."""

import subprocess
import sys

import pytest

from experiments._lib.command import run_script
from experiments._lib.tables import read_mixed, write_rows
from experiments.benchmarks import network, network_worker


def row(**changes):
    """What a training of 10 rounds of 5 steps found: 80 % after 4 rounds, never 90 %."""
    return {
        "dataset": "digits",
        "method": "ist",
        "loss": "nll",
        "hosts": 2,
        "mbit": 0,
        "raw_mbit_low": 90.0,
        "raw_mbit_high": 95.0,
        "weights": 10,
        "batch_size": 8,
        "local_steps": 5,
        "rounds": 10,
        "step_ms": 2.0,
        "step_ms_low": 1.0,
        "step_ms_high": 3.0,
        "step_ms_mean": 2.5,
        "host_round_bytes": 1.05e6,
        "ledger_host_round_bytes": 1e6,
        "trained": 1,
        "seconds": 0.125,
        "accuracy": 0.85,
        "rounds_80": 4,
        "seconds_80": 0.06,
        "megabytes_80": 8.2,
        "rounds_90": "",
        "seconds_90": "",
        "megabytes_90": "",
        "rounds_95": "",
        "seconds_95": "",
        "megabytes_95": "",
        **changes,
    }


@pytest.mark.parametrize(
    ("user", "missing", "said"),
    [(1000, (), "need root"), (0, ("ip",), "command ip"), (0, ("tc",), "command tc")],
)
def test_without_root_or_its_commands_it_ends_in_one_clear_line(
    tmp_path, monkeypatch, user, missing, said
):
    monkeypatch.setattr("os.geteuid", lambda: user)
    which = lambda name: None if name in missing else f"/sbin/{name}"
    monkeypatch.setattr("shutil.which", which)
    if missing == ("tc",):
        monkeypatch.setattr("experiments.faults.namespaces.unavailable", lambda: None)
    out = str(tmp_path / "network.csv")
    monkeypatch.setattr("sys.argv", ["network", "--datasets", "digits", "--out", out])
    with pytest.raises(SystemExit, match=f"^error: .*{said}.*write --plot") as ended:
        run_script(network.main, network.Args, network.__doc__)
    assert "\n" not in str(ended.value)
    assert not list(tmp_path.iterdir())


def test_arguments_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--datasets cifar: write some of spoken_digit, mnist"):
        network.Args(datasets=("cifar",))
    with pytest.raises(ValueError, match="--methods sgd: write some of data-parallel"):
        network.Args(methods=("sgd",))
    with pytest.raises(ValueError, match="write 2 or more hosts"):
        network.Args(hosts=(1, 2))


def test_sent_bytes_are_the_interfaces_counter(tmp_path):
    folder = tmp_path / "eth0" / "statistics"
    folder.mkdir(parents=True)
    (folder / "tx_bytes").write_text("123456789012\n")
    assert network_worker.sent_bytes("eth0", str(tmp_path)) == 123456789012


@pytest.mark.parametrize(("mbit", "burst"), [(100, 16384), (1000, 125_000), (10_000, 1_250_000)])
def test_a_bucket_holds_a_millisecond_of_the_link_or_ten_packets(mbit, burst):
    remove, add = network_worker.shape("eth0", mbit)
    assert remove == ["tc", "qdisc", "del", "dev", "eth0", "root"]
    limits = f"tbf rate {mbit}mbit burst {burst}b latency 100ms"
    assert " ".join(add) == f"tc qdisc add dev eth0 root {limits}"
    assert network_worker.shape("eth0", 0) == [remove]


def test_a_row_adds_the_hosts_bytes_and_finds_when_an_accuracy_was_reached():
    accuracies, sent = (0.5, 0.85, 0.8, 0.92), ((10, 20, 30, 40), (20, 20, 20, 20))
    cells = tuple(
        {
            "mbit": 100,
            "raw_mbit": 90 + i,
            "trained": True,
            "times": [(2, 2.0), (2, 4.0), (2, 6.0), (2, 12.0)],
            "reports": [
                {"round": 2 * k + 2, "seconds": 4.0 * k, "accuracy": a, "sent": own[k]}
                for k, a in enumerate(accuracies)
            ],
        }
        for i, own in enumerate(sent)
    )
    host = {"ledger_bytes": 44, "local_steps": 2, "weights": 3}
    found = network_worker.row_of((0.8, 0.9, 0.95), [host, host], cells)
    assert (found["hosts"], found["rounds"]) == (2, 8)
    assert (found["raw_mbit_low"], found["raw_mbit_high"]) == (90, 91)
    assert found["host_round_bytes"] == 180 / 2 / 8
    assert found["ledger_host_round_bytes"] == 22
    assert (found["step_ms"], found["step_ms_mean"]) == (1250, 750)
    assert (found["rounds_80"], found["seconds_80"], found["megabytes_80"]) == (4, 4.0, 70 / 1e6)
    assert (found["rounds_90"], found["seconds_90"], found["megabytes_90"]) == (8, 12.0, 180 / 1e6)
    assert found["rounds_95"] == found["seconds_95"] == found["megabytes_95"] == ""


def test_what_was_only_timed_takes_the_rounds_of_the_training_elsewhere():
    full = row()
    timed = row(mbit=100, trained=0, rounds_80="", seconds_80="", megabytes_80="")
    assert network.to_accuracy([full, timed], full, 0.8) == {
        "measured": True,
        "seconds": 0.06,
        "samples": 4 * 5 * 8 / 1e3,
        "megabytes": 8.2,
    }
    assert network.to_accuracy([full, timed], timed, 0.8) == {
        "measured": False,
        "seconds": 4 * 5 * 2.5e-3,
        "samples": 4 * 5 * 8 / 1e3,
        "megabytes": pytest.approx(4 * 2 * 1.05),
    }
    assert network.to_accuracy([full, timed], timed, 0.9) is None
    given_up = timed | {"trained": 1}
    assert network.to_accuracy([full, given_up], given_up, 0.8)["measured"] is False
    assert network.to_accuracy([timed], timed, 0.8) is None  # trained nowhere


def test_tables_and_a_figure_come_from_the_csv_alone(tmp_path):
    out = tmp_path / "network.csv"
    slow = {"mbit": 100, "step_ms_mean": 50.0, "seconds_80": 1.5}
    whole = {"method": "data-parallel", "local_steps": 1}
    rows = [row(), row(**slow), row(**whole), row(**whole, **slow | {"seconds_80": 15.0})]
    write_rows(out, rows)
    assert read_mixed(out) == rows
    network.main(network.Args(out=out, plot=True))
    text = out.with_suffix(".md").read_text()
    assert "| digits | 2 | IST, J = 10 | 5 | 1.00 | 1.050 | 1.050 |" in text  # bytes
    assert "| digits | 2 | IST, J = 10 | 1.50 | 0.0600 | 0.160 | 8.20 |" in text  # to 80 %
    assert "| digits | 2 | IST, J = 10 | 10.0 | 1.00 |" in text  # times sooner
    assert text.count("not reached") == 2 * 2 * 4
    assert out.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("value", "text"), [(None, "not reached"), (0.01234, "0.0123"), (1, "1.00"), (99.96, "100")]
)
def test_numbers_have_three_digits(value, text):
    assert network.number(value).removesuffix(".0") == text


def test_of_what_was_measured_bytes_are_those_of_the_ledger_where_a_step_sends_a_megabyte():
    rows = [r for r in read_mixed(network.CSV) if r["ledger_host_round_bytes"] >= 1e6]
    assert {r["hosts"] for r in rows} == {2, 4}
    assert {"data-parallel", "local-sgd", "ist"} <= {r["method"] for r in rows}
    for r in rows:
        assert abs(r["host_round_bytes"] / r["ledger_host_round_bytes"] - 1) < 0.08, r


reason = network.unavailable()


@pytest.mark.skipif(reason is not None, reason=reason or "")
def test_two_hosts_send_over_a_slow_link_what_the_ledger_says(tmp_path):
    out = tmp_path / "network.csv"
    chosen = "--datasets digits --hosts 2 --mbit 100 --methods data-parallel --cap 1 --out"
    command = [sys.executable, "-m", "experiments.benchmarks.network", *chosen.split(), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (found,) = read_mixed(out)
    assert found["ledger_host_round_bytes"] > 1e6
    assert found["host_round_bytes"] == pytest.approx(found["ledger_host_round_bytes"], rel=0.08)
    assert 50 < found["raw_mbit_low"] < 100
    # a link of 100 Mbit/s cannot be faster than this, and the bucket holds only a millisecond
    assert found["step_ms"] > 0.9 * found["host_round_bytes"] * 8 / 100e6 * 1e3
    assert found["rounds_80"]
    before = out.read_text()
    args = network.Args(("digits",), (2,), (100,), ("data-parallel",), out=out)
    network.main(args)  # nothing is left to measure
    assert out.read_text() == before
