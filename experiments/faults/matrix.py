"""What happens when a process dies, stops, is slow, cannot write or cannot be reached: the matrix.

    python -m experiments.faults                      # all cells, about 20 minutes
    python -m experiments.faults --only kill stop     # some kinds

Each cell starts a training of two processes by `experiments.hosts.launch`, lets one process meet
one fault at one place, and measures how long it takes until all processes have ended, what they
say, and whether `--resume`, with nothing repaired, ends with the parameters of an uninterrupted
training, bit for bit. `cut` and `full-disk` need root (network namespaces, a small tmpfs);
elsewhere they say so. Rows are written as they come. The exit code is 1 if a cell is not as it
should be.
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np

from experiments._lib.config import check_choice
from experiments._lib.folder import results_folder
from experiments._lib.tables import markdown, paste, read_texts, write_rows
from experiments.faults.namespaces import Namespaces, unavailable

HERE = pathlib.Path(__file__).resolve().parent

KINDS = ("kill", "stop", "slow", "full", "cut")
ALL = (*KINDS, "full-disk", "elastic")
PLACES = ("compute", "collective", "saving")
DEADLINE, GRACE, SLACK = 6, 8, 6
STATED = DEADLINE + GRACE + SLACK
"""Seconds within which all processes of a cell must have ended: the training's --deadline, the
launcher's --grace, and for a slow machine as much again."""
RESTARTED = STATED + 60
"""And those that the launcher starts again: to the end of the training, compilation included."""
HANGS = 180
"""Seconds after which a launcher and all that it started are killed."""
COLUMNS = (
    "kind",
    "process",
    "place",
    "seconds",
    "stated",
    "exit_codes",
    "named",
    "resumed_after",
    "difference",
    "verdict",
    "message",
)
ROUNDS, SAVE = 24, 6
TRAIN = (
    f"--method ist --width 64 --rounds {ROUNDS} --report-every 12 --checkpoint-every {SAVE} "
    f"--deadline {DEADLINE}"
).split()


@dataclasses.dataclass
class Args:
    """Let processes of a training meet faults, and see how it ends and goes on."""

    only: tuple[str, ...] = ALL
    """Kinds of fault."""
    places: tuple[str, ...] = PLACES
    """Where the process is that meets it."""
    out: pathlib.Path | None = None
    """CSV to write. Default: runs/results/faults/faults.csv."""
    commit_results: bool = False
    """Write over experiments/faults/results/faults.csv, and the table into README.md there."""

    def __post_init__(self):
        for name, choices in (("only", ALL), ("places", PLACES)):
            for value in getattr(self, name):
                check_choice(name, value, choices)


def main(args: Args) -> None:
    """Measure the cells; exits with 1 if one is not as it should be."""
    path = args.out or results_folder(HERE / "results", args.commit_results) / "faults.csv"
    with tempfile.TemporaryDirectory() as name:
        scratch = pathlib.Path(name)
        expected = uninterrupted(scratch, 2)
        rows, bad = read_texts(path), 0
        for cell in cells(args.only, args.places):
            row = one(*cell, scratch, expected)
            row["message"] = row["message"].replace(str(scratch), "...")
            bad += row["verdict"] not in ("ok", "not run")
            cell_of = lambda r: [str(r[k]) for k in COLUMNS[:3]]
            rows = sorted([*(r for r in rows if cell_of(r) != cell_of(row)), row], key=_order)
            write_rows(path, rows, digits="")
            print(*(row[k] for k in COLUMNS), sep=" | ", flush=True)
    print(table(rows))
    if args.commit_results:
        paste(HERE / "README.md", "faults", table(rows))
    if bad:
        sys.exit(1)


def cells(kinds=KINDS, places=PLACES) -> list[tuple[str, int, str]]:
    """Kind, process and place of every cell."""
    found = [(k, p, place) for k in kinds if k in KINDS for p in (1, 0) for place in places]
    found += [("full-disk", 1, "saving")] if "full-disk" in kinds else []
    return found + ([("elastic", 1, "collective")] if "elastic" in kinds else [])


