"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
from types import TracebackType

from tqdm.auto import tqdm

log = logging.getLogger("poa")


def say(line: str) -> None:
    """Print a line; the run continues if standard output is closed."""
    try:
        print(line, flush=True)
    except OSError as error:
        log.warning("standard output: %s; no more output", error.strerror)
        discard_output()


def discard_output() -> None:
    """Let standard output lead nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


class Progress:
    """Shows steps and the newest values, and what is left of `total` after `start` were done before; silent
    unless `shown`, as on all but the main process.
    """

    def __init__(self, total: int, start: int, shown: bool, unit: str = "step"):
        self.total, self.unit = total, unit
        self.shown = shown
        self.bar = None
        self.started, self.start = time.perf_counter(), start
        if shown and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self.bar = tqdm(total=total, initial=start, unit=unit, dynamic_ncols=True, leave=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()

    def step(self, count: int = 1) -> None:
        """One more step is done, or several."""
        if self.bar is not None:
            self.bar.update(count)

    def show(self, step: int, values: dict[str, str]) -> None:
        """Show the newest values after `step` steps."""
        text = "  ".join(f"{name} {value}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif self.shown:
            self.say(f"{self.unit} {step}/{self.total}  {text}  ETA {self._left(step)}")

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self.bar is not None:
            with self.bar.external_write_mode():
                say(line)
        elif self.shown:
            say(line)

    def _left(self, step: int) -> str:
        done = max(step - self.start, 1)
        seconds = (time.perf_counter() - self.started) / done * (self.total - step)
        return clock(seconds)


def clock(seconds: float) -> str:
    """`1:02:03`."""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02}:{int(seconds % 60):02}"
