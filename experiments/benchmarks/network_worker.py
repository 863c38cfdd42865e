"""One host of `experiments.benchmarks.network`, which starts it inside its network namespace.

Trains the same thing once at each rate of its own link. Compilation and two rounds of warming up
come before. Then the clock runs for ten gradient steps at a time, from a moment at which all hosts
meet, their input ready, to the next one: what any host still has to do or to send is inside. The
bytes that the interface sent are read at the same moments. Evaluation stands outside of both. What
was measured goes to `host{i}.json` of the folder, after every rate.
"""

import argparse
import faulthandler
import json
import logging
import pathlib
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.hosts import cluster, methods, problem
from psjax import cost

SECOND = 1.0  # of the test of the bare link
CHUNK = 1 << 18
PORT = 7000
MOST_SILENT = 600  # seconds after which a host that waits for the others ends
TOGETHER = 10  # gradient steps between two meetings, whose batches are made beforehand
LEAST_ROUNDS = 10


# ----------------------------------------------------------------------------------------- the link


def sent_bytes(interface: str, sys_net: str = "/sys/class/net") -> int:
    """Bytes that the interface has sent, as `ip -s link` shows them."""
    text = pathlib.Path(sys_net, interface, "statistics", "tx_bytes").read_text()
    return int(text)


def shape(interface: str, mbit: float) -> list[list[str]]:
    """The commands that give an interface of this namespace a rate; 0: no limit.

    A token bucket holds what the link sends in a millisecond, so that a program that computes for a
    while cannot save up bandwidth; at least 16 KiB, ten packets.
    """
    remove = ["tc", "qdisc", "del", "dev", interface, "root"]
    if not mbit:
        return [remove]
    burst = max(int(mbit * 1e6 / 8 * 1e-3), 16384)
    limit = ["rate", f"{mbit:g}mbit", "burst", f"{burst}b", "latency", "100ms"]
    return [remove, ["tc", "qdisc", "add", "dev", interface, "root", "tbf", *limit]]


def limit(interface: str, mbit: float) -> None:
    remove, *add = shape(interface, mbit)
    subprocess.run(remove, capture_output=True)  # there may be none
    for command in add:
        subprocess.run(command, check=True, capture_output=True)


def throughput(addresses: list[str], me: int, number: int) -> float:
    """Mbit/s that come in while every host sends to the next one for a second, through TCP."""
    found = []

    def receive(server):
        connection, _ = server.accept()
        buffer, total, start, last = bytearray(CHUNK), 0, 0.0, 0.0
        with connection:
            while got := connection.recv_into(buffer):
                last = time.perf_counter()
                start, total = (start, total + got) if start else (last, 0)
        found.append(8 * total / max(last - start, 1e-9) / 1e6)

    with socket.create_server((addresses[me], PORT + number)) as server:
        thread = threading.Thread(target=receive, args=(server,))
        thread.start()
        meet(f"link-{number}")
        following = addresses[(me + 1) % len(addresses)]
        with socket.create_connection((following, PORT + number), timeout=60) as connection:
            data, until = bytes(CHUNK), time.perf_counter() + SECOND
            while time.perf_counter() < until:
                connection.sendall(data)
        thread.join()
    return found[0]


# ----------------------------------------------------------------------------------------- training


def meet(name: str) -> None:
    """Wait for all hosts."""
    multihost_utils.sync_global_devices(name)


