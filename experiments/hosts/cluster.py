"""The processes of one training: how they find one another and agree.

JAX's coordination service, which process 0 runs, does the work: its key-value store and its
barriers.
"""

import collections
import contextlib
import errno
import hashlib
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

from experiments.hosts.launch import MISSING

_BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX's own variable


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

    Process 0 listens at `address` alone, at 127.0.0.1 for processes of one host. JAX checks nobody
    who speaks to it: only the hosts of the training may reach an address that is not loopback.
    `JAX_COORDINATOR_BIND_ADDRESS` names another address to listen at. With `cluster`, which finds
    the address, JAX listens at all of them unless that variable is set.

    Args:
      address: `host:port` of process 0, the same in every process.
      processes: how many.
      process: which one this is, from 0.
      cluster: instead of the three: `auto`, or the name of one of JAX's detection methods (`slurm`,
        `ompi`, `k8s`, `mpi4py`).
      timeout: seconds within which all must have come.
      heartbeat: seconds after which JAX itself takes a silent process for dead and ends the others.
        Longer than the deadline of `experiments.hosts.watch.Watch`, whose message says more.

    Raises:
      ValueError: arguments that do not go together.
      ClusterError: process 0 cannot listen at the address, nobody listens there, or somebody did
        not come.
    """
    if cluster is None and address is None:
        if processes not in (None, 1) or process not in (None, 0):
            msg = (
                f"--num-processes {processes} --process-id {process}: write --coordinator "
                "host:port too, the address of process 0."
            )
            raise ValueError(msg)
        return
    if cluster is None:
        if processes is None or process is None:
            msg = f"--coordinator {address}: write --num-processes and --process-id too."
            raise ValueError(msg)
        if processes < 1:
            msg = f"--num-processes {processes}: write 1 or more."
            raise ValueError(msg)
        if not 0 <= process < processes:
            msg = f"--process-id {process}: write 0 to {processes - 1}, one a process."
            raise ValueError(msg)
        host, port = _host_and_port(address)
        bind = os.environ.get(_BIND) or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        if process == 0:
            _check_free(*_host_and_port(bind, _BIND if _BIND in os.environ else "--coordinator"))
        else:
            _await_coordinator(host, port, timeout)
    else:
        bind = None
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
            coordinator_bind_address=bind,
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


def _host_and_port(address, option="--coordinator"):
    host, _, port = str(address).rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        msg = f"{option} {address}: write host:port, such as 10.0.0.1:1234 (1 to 65535)."
        raise ValueError(msg)
    return host.strip("[]"), int(port)


def _check_free(host, port):
    """Whether process 0 can listen; gRPC itself would share the port with another coordinator."""
    free, failure = False, OSError("it has no address")
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        places, failure = [], error
    for family, kind, protocol, _, place in places:
        try:  # a name may be of addresses some of which this host does not have, as ::1
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
                probe.listen()
            free = True
        except OSError as error:
            failure = error
            if error.errno == errno.EADDRINUSE:
                free = False
                break
    if free:
        return
    reason = failure.strerror or failure
    cure = (
        f"If {host} is process 0's address for other hosts, but not one of this host's own, set "
        f"{_BIND}=host:port to one that is."
    )
    if failure.errno == errno.EADDRINUSE:
        cure = (
            "Another process has it, perhaps one of a run that has not ended; end it, or write "
            "another port in --coordinator of every process."
        )
    msg = f"process 0 cannot listen on port {port} of {host}: {reason}. {cure}"
    raise ClusterError(msg) from failure


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
    who = "this process" if process is None else f"process {process}"
    say(
        f"\nerror: {who}: not all processes came to {address} within {timeout:.0f} s. Start each, "
        "with the same --coordinator and --num-processes and its own --process-id; does something "
        "else listen there?\n"
    )
    os._exit(MISSING)


def say(text: str) -> None:
    """To those who read the log, if it can be written: it may be closed, or on the full disk."""
    for stream, words in ((sys.stderr, text), (sys.stdout, "")):
        with contextlib.suppress(OSError, ValueError):
            stream.write(words)
            stream.flush()


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
        everyone.append(_said(i, text))
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


def _said(process, text):
    """What a process has said, as `_flat` gives it."""
    with contextlib.suppress(ValueError, RecursionError):
        said = json.loads(text)
        if isinstance(said, dict) and all(isinstance(x, str) for x in said.values()):
            return said
    msg = (
        f"in the store of {coordinator()} process {process} says {text[:60]!r}, as no process of "
        "this training does: something else writes there. Let only the training's hosts reach it."
    )
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
