"""The processes of one training: how they find one another, agree, and miss one that is gone.

JAX's coordination service, which process 0 runs, does the work: its key-value store and its
barriers. A collective that waits for a dead host cannot be interrupted from within, so a thread
watches, says which process is missing, and ends this one.
"""

import collections
import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

MISSING = 75
"""Exit code of a process that ends because another one is missing (EX_TEMPFAIL: try again)."""
DOING = ("start", "batch", "step", "report", "save", "end")
"""What a process does in a round, in this order."""


class ClusterError(OSError):
    """The processes cannot find one another, or do not train the same."""


def process_id() -> int:
    """Number of this process; 0 where there is only one. Starts no backend."""
    return distributed.global_state.process_id


def num_processes() -> int:
    """How many there are; starts no backend."""
    return distributed.global_state.num_processes


def coordinator() -> str:
    """Where process 0 listens, `host:port`."""
    return distributed.global_state.coordinator_address or "nowhere"


# -------------------------------------------------------------------------------------------- start


def initialize(
    address: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    cluster: str | None = None,
    timeout: float = 60,
    heartbeat: float = 100,
) -> None:
    """Join the other processes; nothing to do where none is meant.

    Args:
      address: `host:port` of process 0, the same in every process.
      processes: how many.
      process: which one this is, from 0.
      cluster: instead of the three: `auto`, or the name of one of JAX's detection methods (`slurm`,
        `ompi`, `k8s`, `mpi4py`).
      timeout: seconds within which all must have come.
      heartbeat: seconds after which JAX itself takes a silent process for dead and ends the others.
        Longer than the deadline of `Watch`, whose message says more.

    Raises:
      ValueError: arguments that do not go together.
      ClusterError: the port is in use, nobody listens there, or somebody did not come.
    """
    if cluster is None and address is None:
        if processes not in (None, 1) or process not in (None, 0):
            msg = (
                f"--num-processes {processes} --process-id {process}: write --coordinator "
                "host:port too, the address of process 0."
            )
            raise ValueError(msg)
        return
    if cluster is None and (processes is None or process is None or address is None):
        msg = f"--coordinator {address}: write --num-processes and --process-id too."
        raise ValueError(msg)
    if cluster is None:
        host, port = _host_and_port(address)
        if not 0 <= (process or 0) < (processes or 1):
            msg = f"--process-id {process}: write 0 to {(processes or 1) - 1}, one a process."
            raise ValueError(msg)
        if process == 0:
            _check_free(host, port)
        else:
            _await_coordinator(host, port, timeout)
    # SIGTERM belongs to the training: without this JAX takes it for its own and goes on.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(timeout, _nobody_came, (address or "the coordinator", timeout, process))
    late.daemon = True  # JAX itself would end the process without a word of use
    late.start()
    try:
        jax.distributed.initialize(
            address,
            processes,
            process,
            cluster_detection_method=_method(cluster),
            initialization_timeout=int(timeout) + 30,
            heartbeat_timeout_seconds=int(heartbeat),
            shutdown_timeout_seconds=int(timeout),
        )
    except ValueError as error:
        msg = (
            f"--cluster {cluster}: JAX finds no such cluster here ({error}); write --coordinator "
            "host:port --num-processes N --process-id i."
        )
        raise ClusterError(msg) from error
    finally:
        late.cancel()


def _method(cluster):
    return "deactivate" if cluster is None else None if cluster == "auto" else cluster


def _host_and_port(address):
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit():
        msg = f"--coordinator {address}: write host:port, such as 10.0.0.1:1234."
        raise ValueError(msg)
    return host.strip("[]"), int(port)


def _check_free(host, port):
    """Whether process 0 can listen; gRPC itself would share the port with another coordinator."""
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            msg = (
                f"process 0 cannot listen on port {port} of {host}: {error.strerror}. Another "
                "process has it, perhaps one of a run that has not ended; end it, or write another "
                "port in --coordinator of every process."
            )
            raise ClusterError(msg) from error


def _await_coordinator(host, port, timeout):
    until, error = time.monotonic() + timeout, None
    while time.monotonic() < until:
        try:
            socket.create_connection((host, port), timeout=min(timeout, 5)).close()
            return
        except OSError as failure:
            error = failure
            time.sleep(0.1)
    msg = (
        f"nobody listens at {host}:{port} ({error}), for {timeout:.0f} s: is process 0 running "
        "there, and may this host reach it? --coordinator must be process 0's address."
    )
    raise ClusterError(msg)


def _nobody_came(address, timeout, process):
    sys.stderr.write(
        f"\nerror: process {process}: not all processes came to {address} within {timeout:.0f} s. "
        "Start each of them, with the same --coordinator and --num-processes and its own "
        "--process-id; does something else listen there?\n"
    )
    sys.stderr.flush()
    os._exit(MISSING)


# -------------------------------------------------------------------------------------------- agree