def decide(value: float) -> float:
    """Process 0's value, in all processes."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


class Training:
    """Compiled once, run at every rate."""

    def __init__(self, task, method, spec, first):
        self.task, self.method, self.spec, self.first = task, method, spec, first
        self.params = task.params()
        state, batch = method.init(self.params), method.batch(0)
        self.step = method.step.lower(state, batch).compile()
        self.ledger = cost.ledger(self.step)

    def timed(self, state, start, stop, name):
        """Rounds `start` to `stop - 1`.

        Returns:
          The state, `(rounds, seconds)` from each meeting to the next, bytes that this host sent.
        """
        interface, clock, sent = self.spec["interface"], [], 0
        together = max(TOGETHER // self.task.config.steps, 1)
        for first in range(start, stop, together):
            numbers = range(first, min(first + together, stop))
            batches = jax.block_until_ready([self.method.batch(i) for i in numbers])
            meet(f"{name}-{first}-start")
            before, began = sent_bytes(interface), time.perf_counter()
            for batch in batches:
                state, _ = jax.block_until_ready(self.step(state, batch))
            meet(f"{name}-{first}-stop")  # what is still in the queue goes
            clock.append((len(numbers), time.perf_counter() - began))
            sent += sent_bytes(interface) - before
        return state, clock, sent

    def run(self, mbit: float, trained: bool) -> dict[str, Any]:
        """Train until the last target accuracy, or until the clock shows `cap` seconds.

        Where it is not trained, a number of rounds is timed, and the accuracy stays 0.
        """
        spec, config = self.spec, self.task.config
        steps = spec["report_steps"] if trained else spec["timed_steps"]
        each = max(steps // config.steps, 1)
        self.timed(self.method.init(self.params), 0, 2, f"{mbit}-warm")
        state = self.method.init(self.params)
        done, clock, accuracy, best, reports, times = 0, 0.0, 0.0, 0.0, [], []
        while True:
            state, found, sent = self.timed(state, done, done + each, f"{mbit}")
            done, clock = done + each, clock + sum(seconds for _, seconds in found)
            times += found
            if trained:
                params = self.method.whole(state, keep=self.first)
                accuracy = decide(self.task.accuracy(params) if self.first else 0.0)
                best = max(best, accuracy)
            reports.append({"round": done, "seconds": clock, "sent": sent, "accuracy": accuracy})
            ended = best >= max(spec["targets"]) and done >= LEAST_ROUNDS
            ended = ended or clock >= spec["cap"] or done + each > config.rounds
            if decide(ended or not trained):
                found = {"mbit": mbit, "trained": trained}
                return {**found, "reports": reports, "times": times}


def row_of(
    targets: tuple[float, ...], hosts: list[dict], cells: tuple[dict, ...]
) -> dict[str, Any]:
    """Columns of the CSV from what every host found at one rate.

    Times are those between moments at which all hosts meet; bytes are the mean of all.
    """
    reports, n = cells[0]["reports"], len(cells)
    sent = [[report["sent"] for report in cell["reports"]] for cell in cells]
    total = np.cumsum(np.sum(sent, 0))
    rounds, steps = reports[-1]["round"], hosts[0]["local_steps"]
    times = np.array([1e3 * seconds / n / steps for n, seconds in cells[0]["times"]])
    low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    row = {
        "hosts": n,
        "mbit": cells[0]["mbit"],
        "raw_mbit_low": min(cell["raw_mbit"] for cell in cells),
        "raw_mbit_high": max(cell["raw_mbit"] for cell in cells),
        "weights": hosts[0]["weights"],
        "local_steps": steps,
        "rounds": rounds,
        "step_ms": median,
        "step_ms_low": low,
        "step_ms_high": high,
        "step_ms_mean": 1e3 * reports[-1]["seconds"] / rounds / steps,
        "host_round_bytes": float(total[-1]) / n / rounds,
        "ledger_host_round_bytes": hosts[0]["ledger_bytes"] / n,
        "trained": int(cells[0]["trained"]),
        "seconds": reports[-1]["seconds"],
        "accuracy": reports[-1]["accuracy"] if cells[0]["trained"] else "",
    }
    for target in targets:
        at = f"{100 * target:.0f}"
        reached = cells[0]["trained"] and [r["accuracy"] >= target for r in reports]
        first = reached.index(True) if reached and any(reached) else None
        now = None if first is None else reports[first]
        row |= {
            f"rounds_{at}": "" if now is None else now["round"],
            f"seconds_{at}": "" if now is None else now["seconds"],
            f"megabytes_{at}": "" if first is None else float(total[first]) / 1e6,
        }
    return row


def main(argv: list[str] | None = None) -> None:
    """Join the other hosts, train at every rate, write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("spec", type=pathlib.Path, help="JSON: what to train, and how")
    parser.add_argument("--coordinator")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    args = parser.parse_args(argv)
    spec = json.loads(args.spec.read_text())
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    faulthandler.dump_traceback_later(MOST_SILENT, exit=True)
    cluster.initialize(args.coordinator, args.num_processes, args.process_id)
    me = args.process_id
    config = problem.Config(**spec["config"])
    task = problem.load(config, spec["data_dir"])
    method = methods.make(task, methods.workers_mesh(config.workers))
    training = Training(task, method, spec, me == 0)
    result = {
        "ledger_bytes": training.ledger.bytes,
        "local_steps": config.steps,
        "batch_size": config.batch_size,
        "weights": sum(x.size for x in jax.tree.leaves(training.params)),
        "cells": [],
    }
    for number, (mbit, trained) in enumerate(zip(spec["mbit"], spec["trained"])):
        faulthandler.dump_traceback_later(MOST_SILENT + spec["cap"], exit=True)
        limit(spec["interface"], mbit)
        raw = throughput(spec["addresses"], me, number)
        result["cells"].append({"raw_mbit": raw, **training.run(mbit, trained)})
        path = args.spec.parent / f"host{me}.json"
        path.write_text(json.dumps(result))
        meet(f"{mbit}-written")
        if me == 0:
            last = result["cells"][-1]["reports"][-1]
            sys.stdout.write(
                f"{mbit:g} Mbit/s: {last['round']} rounds, {last['seconds']:.1f} s, accuracy "
                f"{last['accuracy']:.4f}\n"
            )
