"""Which protocols an evaluation runs: those that always do, those asked for, or a suite."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from poa.checkpoint import log
from poa.errors import InputError
from poa.evaluate.protocol import Protocol
from poa.evaluate.sweep import PROTOCOLS, SEPARATE

STANDARD = "standard"
"""All protocols but those that need a fine-tuned run or masks."""


def require_protocols(names: Sequence[str]) -> list[Protocol]:
    """Those that always run, and those with these names.

    Of `STANDARD` those whose packages are missing are left out, and said so.
    """
    known, suite = [p for p in PROTOCOLS if p not in SEPARATE], STANDARD in names
    if unknown := [name for name in names if name not in [STANDARD, *(p.name for p in known)]]:
        raise InputError(
            f"protocols: expected some of {', '.join(p.name for p in known)}, got {', '.join(unknown)}"
        )
    missing = [p for p in known if p.needs and importlib.util.find_spec(p.needs) is None] if suite else []
    for protocol in missing:
        log.warning("evaluation: %s is left out, it needs %s", protocol.name, protocol.needs)
    return [p for p in known if p not in missing and (suite or p.help is None or p.name in names)]
