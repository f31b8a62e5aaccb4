"""One run at a time in a folder: a file that names the process which holds it, and is touched as it lives."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from poa.errors import InputError, SaveError
from poa.files import make_folder, open_regular, write_text
from poa.progress import clock

BEAT_SECONDS = 5.0  # between heartbeats
WATCHED = 6  # beats after which a process of another machine that shows none is taken for dead
SETTLE_SECONDS = 0.5  # in which others that take over the same lock have written theirs

log = logging.getLogger("poa")
_HELD: set[str] = set()  # contents of the locks of this process


class RunLock:
    """Held by the main process of a run while it may write into the folder.

    A process of the same machine holds it as long as it lives; one of another machine, of which only its
    heartbeats (the time of the file) can be seen, until it has shown none for some time.
    """

    def __init__(self, folder: Path):
        self.path = folder / "lock"
        self.text = ""  # that we write into it
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock, and keep it alive; that of a dead process is taken over, with a warning. Raises
        InputError: another run has it."""
        make_folder(self.path.parent, "out")
        begun, machine = time.time(), _machine()
        me = {"host": socket.gethostname(), "pid": os.getpid(), "begun": begun}
        self.text = json.dumps(me | {"machine": machine, "started": _started(os.getpid())})
        _HELD.add(self.text)
        while not self._create():
            state = self._state()
            if state is None:
                continue  # released meanwhile
            holder = _parsed(state[1])
            if self._lives(holder, state):
                raise self._refusal(holder)
            log.warning("%s: taken over from %s, whose run has ended", self.path, _named(holder))
            write_text(self.path, self.text)
            time.sleep(SETTLE_SECONDS)
            state = self._state()
            if state is None or state[1] != self.text:
                raise self._refusal(_parsed(state[1] if state else ""))
            break
        threading.Thread(target=self._beat, daemon=True).start()

    def _create(self) -> bool:
        """Whether there was no lock, and there is ours now."""
        try:
            file = self.path.open("x")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(self.text)
        except OSError as error:
            self.path.unlink(missing_ok=True)
            raise SaveError(f"{self.path} was not written: {error.strerror}") from error
        return True

    def _state(self) -> tuple[int, str] | None:
        """Time and content of the lock, None where there is none; opened, as NFS shows news only then."""
        try:
            with open_regular(self.path) as file:
                return os.fstat(file.fileno()).st_mtime_ns, file.read(10_000).decode(errors="replace")
        except FileNotFoundError:
            return None

    def _lives(self, holder: dict[str, Any], state: tuple[int, str]) -> bool:
        if holder.get("machine") == _machine():
            return state[1] in _HELD if holder.get("pid") == os.getpid() else _lives(holder)
        beats = WATCHED if holder else 1  # a damaged one gets none: no process knows it for its own
        seconds = beats * BEAT_SECONDS
        log.warning("%s: held by %s; waiting %g s for its heartbeat", self.path, _named(holder), seconds)
        for _ in range(beats):
            time.sleep(BEAT_SECONDS)
            if self._state() != state:
                return True
        return False

    def _refusal(self, holder: dict[str, Any]) -> InputError:
        return InputError(
            f"out: expected a folder that no other run uses, got {self.path.parent}: {_named(holder)} is"
        )

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                state = self._state()
                if state and state[1] == self.text:
                    os.utime(self.path)
            except OSError as error:
                log.warning("%s: no heartbeat: %s", self.path, error.strerror)

    def require(self) -> None:
        """Raise SaveError where the lock was lost, as to a run that took this one, long asleep, for dead."""
        state = self._state()
        if state is None and self._create():
            log.warning("%s: was removed, and made again", self.path)
        elif state is None or state[1] != self.text:
            holder = _parsed(state[1] if state else "")
            raise SaveError(
                f"{self.path}: expected that of this run, got {_named(holder)}; nothing more is written"
            )

    def release(self) -> None:
        self._released.set()
        _HELD.discard(self.text)
        with suppress(OSError):
            state = self._state()
            if state and state[1] == self.text:
                self.path.unlink(missing_ok=True)


def _parsed(text: str) -> dict[str, Any]:
    """The process that a lock names; nothing for a damaged one."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _named(holder: dict[str, Any]) -> str:
    begun = holder.get("begun")
    since = f", begun {clock(max(time.time() - begun, 0))} ago" if isinstance(begun, int | float) else ""
    return f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{since}"


def _machine() -> str:
    """Where a process number means the same: a machine since it started, and a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(pid: int) -> str:
    """What tells a living process from others that have had its number; empty where that cannot be seen."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "XZ" else fields[19]


def _lives(holder: dict[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's
    return _started(pid) in ("", holder.get("started"))
