"""The command line: `poa pretrain | report | evaluate | extract | ...`, or `python -m poa`."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from contextlib import suppress

import torch
from safetensors import SafetensorError

from poa.cli.parser import parse
from poa.errors import (
    DataError,
    DivergenceError,
    ExportError,
    InputError,
    PeerError,
    Preempted,
    SaveError,
    one_line,
)
from poa.progress import discard_output
from poa.signals import INTERRUPTED

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
OF_INPUT = (
    *(InputError, OSError, UnicodeError),
    *(json.JSONDecodeError, tarfile.TarError, zipfile.BadZipFile, SafetensorError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what ends it early is one line on standard error.

    Exit codes: 2 for wrong input, 1 where training cannot continue or an export is refused, 75 where a signal
    stopped a run whose checkpoint was saved, 130 where Ctrl-C did (a second one leaves at once).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what no encoding does
    try:
        options = parse(arguments)
        options.command(options)
        if sys.stdout:  # it may have been closed
            sys.stdout.flush()
    except BrokenPipeError:
        discard_output()  # the reader has closed the pipe, as `| head` does
        return 141
    except (DataError, DivergenceError, ExportError, PeerError, SaveError) as error:
        return _ended(f"error: {one_line(error)}", 1)
    except Preempted as stop:
        return _ended(str(stop), INTERRUPTED if stop.interrupted else REQUEUE)
    except (MemoryError, RuntimeError) as error:
        if (text := _of_memory(error)) is None:
            raise
        return _ended(f"error: out of memory: {text}", 1)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    except Exception as error:
        if not isinstance(error, (*OF_INPUT, *_of_parquet())):
            raise
        return _ended(f"error: {one_line(error).removeprefix('poa.errors.InputError: ')}", 2)
    return 0


def _ended(line: str, code: int) -> int:
    """Say why, where somebody reads it."""
    with suppress(OSError):
        print(f"poa: {line}", file=sys.stderr)
    return code


def _of_memory(error: MemoryError | RuntimeError) -> str | None:
    """The line of an out-of-memory error, of the machine or a GPU; None for other errors."""
    text = str(error).partition("\n")[0].rpartition("DefaultCPUAllocator: ")[2]
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or text.startswith("can't allocate memory"):
        return text.removeprefix("CUDA out of memory. ") or "of the machine"
    return None


def _of_parquet() -> tuple[type[Exception], ...]:
    """The errors of pyarrow, where it was used."""
    arrow = sys.modules.get("pyarrow")
    return (arrow.ArrowException,) if arrow else ()


if __name__ == "__main__":
    sys.exit(main())
