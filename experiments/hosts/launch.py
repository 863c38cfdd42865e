"""Start a training as several local processes, watch them, end them together, start again smaller.

    python -m experiments.hosts.launch --processes 4 -- --method ist --rounds 500
    python -m experiments.hosts.launch --processes 4 --elastic -- --method ist --out runs/mine

Everything after `--` goes to `experiments.hosts.train`; what a process writes appears with its
number before it. If one dies the launcher says which and how, gives the others --grace seconds to
say their own word, ends them, and exits with 1. With --elastic it starts the training again without
the lost processes, from the last checkpoint, at most --restarts times, unless one has failed in a
way that it would again; on the CPU the remaining processes take over the workers of the lost ones,
so that the same is trained. On hosts of their own a scheduler starts the processes: see slurm.sh.
"""

import argparse
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

MISSING = 75
"""Exit code of a process that ends because another one is missing (EX_TEMPFAIL: try again)."""
FAILED = 78
"""Exit code of a process that fails by itself and would again; above `MISSING`, for srun's is the
highest of all."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 1 when the training did not end well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--elastic", action="store_true", help="go on with fewer processes")
    parser.add_argument("--restarts", type=int, default=3, help="at most, with --elastic")
    parser.add_argument("--grace", type=float, default=20, help="seconds for the others to end")
    parser.add_argument("--coordinator", help="host:port; default: a free port of 127.0.0.1")
    parser.add_argument(
        "--prefix", default="", help='before each command, "ip netns exec host{i}" for instance'
    )
    parser.add_argument("--module", default="experiments.hosts.train", help="what to start")
    parser.add_argument("train", nargs=argparse.REMAINDER, help="-- arguments of the training")
    args = parser.parse_args(argv)
    if args.processes < 1:
        parser.error(f"--processes {args.processes}: write 1 or more.")
    train = args.train[1:] if args.train[:1] == ["--"] else args.train
    folder = _value(train, "--resume") or _value(train, "--out")
    if folder is None:
        folder = f"runs/hosts-{time.strftime('%Y%m%d-%H%M%S')}"
        train = [*train, "--out", folder]
    if args.elastic and not (_value(train, "--workers") or _value(train, "--resume")):
        train = [*train, "--workers", str(args.processes)]
    n, restarts = args.processes, 0
    while True:
        lost = run(n, ["-m", args.module, *train], args.grace, args.prefix, args.coordinator)
        if not lost:
            return 0
        left, begun = n - len(lost), pathlib.Path(folder, "config.json").is_file()
        again = restarts < args.restarts and left > 0 and FAILED not in lost.values()
        if not args.elastic or not again:
            _say("ended" + (f"; continue with: --resume {folder}" if begun else "."))
            return 1
        restarts += 1
        n = left
        if begun:
            train = _without(train, "--out", "--resume") + ["--resume", folder]
        _say(f"restart {restarts} of at most {args.restarts}, with {n} processes.")


def run(
    n: int, arguments: list[str], grace: float, prefix: str = "", coordinator: str | None = None
) -> dict[int, int | None]:
    """Start n Python processes with these arguments, and wait for them.

    Returns:
      Exit codes of those that were lost, by number, None of one that did not end; of one process,
      the least guilty, if none can be named. Empty when all ended well.
    """
    address = coordinator or f"127.0.0.1:{_free_port()}"
    processes, readers = [], []
    try:
        for i in range(n):
            place = ["--coordinator", address, "--num-processes", str(n), "--process-id", str(i)]
            command = [*prefix.format(i=i).split(), sys.executable, "-u", *arguments]
            command += place if n > 1 else []
            processes.append(
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
            readers.append(threading.Thread(target=_forward, args=(i, processes[i]), daemon=True))
            readers[i].start()
        lost = _watch(processes, grace)
    except KeyboardInterrupt:
        _stop(processes, signal.SIGTERM, grace)
        raise
    finally:
        _stop(processes, signal.SIGKILL, 10)
        for reader in readers:
            reader.join(timeout=2)
    return lost


def _watch(processes, grace):
    died, until, running = [], None, True
    while running and (until is None or time.monotonic() < until):
        running = any(p.poll() is None for p in processes)
        for i, p in enumerate(processes):
            if p.poll() not in (None, 0) and i not in died:
                _say(f"process {i} {how(p.returncode)}")
                died.append(i)
                until = until or time.monotonic() + grace
        time.sleep(0.05)
    hung = [i for i, p in enumerate(processes) if p.poll() is None]
    for i in hung:
        _say(f"process {i} did not end within {grace:.0f} s; it is killed.")
    # Who says that another one is missing, or whom JAX aborts because the coordinator is gone, is
    # no loss; nor, beside somebody that is, who only did not end in time.
    blameless = (MISSING, -signal.SIGABRT)
    lost = [i for i in died if processes[i].returncode not in blameless] or hung or died[-1:]
    return {i: processes[i].poll() for i in lost}


def how(code: int) -> str:
    """How a process ended, in words."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}."
    if code == MISSING:
        return f"ended with {code}: another process is missing."
    if code == FAILED:
        return f"failed by itself, with exit code {code}."
    return f"failed with exit code {code}."


def _stop(processes, how_, seconds):
    for p in processes:
        if p.poll() is None:
            p.send_signal(how_)
    until = time.monotonic() + seconds
    for p in processes:
        try:
            p.wait(timeout=max(until - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            p.kill()


def _forward(i, process):
    with process.stdout:
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip("\n").rsplit("\r", 1)[-1]
            if text.strip():
                sys.stdout.write(f"[{i}] {text}\n")
                sys.stdout.flush()


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _value(arguments, name):
    for a, b in zip(arguments, [*arguments[1:], None]):
        if a == name:
            return b
        if a.startswith(name + "="):
            return a.split("=", 1)[1]
    return None


def _without(arguments, *names):
    kept, skip = [], False
    for a in arguments:
        if not skip and a not in names and not a.startswith(tuple(n + "=" for n in names)):
            kept.append(a)
        skip = not skip and a in names
    return kept


def _say(line):
    sys.stdout.write(f"launch: {line}\n")
    sys.stdout.flush()


def _interrupt(signum, _):
    raise KeyboardInterrupt(signal.Signals(signum).name)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
