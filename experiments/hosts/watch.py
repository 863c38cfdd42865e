"""Who is missing: a collective that waits for a dead host cannot be interrupted from within.

A thread watches, says which process it is, and ends this one.
"""

import contextlib
import json
import os
import subprocess
import threading
import time
import traceback
from typing import Any

import jax
from jax._src import distributed  # the key-value store has no public name

from experiments._lib.loop import NotFiniteError
from experiments.hosts import cluster
from experiments.hosts.launch import FAILED, MISSING

DOING = ("start", "batch", "step", "report", "save", "end")
"""What a process does in a round, in this order."""
_LIVE = "psjax/live/"
MENDABLE = (ValueError, OSError, ImportError, NotFiniteError)
"""Errors that say in a line what to do; of others the traceback is printed."""


class Watch:
    """Ends this process where the training cannot go on, with the name of who is missing.

    Every process says now and then where it is (`at`), in the coordinator's store. A thread reads
    what the others say. If this process stays in one place for longer than the deadline, somebody
    is missing: silent, or behind, or the coordinator out of reach. A process that fails by itself
    says so too, and the others end with its reason. With one process nothing happens.

    As a context: an error inside ends this process, with exit code `FAILED` if it is its own and
    `MISSING` if another process is the cause; all other processes end too. A process that is late,
    interrupted or was stopped ends with 1.

    Args:
      deadline: seconds within which every part of a round must end.
      start: the same for the start, which loads data and compiles.
    """

    def __init__(self, deadline: float = 60, start: float = 300):
        self.deadline, self.start_deadline = deadline, start
        self.me, self.processes = cluster.process_id(), cluster.num_processes()
        self.client: Any = distributed.global_state.client
        self.poll = min(1.0, deadline / 10)
        self.place, self.since = (0, 0), time.monotonic()
        self.seen: dict[int, tuple[Any, float]] = {}  # of each process: what it said, since when
        self.note: dict[str, Any] | None = None
        self.errors: dict[int, str] = {}
        self.odd: set[str] = set()  # keys that hold what no process of the training says
        self.failed, self.trace = "", ""  # how this process did, and where in the code
        self.heard = self.looked = time.monotonic()  # the coordinator, and this process, last
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
            try:  # longer than `_look` waits, which says who does not come
                cluster.barrier("psjax/end", self.deadline + 5 * self.poll)
            except Exception as failure:
                self._find_out(failure)
            self.stopped.set()
            self._end_well()
            jax.distributed.shutdown()
            return False
        if isinstance(error, KeyboardInterrupt):
            self._end(self.me, f"was interrupted ({error})", 1)
        if isinstance(error, cluster.ClusterError):
            self._end(self.me, f"cannot begin: {error}".rstrip("."), FAILED)
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
                client.key_value_set(f"{_LIVE}{self.me}", mine, allow_overwrite=True)
                found = client.key_value_dir_get_bytes(_LIVE)
            except Exception:  # out of reach: `heard` says since when
                self.stopped.wait(self.poll)
                continue
            self.heard = now = time.monotonic()
            for key, value in found:
                try:
                    self._hear(key.removeprefix(_LIVE), value.decode(), now)
                except (ValueError, TypeError, LookupError, RecursionError):
                    self._name_odd(key, value)
            self.stopped.wait(self.poll)

    def _hear(self, key, value, now):
        """What a process says, of itself or of another one; raises where no process says that."""
        what, _, number = key.rpartition("/")
        who = self._process(int(number))
        if what == "error":
            self.errors[who] = value
        elif what == "note":
            note = json.loads(value)
            by, of = self._process(note["by"]), self._process(note["process"])
            self.note = self.note or {"by": by, "process": of, "why": str(note["why"])}
        elif what:
            raise ValueError(what)
        elif self.seen.get(who, (None,))[0] != value:
            round, doing, beat = json.loads(value)
            if {type(round), type(doing), type(beat)} != {int} or not 0 <= doing < len(DOING):
                raise ValueError(value)
            self.seen[who] = (value, now)

    def _process(self, number):
        if number not in range(self.processes):
            raise ValueError(number)
        return number

    def _name_odd(self, key, value):
        """Say, once per key, that something else writes to the store."""
        if key in self.odd:
            return
        self.odd.add(key)
        cluster.say(
            f"\nwarning: process {self.me}: in the store of {cluster.coordinator()} {key[:60]!r} "
            f"is {value[:60]!r}, which no process of this training says; it is ignored. Something "
            "else writes there: let only the hosts of the training reach that address.\n"
        )

    def _look(self):
        while not self.stopped.wait(min(0.1, self.poll / 2)):
            asleep, note = self._asleep(), self.note
            if asleep > self.deadline:
                why = f"was itself stopped for {asleep:.0f} s, in {_place(self.place)}"
                self._end(self.me, why, 1)
            if note is not None and note["by"] != self.me:
                self._end(note["process"], note["why"])
            limit = self.start_deadline if self.place[1] == 0 else self.deadline
            found = self._silent(self.deadline)  # whatever this process does meanwhile
            if found is None and time.monotonic() - self.since > limit:
                found = self._missing() or (self.me, self._stuck())
            if found is not None:
                self._end(*found)
            self.looked = time.monotonic()

    # ----------------------------------------------------------------------------------- who it is

    def _asleep(self):
        """For how long this process itself has stood still: frozen, it hears of nobody."""
        return time.monotonic() - self.looked

    def _silent(self, seconds):
        """Who has not been heard of for so long, and since when; or None."""
        now = time.monotonic()
        if self._asleep() > self.deadline:  # `_look` will say so
            return None
        if now - self.heard > seconds:
            return 0, (
                f"at {cluster.coordinator()}, the coordinator, has not answered process {self.me} "
                f"for {now - self.heard:.0f} s: it is gone or stopped, or the network is cut"
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
        words = str(error)
        if not isinstance(error, MENDABLE):
            words = f"{type(error).__name__}: {error}"
            self.trace = "".join(traceback.format_exception(error))
        self.failed = f"failed in {_place(self.place)}: {words}".rstrip(".")
        self._tell("error", self.failed)
        until = time.monotonic() + 6 * self.poll + 1
        while time.monotonic() < until:  # while `_look` hears what others say
            silent = self._silent(4 * self.poll)
            if silent is not None:
                self._end(*silent)
            time.sleep(self.poll / 4)
        self._end(self.me, self.failed)

    # ------------------------------------------------------------------------------------- the end

    def _end(self, who, why, code=None):
        """Say it, tell the others, and be gone; destructors would wait for the dead."""
        if not self.ending.acquire(blocking=False):
            time.sleep(3600)  # another thread is ending this process
        if code is None:
            code = MISSING if who != self.me else FAILED if self.failed else 1
        try:
            if code == FAILED:
                why = self.failed or why
            self._tell("note", json.dumps({"by": self.me, "process": who, "why": why}))
            about = f"process {who} {why}" if who != self.me else f"it {why}"
            if self.note is not None and self.note["by"] not in (who, self.me):
                about += f" (process {self.note['by']} says so)"
            if self.failed and code == MISSING:
                about += f"; process {self.me} {self.failed}"
            go_on = "Continue with --resume and the run folder.\n" if self.place[1] else ""
            trace = self.trace if code == FAILED else ""
            cluster.say(f"{trace}\nerror: process {self.me}: {about}.\n{go_on}")
            if self.me == 0:  # the others read this process's store
                time.sleep(3 * self.poll)
            self._end_well()
        finally:
            os._exit(code)

    def _tell(self, what, text):
        """To all others; given up after 2 seconds, for the network may be gone."""

        def tell():
            with contextlib.suppress(Exception):
                key = f"{_LIVE}{what}/{self.me}"
                self.client.key_value_set(key, text, allow_overwrite=True)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(timeout=2)

    def _last_words(self):
        """A shell that speaks if this process ends without a word, as JAX ends it in C++."""
        words = (
            f"\nerror: process {self.me} was ended without a word of its own: either it was "
            f"killed, or (JAX says above that the leader task died) process 0 at "
            f"{cluster.coordinator()}, the coordinator, is gone.\n"
            "Continue with --resume and the run folder, if there is one."
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
