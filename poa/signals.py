"""Being asked to stop: by Ctrl-C, or by a scheduler before it takes a machine away."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from poa.errors import Preempted

# Of users, schedulers (of some at a limit of processor time) and terminals that are closed.
STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
    if hasattr(signal, name)
)
INTERRUPTED = 130  # exit code of Ctrl-C
HINT = "poa: stopping after this step, with a checkpoint; Ctrl-C again leaves at once"
AGAIN = 1.0  # seconds after which another Ctrl-C is a second one: launchers pass the first on once more


class StopSignals:
    """While entered, the signals of `STOPPING` only set `received` to their name; what is ignored, as SIGHUP
    under nohup, stays so.

    A second Ctrl-C leaves at once, also where the main thread waits in a library and cannot handle signals.
    Signals belong to the main thread; elsewhere nothing is changed. A first Ctrl-C says what it does, if
    `said`.
    """

    def __init__(self, said: bool) -> None:
        self.received: str | None = None
        self.said = said
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._ours, theirs = socket.socketpair()
            theirs.setblocking(False)
            self._theirs, self._fd_before = theirs, signal.set_wakeup_fd(theirs.fileno())
            threading.Thread(target=self._watch, daemon=True).start()
            noted = [n for n in STOPPING if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in noted}
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            signal.set_wakeup_fd(self._fd_before)
            self._theirs.close()  # which ends the thread

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None and number == signal.SIGINT and self.said:
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{HINT}\n".encode())  # printing may have been interrupted
        self.received = self.received or signal.Signals(number).name

    def _watch(self) -> None:
        """Leave at a second Ctrl-C; the interpreter tells this thread of every signal as it comes."""
        first = None
        with self._ours as ours:
            while numbers := ours.recv(64):
                if signal.SIGINT not in numbers:
                    continue
                first, now = first or time.monotonic(), time.monotonic()
                if now - first > AGAIN:
                    os.write(2, b"poa: left at once, without saving\n")
                    os._exit(INTERRUPTED)


def preempted(run: Path, done: int, signal: str | None, command: str = "pretrain") -> Preempted:
    """The end of a run of a command that was stopped after `done` steps and saved."""
    return Preempted(
        f"step {done}: stopped by {signal or 'a signal to another rank'}, checkpoint saved; "
        f"resume with: poa {command} --resume {shlex.quote(str(run))}",
        interrupted=signal == "SIGINT",
    )