def uninterrupted(scratch: pathlib.Path, workers: int) -> dict[str, np.ndarray]:
    """The parameters of a training that nothing happens to."""
    folder = scratch / f"uninterrupted-{workers}"
    command = [sys.executable, "-m", "experiments.hosts.train", *TRAIN]
    command += ["--workers", str(workers), "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return dict(np.load(folder / "params.npz"))


def one(kind: str, process: int, place: str, scratch: pathlib.Path, expected) -> dict:
    """A cell: the fault, its end, the resumption. Returns a row of `COLUMNS`."""
    row = dict.fromkeys(COLUMNS, "") | {"kind": kind, "process": process, "place": place}
    row["stated"] = STATED
    if kind == "full-disk":
        return _full_disk(row, scratch, expected)
    if kind == "elastic":
        return _elastic(row, scratch, expected)
    reason = unavailable() if kind == "cut" else None
    if reason:
        return row | {"verdict": "not run", "message": reason}
    hosts = Namespaces(2) if kind == "cut" else contextlib.nullcontext()
    folder = scratch / f"{kind}-{process}-{place}"
    with hosts:
        launch: list[str] = []
        if isinstance(hosts, Namespaces):
            launch = ["--prefix", "ip netns exec psjax-{i}", "--coordinator", "10.77.0.1:9999"]
        when = 3 * SAVE - 1 if place == "saving" else 2 * SAVE + 2
        fault = {"PSJAX_FAULT": f"{kind}:{process}:{place}:{when}", "PSJAX_FAULT_INTERFACE": "eth0"}
        lines, began, ended, code = start(launch, ["--out", str(folder)], fault)
        if isinstance(hosts, Namespaces):
            hosts.up()
        row |= _judge(lines, began, ended, code, process)
        row |= _resumed(launch, folder, expected, row["verdict"])
    return row


def start(
    launch: list[str],
    train: list[str],
    env: dict[str, str],
    workers: int = 2,
    n: int = 2,
    sign: str = "fault: process",
):
    """A training by the launcher, killed if it hangs.

    Returns:
      Its lines, when the sign of the fault came first, when all had ended, and the exit code.
    """
    command = [sys.executable, "-u", "-m", "experiments.hosts.launch", "--processes", str(n)]
    command += ["--grace", str(GRACE), *launch, "--", *TRAIN, "--workers", str(workers), *train]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
        start_new_session=True,
    )
    end = lambda: os.killpg(process.pid, signal.SIGKILL)
    timer, lines, began = threading.Timer(HANGS, end), [], None
    with process:
        timer.start()
        try:
            for line in process.stdout or ():
                lines.append(line.rstrip())
                if sign in line and began is None:
                    began = time.monotonic()
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                end()
    return lines, began, time.monotonic(), code


def _judge(lines, began, ended, code, guilty):
    said = [m for line in lines if (m := re.match(r"\[(\d)\] error: (.*)", line))]
    others = [m[2] for m in said if int(m[1]) != guilty]
    own = [m[2] for m in said if int(m[1]) == guilty]
    launcher = [line for line in lines if line.startswith("launch: process")]
    words = [*others, *own, *launcher]
    named = [
        who
        for who, text in (("others", others), ("itself", own), ("launcher", launcher))
        if any(f"process {guilty}" in line for line in text)
    ]
    codes = [line.removeprefix("launch: process ").rstrip(".") for line in launcher]
    row = {
        "seconds": f"{ended - began:.1f}" if began else "",
        "exit_codes": "; ".join(_short(c) for c in codes),
        "named": " ".join(named),
        "message": words[0] if words else "",
    }
    in_time = began is not None and code == 1 and ended - began <= STATED
    verdict = "ok" if "others" in named else "NOT NAMED BY THE OTHERS"
    verdict = verdict if in_time else "NOT ENDED AS STATED"
    return row | {"verdict": "HANGS" if code == -signal.SIGKILL else verdict}


