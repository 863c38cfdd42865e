"""How a script ends: Ctrl-C and SIGTERM that are never lost, a closed terminal, the exit code."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Interruption:
    """A handler of Ctrl-C and SIGTERM: it raises KeyboardInterrupt, and remembers that it did.

    Inside a callback of the garbage collector, of which JAX has one, or in a destructor the
    exception has no effect: Python says that it is ignored. It is then raised again a moment later.
    Where others swallow it, a loop that calls `check` in every epoch ends all the same.
    """

    def __init__(self):
        self.name: str | None = None

    def __call__(self, number: int, _frame: FrameType | None = None) -> None:
        self.name = self.name or signal.Signals(number).name
        raise KeyboardInterrupt(self.name)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self.name is not None:
            raise KeyboardInterrupt(self.name)

    def install(self) -> None:
        """Handle both signals, except one that is ignored, as in a shell's background job."""
        self.name = None
        for number in (signal.SIGTERM, signal.SIGINT):  # asyncio would replace Python's of SIGINT
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)
        signal.signal(signal.SIGALRM, self)
        usual = sys.unraisablehook

        def ignored(unraisable):
            if isinstance(unraisable.exc_value, KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.05)
            else:
                usual(unraisable)

        sys.unraisablehook = ignored


interruption = Interruption()
"""Of this process: signals are a process's own."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM take effect at the end; the second of them at once.

    An interrupted save of orbax may wait five minutes for itself, and asyncio, which it runs in,
    may swallow a Ctrl-C altogether.
    """
    if threading.current_thread() is not threading.main_thread():  # who is never interrupted
        yield
        return
    came = []

    def later(number, frame):
        came.append(number)
        if len(came) > 1:
            restore()
            signal.raise_signal(number)

    def restore():
        for number, handler in handlers.items():
            signal.signal(number, handler)

    known = {n: signal.getsignal(n) for n in SIGNALS}
    handlers = {n: handler for n, handler in known.items() if handler is not None}
    for number in handlers:
        signal.signal(number, later)
    try:
        yield
    finally:
        restore()
    if came:
        signal.raise_signal(came[0])
    interruption.check()


def leave(line: str, code: int = 1) -> None:
    """Say the line and end this process at once, with the code.

    XLA compiles in threads of its own, which a signal does not stop. Were the interpreter to end in
    the usual way it would destroy the devices that they still use, and most often crash.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)
    os._exit(code)


class Tolerant:
    """A text stream whose reader may go away: what cannot be written is dropped."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()


def with_stderr() -> None:
    """Let the script work on where its messages cannot be written, or stderr is closed.

    A closed descriptor 2 is opened on nothing, lest the next file has that number, and XLA writes
    its messages into it.
    """
    if sys.stderr is None:
        number = os.open(os.devnull, os.O_RDWR)
        while number < 2:
            number = os.dup(number)
        sys.stderr = open(number, "w")  # as long as the process
    if not isinstance(sys.stderr, Tolerant):
        sys.stderr = Tolerant(sys.stderr)
