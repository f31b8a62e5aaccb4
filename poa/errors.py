"""Errors that end a command with one line on standard error; see `poa.__main__` for the exit codes."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what was expected, what was got."""


class PeerError(RuntimeError):
    """Another process of the run is dead or does not answer; the message names it."""


class DivergenceError(ArithmeticError):
    """Losses or gradients are no numbers any more; the message says which, where and since when."""


class SaveError(OSError):
    """A checkpoint could not be written; the message says which is the newest."""


class Preempted(Exception):
    """A signal asked the run to stop: it was saved, and can go on."""
