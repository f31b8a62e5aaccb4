"""Pictures by matplotlib, which is optional and slow to import."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

from poa.errors import InputError
from poa.files import require_writable, write_bytes


def require_matplotlib() -> None:
    """Raise InputError where nothing can be drawn, before any work is done for it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError("plot: expected matplotlib; install it with: pip install 'poa-pretrain[plot]'")


def require_drawable(path: Path, option: str, also: str = "") -> None:
    """Raise InputError, before any work is done for it, where no picture can be written at a path.

    The ending chooses the format; `also` is another one that will do.
    """
    require_matplotlib()
    from matplotlib.backend_bases import FigureCanvasBase

    if not (also and path.suffix == also) and path.suffix[1:].lower() not in FigureCanvasBase.filetypes:
        expected = f"{also} or a picture" if also else "a picture"
        raise InputError(f"{option}: expected {expected} such as .png, got {path}")
    require_writable(path, option)


def write_figure(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), dpi=dpi)
    write_bytes(path, picture.getvalue())