def _short(words):
    number, _, how = words.partition(" ")
    exit_code = re.search(r"SIG\w+|code \d+|with \d+|did not end", how)
    found = exit_code[0].split()[-1] if exit_code else how
    return f"{number}: {'SIGKILL by the launcher' if found == 'end' else found}"


def _resumed(launch, folder, expected, verdict):
    """The same training again, with --resume and no fault."""
    lines, _, _, code = start(launch, ["--resume", str(folder)], {})
    after = [m[1] for line in lines if (m := re.search(r"continuing after round (\d+)", line))]
    damaged = [line for line in lines if "trying the one before" in line]
    row = {"resumed_after": after[0] if after else "start"}
    if code or not (folder / "params.npz").exists():
        return row | {"verdict": "NOT RESUMED", "message": " ".join(lines[-3:])[:300]}
    row["difference"] = _difference(folder, expected)
    if damaged:
        return row | {"verdict": "DAMAGED", "message": damaged[0]}
    return row | {"verdict": verdict if row["difference"] == 0 else "OTHER PARAMETERS"}


def _difference(folder, expected):
    found = np.load(folder / "params.npz")
    return float(max(np.max(np.abs(found[k] - expected[k])) for k in expected))


def _full_disk(row, scratch, expected):
    """A file system that is too small for more than the first checkpoints, then made larger."""
    disk = scratch / "disk"
    disk.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        return row | {"verdict": "not run", "message": "a small tmpfs needs root"}
    try:
        out, sign = ["--out", str(disk / "run")], "error: process"
        lines, began, ended, code = start([], out, {}, sign=sign)
        said = [m[1] for line in lines if (m := re.match(r"\[\d\] error: (.*)", line))]
        named = any("No space left" in s or "could not be saved" in s for s in said)
        good = named and code == 1 and began is not None and ended - began <= STATED
        row |= {"process": "any", "named": "itself" if named else ""}
        row |= {"seconds": f"{ended - began:.1f}" if began else ""}
        row |= {"message": said[0] if said else "", "verdict": "ok" if good else "NOT AS STATED"}
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        return row | _resumed([], disk / "run", expected, row["verdict"])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _elastic(row, scratch, expected):
    """Three processes, of which one is killed: the launcher goes on with two, by itself."""
    folder, n = scratch / "elastic", 3
    expected = uninterrupted(scratch, 4)
    fault = {"PSJAX_FAULT": f"kill:1:collective:{2 * SAVE + 2}"}
    where = ["--out", str(folder)]
    lines, began, ended, code = start(["--elastic"], where, fault, workers=4, n=n)
    again = [line for line in lines if "launch: restart" in line]
    after = [m[1] for line in lines if (m := re.search(r"continuing after round (\d+)", line))]
    row |= {"seconds": f"{ended - began:.1f}" if began else "", "stated": RESTARTED}
    row |= {"message": " ".join(again), "resumed_after": after[0] if after else ""}
    if code or began is None or len(again) != 1 or ended - began > RESTARTED:
        return row | {"verdict": "HANGS" if code == -signal.SIGKILL else "NOT RESTARTED ONCE"}
    row["difference"] = _difference(folder, expected)
    return row | {"verdict": "ok" if row["difference"] == 0 else "OTHER PARAMETERS"}


def table(rows: list[dict]) -> str:
    """The rows in Markdown."""
    lines = []
    for row in rows:
        verdict = "" if row["verdict"] == "ok" else f"**{row['verdict']}** "
        line = {name: row[name] for name in ("kind", "process", "place")}
        line |= {"s": row["seconds"], "exit codes": row["exit_codes"]}
        line |= {"resumed after": row["resumed_after"], "difference": row["difference"]}
        line["message"] = verdict + str(row["message"])[:160].replace("|", "/")
        lines.append(line)
    return markdown(lines)


def _order(row):
    return ALL.index(row["kind"]), str(row["process"]) != "1", PLACES.index(row["place"])
