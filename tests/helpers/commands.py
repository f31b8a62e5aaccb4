"""What tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from poa.__main__ import main


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with exit code 2 and one line; return the line."""
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr().err
    assert code == 2, printed
    assert printed.count("\n") == 1, printed
    return printed
