"""All protocols, and which of them an evaluation runs: those that always do, those asked for, or a suite."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from poa.checkpoint import log
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate.backgrounds import BACKGROUNDS
from poa.evaluate.correspondence import CORRESPONDENCE
from poa.evaluate.depth import DEPTH
from poa.evaluate.detection import DETECTION
from poa.evaluate.kmeans import KMEANS
from poa.evaluate.knn import KNN
from poa.evaluate.linear import LINEAR
from poa.evaluate.logistic import LOGISTIC
from poa.evaluate.protocol import Protocol
from poa.evaluate.quality import QUALITY
from poa.evaluate.retrieval import RETRIEVAL
from poa.evaluate.robustness import ROBUSTNESS
from poa.evaluate.segmentation import SEGMENTATION
from poa.evaluate.stereo import STEREO
from poa.evaluate.top1 import TOP1
from poa.options import Options, override, to_dict

# All protocols, in the order of their columns.
PROTOCOLS: tuple[Protocol, ...] = (
    KNN, TOP1, LINEAR, LOGISTIC, KMEANS, RETRIEVAL, QUALITY, CORRESPONDENCE, STEREO, SEGMENTATION,
    DEPTH, DETECTION, ROBUSTNESS, BACKGROUNDS,
)  # fmt: skip
SEPARATE = (TOP1, *(p for p in PROTOCOLS if p.folder))  # of fine-tuned runs, and with images of their own
STANDARD = "standard"
"""All protocols but those that need a fine-tuned run or images of their own."""

Folders = Mapping[str, str | PathLike[str] | Sequence[str | PathLike[str]]]
"""By the name of a protocol its folder, or its folder and options such as `epochs=1`."""


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


def open_folders(folders: Folders, crops: CropsConfig, world: World) -> list[tuple[Protocol, Any]]:
    """Protocols of folders, with folder, numbers of images and options among the settings, and what they
    score subnets on; the main process has that, the others None.

    What is left out is logged. Raises InputError: no such protocol, or wrong options or folders.
    """
    opened = []
    for name, given in folders.items():
        place, *assignments = [given] if isinstance(given, str | PathLike) else given
        protocol = next((p for p in PROTOCOLS if p.folder and p.name == name), None)
        if protocol is None or protocol.folder is None:
            known = ", ".join(p.name for p in PROTOCOLS if p.folder)
            raise InputError(f"evaluate: expected folders of {known}, got one of {name}")
        options = override(protocol.folder.options, [fspath(a) for a in assignments])
        kept = list[Any]()
        counts = world.from_main(partial(_open, protocol, Path(place), crops, options, kept))
        about = {"folder": os.path.abspath(place), **counts, **to_dict(options)}
        opened.append((replace(protocol, settings={**protocol.settings, **about}), kept[0] if kept else None))
    return opened


def _open(
    protocol: Protocol, place: Path, crops: CropsConfig, options: Options, kept: list[Any]
) -> dict[str, int]:
    """Append what a protocol scores subnets on; the numbers of its images."""
    assert protocol.folder
    left_out = LeftOut()
    kept.append(protocol.folder.open(place, crops, options, left_out))
    if left_out:
        log.warning("%s: left out: %s", protocol.name, left_out)
    counts: dict[str, int] = kept[0].counts()
    return counts