def agree(what: dict[str, Any], timeout: float = 60, name: str = "start") -> None:
    """See that all processes have the same of everything, before anything is trained.

    Args:
      what: what must be equal, as JSON can hold it; of nested dicts every item by itself. Long
        values travel as their sha256.
      timeout: seconds within which all must have said what they have.
      name: of this comparison; any name once.

    Raises:
      ClusterError: says which process differs in which item; in every process.
    """
    client = distributed.global_state.client
    if client is None:
        return
    own = _flat(what)
    client.key_value_set(f"psjax/agree/{name}/{process_id()}", json.dumps(own))
    everyone = []
    for i in range(num_processes()):
        try:
            text = client.blocking_key_value_get(
                f"psjax/agree/{name}/{i}", max(int(timeout * 1000), 1)
            )
        except jax.errors.JaxRuntimeError as error:
            msg = f"process {i} did not say within {timeout:.0f} s what it trains: {error}"
            raise ClusterError(msg) from error
        everyone.append(json.loads(text))
    lines = []
    for item in sorted({item for one in everyone for item in one}):
        values = [one.get(item, "nothing") for one in everyone]
        counts = collections.Counter(values)
        usual = max(counts, key=lambda v: (counts[v], v == values[0]))
        lines += [
            f"process {i} has {item} {value}, the others {usual}"
            for i, value in enumerate(values)
            if value != usual
        ]
    if lines:
        msg = f"the processes do not train the same: {'; '.join(lines)}."
        raise ClusterError(msg)


def _flat(what, prefix=""):
    flat = {}
    for key, value in what.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            text = json.dumps(value, sort_keys=True)
            short = hashlib.sha256(text.encode()).hexdigest()[:16]
            flat[prefix + key] = text if len(text) <= 80 else f"sha256:{short}"
    return flat


def barrier(name: str, timeout: float) -> None:
    """Wait for all processes, any name once."""
    if distributed.global_state.client is not None:
        distributed.global_state.client.wait_at_barrier(name, int(timeout * 1000))


def everybody(name: str, yes: bool, timeout: float = 300) -> bool:
    """Whether all processes say yes, any name once."""
    client = distributed.global_state.client
    if client is None:
        return yes
    client.key_value_set(f"psjax/everybody/{name}/{process_id()}", str(int(yes)))
    keys = [f"psjax/everybody/{name}/{i}" for i in range(num_processes())]
    said = [client.blocking_key_value_get(key, int(timeout * 1000)) for key in keys]
    return all(word == "1" for word in said)


# -------------------------------------------------------------------------------------------- watch


