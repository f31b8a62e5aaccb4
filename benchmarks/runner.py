"""Cases in processes of their own, within minutes: whatever happens to one, the others are measured.

A case that raises or runs out of memory is listed with its reason, and its process continues. A case whose
process dies, hangs past its share or loses the device is listed too, and a new process takes the next one;
where a provider of the case is to blame, it is measured again without that one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from benchmarks.failures import (
    DeviceLost,
    Event,
    Refused,
    Settled,
    Trying,
    free_memory,
    is_device_lost,
    reason_of,
)
from benchmarks.journal import Journal

STARTING = 120.0  # seconds at most until a process has imported what it needs
PATIENCE = 5.0  # seconds that one may take to end
POLL = 0.5  # seconds at most until a changed deadline is seen
PROCESSES = multiprocessing.get_context("spawn")  # fresh ones, as CUDA needs them
Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Case:
    """What is measured at a time.

    Attributes:
        name: within its part.
        run: of a function that takes events and the names of providers to leave out; it can be pickled.
        seconds: until it counts as hung, and each of the providers that it says it tries.
    """

    name: str
    run: Callable[[Emit, frozenset[str]], None]
    seconds: float


@dataclass(frozen=True)
class Part:
    """Cases that share a process.

    Attributes:
        name: of the part.
        cases: in order of worth.
        processes: at a time.
        fresh: every case gets a process of its own.
        share: of all the time.
    """

    name: str
    cases: Sequence[Case]
    processes: int = 1
    fresh: bool = False
    share: float = 1.0


class End(NamedTuple):
    """How a case ended: why it failed, or nothing; the provider to blame, where one is; whether its process
    is `lost`, of no further use."""

    reason: str = ""
    provider: str = ""
    lost: bool = False


class Worker:
    """A process that runs cases one after the other."""

    def __init__(self) -> None:
        self.connection, theirs = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=work, args=(theirs,))
        self.process.start()
        theirs.close()

    def stop(self, patience: float = 0.0) -> None:
        """End it and all that it started, after so many seconds in which it may clean up."""
        if patience:
            with contextlib.suppress(OSError):
                self.connection.send(None)
            self.process.join(patience)
        try:
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # it has not come to make a group of its own
            self.process.kill()
        self.process.join(PATIENCE)
        self.connection.close()

    def obituary(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'status {code}'}"


def work(connection: Connection) -> None:
    """Run cases as they are sent, in a process of its own; what it prints goes to the file named."""
    os.setsid()
    while message := connection.recv():
        case, without, log = message
        with log.open("ab") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        print(f"== {case.name}", flush=True)
        connection.send(Trying(""))
        try:
            case.run(connection.send, without)
            end = End()
        except DeviceLost as error:
            end = End(error.reason, error.provider, lost=True)
        except Exception as error:
            traceback.print_exc()
            end = End(reason_of(error), lost=is_device_lost())
        connection.send(end)
        if not end.lost:
            free_memory()


class Runner:
    """Runs parts until they or the seconds end; the journal gets rows, and how cases end."""

    def __init__(self, journal: Journal, seconds: float):
        self.journal, self.seconds, self.deadline = journal, seconds, time.monotonic() + seconds
        self._spare: Worker | None = None
        self._lock = threading.Lock()

    def run(self, parts: Sequence[Part]) -> None:
        try:
            for part in parts:
                waiting = deque(self.left(part))
                with ThreadPoolExecutor(part.processes) as pool:
                    serving = [pool.submit(self._serve, part, waiting) for _ in range(part.processes)]
                    try:
                        for server in serving:
                            server.result()
                    except BaseException:
                        self.deadline = 0.0
                        raise
        finally:
            if self._spare:
                self._spare.stop()

    def left(self, part: Part) -> list[Case]:
        """Cases that have not ended."""
        finished = self.journal.finished()
        return [case for case in part.cases if (part.name, case.name) not in finished]

    def _serve(self, part: Part, waiting: deque[Case]) -> None:
        """Take cases, and start a process if the last one died."""
        worker, end = None, time.monotonic() + part.share * self.seconds
        try:
            while waiting and self._left(end) > 0:
                case = waiting.popleft()
                worker = self._case(part, case, worker or self._worker(), end)
                if worker and part.fresh:
                    worker.stop(PATIENCE)
                    worker = None
        finally:
            if worker:
                worker.stop(min(max(self._left(end), 0.0), PATIENCE))

    def _left(self, end: float) -> float:
        """Seconds until the end of a part, or of all."""
        return min(end, self.deadline) - time.monotonic()

    def _worker(self) -> Worker:
        """One that has begun before it is needed: to import PyTorch takes seconds."""
        with self._lock:
            worker, self._spare = self._spare or Worker(), Worker()
        return worker

    def _case(self, part: Part, case: Case, worker: Worker, end: float) -> Worker | None:
        """Run a case, again without a provider that was lost; returns the worker if it can continue."""
        key, started = (part.name, case.name), time.monotonic()
        while True:
            without = frozenset(self.journal.aside(key))
            outcome = self._listen(key, case, worker, without, end)
            if outcome is None or outcome.lost:
                worker.stop()
            if outcome is None:
                return None
            if not outcome.lost or outcome.provider in {"", *without}:
                break
            self.journal.refuse(key, outcome.provider, outcome.reason, lost=True)
            worker = self._worker()
        seconds = time.monotonic() - started
        self.journal.end(key, outcome.reason, seconds)
        print(f"{part.name}: {case.name}: {outcome.reason or 'done'}, {seconds:.0f} s", flush=True)
        return None if outcome.lost else worker

    def _listen(
        self, key: tuple[str, str], case: Case, worker: Worker, without: frozenset[str], end: float
    ) -> End | None:
        """Write what a case yields; returns its end, or None where the time of its part ends first."""
        trying, share, last = None, STARTING, time.monotonic() + STARTING
        pipe, sentinel = worker.connection, worker.process.sentinel
        try:
            pipe.send((case, without, self.journal.folder / f"{key[0]}.log"))
            while True:
                left = min(last - time.monotonic(), self._left(end))
                ready = wait([pipe, sentinel], max(min(left, POLL), 0))
                if not ready and left > 0:
                    continue
                if pipe not in ready:
                    break
                event = pipe.recv()
                if isinstance(event, End):
                    return event
                if isinstance(event, Trying):
                    trying, share = event.provider, case.seconds
                    last = time.monotonic() + share
                else:
                    self._write(key, event)
        except (EOFError, OSError):
            ready = [sentinel]
        if ready:
            return End(worker.obituary(), trying or "", lost=True)
        if self._left(end) <= 0:
            return None
        what = "no start" if trying is None else "no end"
        return End(f"{what} within {share:.0f} s", trying or "", lost=True)

    def _write(self, key: tuple[str, str], event: Event) -> None:
        if isinstance(event, Refused):
            self.journal.refuse(key, *event, lost=False)
        elif isinstance(event, Settled):
            self.journal.settle(key, event.provider)
        elif isinstance(event, dict):
            self.journal.row(event)
