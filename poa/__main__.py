"""The command line: `poa pretrain | report | evaluate | extract | ...`, or `python -m poa`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from poa.cli import parse
from poa.errors import DivergenceError, InputError, PeerError, Preempted, SaveError
from poa.signals import INTERRUPTED

REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what ends it early is one line on standard error.

    Exit codes: 2 for wrong input, 1 where training cannot go on, 75 where a signal stopped a run that was
    saved and can go on, 130 where Ctrl-C did (a second one leaves at once).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except InputError as error:
        # An error raised in a decoding process arrives with its traceback; the last line is ours.
        line = str(error).strip().splitlines()[-1].removeprefix("poa.errors.InputError: ")
        print(f"poa: error: {line}", file=sys.stderr)
        return 2
    except (DivergenceError, PeerError, SaveError) as error:
        print(f"poa: error: {error}", file=sys.stderr)
        return 1
    except Preempted as stop:
        print(f"poa: {stop}", file=sys.stderr)
        return INTERRUPTED if stop.interrupted else REQUEUE
    except KeyboardInterrupt:
        print("poa: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on, as in `| head`
        return 141
    return 0


if __name__ == "__main__":
    sys.exit(main())
