"""Errors that end a command with one line on standard error; see `poa.__main__` for the exit codes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one line: what was expected, what was got."""


class PeerError(RuntimeError):
    """Another rank failed, or does not respond; the message names it."""


class DivergenceError(ArithmeticError):
    """Losses or gradients became NaN or inf; the message says which, where and since when."""


class ExportError(RuntimeError):
    """An exported file does not compute what its model does; the message says by how much."""


class SaveError(OSError):
    """A file could not be written, and is as it was; of a checkpoint the message names the newest."""


class DataError(OSError):
    """Images stopped coming: decoding processes died or do not respond, or have no memory to pass images."""


class Preempted(Exception):
    """A signal, or Ctrl-C (`interrupted`), stopped a run, which was saved; the message says how to resume."""

    def __init__(self, message: str, interrupted: bool):
        super().__init__(message)
        self.interrupted = interrupted


OURS = (InputError, PeerError, DivergenceError, SaveError, DataError)


def one_line(error: BaseException) -> str:
    """The message of an error, or its kind where it has none.

    Of one of others, or of another process, which arrives with its trace, the last line is the message.
    """
    text = str(error).strip()
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif text.startswith("Caught ") or not isinstance(error, OURS):
        text = text.splitlines()[-1] if text else type(error).__name__
    text = "\\n".join(text.splitlines())  # of names of files
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


@contextmanager
def as_input(expected: str) -> Iterator[None]:
    """Around reading what somebody gave: whatever is wrong with it, known or not, is an InputError.

    The message begins with `expected`, which is `NAME: expected ...`.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise InputError(f"{expected}, got a damaged or foreign one: {kind}: {one_line(error)}") from error


def optional_package(name: str, extra: str) -> Any:
    """Import a package that only some commands need, or raise InputError: which `extra` installs it."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # beside versions that do not fit, packages fail in many ways
        raise InputError(
            f"{name}: expected this package, got {type(error).__name__}: {one_line(error)}; "
            f"pip install 'poa-pretrain[{extra}]'"
        ) from None