class Watch:
    """Ends this process where the training cannot go on, with the name of who is missing.

    Every process says now and then where it is (`at`), in the coordinator's store. A thread reads
    what the others say. If this process stays in one place for longer than the deadline, somebody
    is missing: silent, or behind, or the coordinator out of reach. A process that fails by itself
    says so too, and the others end with its reason. With one process nothing happens.

    As a context: an error inside ends this process, with exit code 1 if it is its own and `MISSING`
    if another process is the cause; all other processes end too.

    Args:
      deadline: seconds within which every part of a round must end.
      start: the same for the start, which loads data and compiles.
    """

    def __init__(self, deadline: float = 60, start: float = 300):
        self.deadline, self.start_deadline = deadline, start
        self.me, self.processes = process_id(), num_processes()
        self.client: Any = distributed.global_state.client
        self.poll = min(1.0, deadline / 10)
        self.place, self.since = (0, 0), time.monotonic()
        self.seen: dict[int, tuple[Any, float]] = {}  # of each process: what it said, since when
        self.note: dict[str, Any] | None = None
        self.errors: dict[int, str] = {}
        self.heard = time.monotonic()  # the coordinator, last
        self.stopped, self.ending = threading.Event(), threading.Lock()

    def at(self, round: int, doing: str) -> None:
        """Say that one of `DOING` in a round begins here."""
        self.place, self.since = (round, DOING.index(doing)), time.monotonic()

    def __enter__(self):
        if self.client is not None:
            self._last_words()
            for run in (self._talk, self._look):
                threading.Thread(target=run, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace):
        if self.client is None:
            return False
        if error is None:
            self.at(self.place[0], "end")
            barrier("psjax/end", self.deadline)
            self.stopped.set()
            self._end_well()
            jax.distributed.shutdown()
            return False
        if isinstance(error, KeyboardInterrupt):
            self._end(self.me, f"was interrupted ({error})", 1)
        if isinstance(error, ClusterError):
            self._end(self.me, f"cannot begin: {error}".rstrip("."), 1)
        self._find_out(error)
        return False

    # ------------------------------------------------------------------------------------- threads

    def _talk(self):
        """Say where this process is, hear where the others are. May hang, with the network."""
        beat, client = 0, self.client
        while not self.stopped.is_set():
            beat += 1
            mine = json.dumps([*self.place, beat])
            try:
                client.key_value_set(f"psjax/live/{self.me}", mine, allow_overwrite=True)
                found = client.key_value_dir_get("psjax/live/")
            except Exception:  # out of reach: `heard` says since when
                self.stopped.wait(self.poll)
                continue
            self.heard = now = time.monotonic()
            for key, value in found:
                last = key.rsplit("/", 1)[-1]
                if "note" in key:
                    self.note = self.note or json.loads(value)
                elif "error" in key:
                    self.errors[int(last)] = value
                elif self.seen.get(int(last), (None,))[0] != value:
                    self.seen[int(last)] = (value, now)
            self.stopped.wait(self.poll)

    def _look(self):
        while not self.stopped.wait(min(0.1, self.poll / 2)):
            note = self.note
            if note is not None and note["by"] != self.me:
                self._end(note["process"], note["why"], MISSING)
            limit = self.start_deadline if self.place[1] == 0 else self.deadline
            found = self._silent(self.deadline)  # whatever this process does meanwhile
            if found is None and time.monotonic() - self.since > limit:
                found = self._missing() or (self.me, self._stuck())
            if found is not None:
                self._end(*found, MISSING if found[0] != self.me else 1)

    # ----------------------------------------------------------------------------------- who it is

    def _silent(self, seconds):
        """Who has not been heard of for so long, and since when; or None."""
        now = time.monotonic()
        if now - self.heard > seconds:
            who = 0 if self.me else self.me
            return who, (
                f"at {coordinator()}, the coordinator, has not answered process {self.me} for "
                f"{now - self.heard:.0f} s: it is gone or stopped, or the network is cut"
            )
        for i in sorted(set(self.seen) - {self.me}):
            value, when = self.seen[i]
            if now - when > seconds:
                return i, (
                    f"has not been heard of for {now - when:.0f} s, last seen in "
                    f"{_place(json.loads(value))}: it is gone or stopped, or the network is cut"
                )
        return None

    def _missing(self):
        """Who keeps this process waiting, and how it shows; or None."""
        silent = self._silent(4 * self.poll)
        if silent is not None:
            return silent
        for i in sorted(set(self.errors) - {self.me}):
            return i, self.errors[i]
        never = sorted(set(range(self.processes)) - set(self.seen) - {self.me})
        if never:
            return never[0], "has never been heard of"
        places = {i: tuple(json.loads(self.seen[i][0])[:2]) for i in self.seen if i != self.me}
        who = min(places, key=lambda i: places[i], default=self.me)
        if places and places[who] < self.place:
            return who, (
                f"is late: it is still in {_place(places[who])}, and process {self.me} has waited "
                f"for {time.monotonic() - self.since:.0f} s in {_place(self.place)}"
            )
        return None

    def _stuck(self):
        return (
            f"has been in {_place(self.place)} for {time.monotonic() - self.since:.0f} s, more "
            "than --deadline; nobody else is behind it"
        )

    def _find_out(self, error):
        """After an error: wait until it shows whether somebody else is its cause."""
        why = f"failed in {_place(self.place)}: {error}".rstrip(".")
        self._tell("error", why)
        until = time.monotonic() + 6 * self.poll + 1
        while time.monotonic() < until:
            note = self.note
            if note is not None and note["by"] != self.me:
                self._end(note["process"], note["why"], MISSING)
            silent = self._silent(4 * self.poll)
            if silent is not None:
                self._end(*silent, MISSING)
            time.sleep(self.poll / 4)
        self._end(self.me, why, 1)

    # ------------------------------------------------------------------------------------- the end

    def _end(self, who, why, code):
        """Say it, tell the others, and be gone; destructors would wait for the dead."""
        if not self.ending.acquire(blocking=False):
            time.sleep(3600)  # another thread is ending this process
        said = {"by": self.me, "process": who, "why": why}
        self._tell("note", json.dumps(said))
        about = f"process {who} {why}" if who != self.me else f"it {why}"
        note = self.note
        if note is not None and note["by"] != who:
            about += f" (process {note['by']} says so)"
        sys.stderr.write(f"\nerror: process {self.me}: {about}.\n")
        sys.stderr.write("Continue with --resume and the run folder.\n")
        sys.stderr.flush()
        sys.stdout.flush()
        if self.me == 0:  # the others read this process's store
            time.sleep(3 * self.poll)
        self._end_well()
        os._exit(code)

    def _tell(self, what, text):
        """To all others; given up after 2 seconds, for the network may be gone."""

        def tell():
            with contextlib.suppress(Exception):
                key = f"psjax/live/{what}/{self.me}"
                self.client.key_value_set(key, text, allow_overwrite=True)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(timeout=2)

    def _last_words(self):
        """A shell that speaks if this process ends without a word, as JAX ends it in C++."""
        words = (
            f"\nerror: process {self.me} was ended without a word of its own: either it was "
            f"killed, or (JAX says above that the leader task died) process 0 at {coordinator()}, "
            "the coordinator, is gone.\nContinue with --resume and the run folder."
        )
        if self.me == 0:
            words = "\nerror: process 0, the coordinator, was killed; all others end with it."
        self.shell = subprocess.Popen(
            ["sh", "-c", 'trap "" INT TERM; read -r _ || printf "%s\\n" "$0" >&2', words],
            stdin=subprocess.PIPE,
        )

    def _end_well(self):
        try:
            self.shell.communicate(b"well\n", timeout=2)
        except (OSError, subprocess.TimeoutExpired, ValueError):
            return


def _place(place):
    round, doing = place[:2]
    return f"{DOING[doing]!r} of round {round}"
