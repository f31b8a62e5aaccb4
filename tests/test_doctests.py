"""The examples in docstrings of what `elastic_kernels` and `poa` export, run on the CPU."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

import elastic_kernels
import poa
from helpers.tiny import ONE_STEP, OVERRIDES
from poa.__main__ import main

README = Path(__file__).parent.parent / "kernels" / "README.md"
PUBLIC = {f"{m.__name__}.{name}": getattr(m, name) for m in (elastic_kernels, poa) for name in m.__all__}
NEEDS = {
    "elastic_kernels.absent_gpu": "triton",
    "elastic_kernels.elastic_block_from_timm": "timm",
    "elastic_kernels.elastic_block_from_vit": "timm",
    "elastic_kernels.planning": "triton",
}
"""Packages beyond those that `pip install` of this repository brings."""
FOR_POA = {
    "NEUTRAL_CROP",
    "autocast_operands",
    "cached_constant",
    "check_canvases",
    "conv_channels_last",
    "fused_adamw_backend",
    "linear_backend",
    "recomputed",
    "upload",
    "without_autocast",
}
"""What no operator takes or is: exported for `poa`, and not named in the README of `elastic_kernels`."""


def examples(name: str) -> list[doctest.DocTest]:
    """Of a docstring and those of methods, or of a module's functions; none sees another's names."""
    thing = PUBLIC[name]
    module = thing if isinstance(thing, ModuleType) else None
    return [test for test in doctest.DocTestFinder().find(thing, name, module, globs={}) if test.examples]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in `runs/first`, and `photo.jpg`."""
    path = tmp_path_factory.mktemp("examples")
    run = ["pretrain", "--preset", "quickstart", "--out", str(path / "runs" / "first")]
    assert main([*run, *OVERRIDES, *ONE_STEP]) == 0
    Image.new("RGB", (40, 30)).save(path / "photo.jpg")
    return path


@pytest.mark.parametrize("name", [name for name in PUBLIC if examples(name)])
def test_examples(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} does not import here", exc_type=Exception)
    monkeypatch.chdir(folder)
    for test in examples(name):
        assert "+SKIP" not in (test.docstring or "")
        torch.manual_seed(0)
        said: list[str] = []
        doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert not said, "".join(said)


def test_everything_public_has_an_example() -> None:
    assert sorted(name for name in PUBLIC if not examples(name)) == sorted(
        f"elastic_kernels.{name}" for name in FOR_POA
    )
    named = set(re.findall(r"`(\w+)[`(]", README.read_text()))
    assert len(named) > 20 and not named & FOR_POA
