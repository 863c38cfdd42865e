"""Faults on purpose, for `experiments.faults` and the tests: never set outside of them.

`PSJAX_FAULT=kind:process:place:round`, such as `kill:1:collective:3`, makes one process meet one
fault, once (a file `fault-met` in the run folder says that it has been, also to processes that
inherit the variable when the training is started again):

- kind: `kill` (SIGKILL), `stop` (SIGSTOP), `slow` (asleep for three deadlines; in a collective or
  while saving the whole process freezes for one and a half and wakes again, as a paused virtual
  machine does), `full` (no file may grow beyond what is there: RLIMIT_FSIZE), `cut` (the network
  interface named in `PSJAX_FAULT_INTERFACE` goes down).
- place: `compute` (before the collective, while the batch is made), `collective` (this process
  waits in it: the others come 2 seconds later), `saving` (when the checkpoint's folder is there).
"""

import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

from experiments.hosts import cluster

_LATE = 2.0  # seconds by which the others come later to a collective


def at(place: str, round: int, deadline: float, folder: pathlib.Path) -> None:
    """Meet the fault if it is here and now."""
    fault = os.environ.get("PSJAX_FAULT")
    if not fault:
        return
    kind, process, where, when = fault.split(":")
    if (place, round) != (where, int(when)):
        return
    met = folder / "fault-met"
    if met.exists():
        return
    mine = cluster.process_id() == int(process)
    if place == "collective" and not mine:
        time.sleep(_LATE)
    if not mine:
        return
    if place == "compute":
        if kind == "slow":
            _say(kind, met)
            time.sleep(3 * deadline)
        else:
            _meet(kind, deadline, met)
        return
    before = set(folder.glob("checkpoints/*"))

    def later():
        if place == "collective":
            time.sleep(_LATE / 2)
        while place == "saving" and set(folder.glob("checkpoints/*")) <= before:
            time.sleep(0.0005)
        _meet(kind, deadline, met)

    if place == "saving" and kind == "full":  # before there is anything to write
        _meet(kind, deadline, met)
        return
    threading.Thread(target=later, daemon=True).start()


def _say(kind, met):
    met.touch()
    sys.stderr.write(f"\nfault: process {cluster.process_id()} meets {kind!r}.\n")
    sys.stderr.flush()


def _meet(kind, deadline, met):
    _say(kind, met)
    me = str(os.getpid())
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "slow":
        wake = f"sleep {1.5 * deadline}; kill -CONT {me}"
        subprocess.Popen(["sh", "-c", wake], start_new_session=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "full":
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, most))
    elif kind == "cut":
        device = os.environ["PSJAX_FAULT_INTERFACE"]
        subprocess.run(["ip", "link", "set", "dev", device, "down"], check=True)
    else:
        msg = f"PSJAX_FAULT={os.environ['PSJAX_FAULT']}: no such kind."
        raise ValueError(msg)
