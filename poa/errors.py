"""Errors that end a command with one line on standard error; see `poa.__main__` for the exit codes."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what was expected, what was got."""


class PeerError(RuntimeError):
    """Another rank failed, or does not respond; the message names it."""


class DivergenceError(ArithmeticError):
    """Losses or gradients are no numbers any more; the message says which, where and since when."""


class SaveError(OSError):
    """A checkpoint could not be written; the message says which is the newest."""


class Preempted(Exception):
    """A signal asked the run to stop: it was saved; the message says how it goes on.

    Attributes:
        interrupted: by Ctrl-C.
    """

    def __init__(self, message: str, interrupted: bool):
        super().__init__(message)
        self.interrupted = interrupted
