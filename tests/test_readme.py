"""The commands and programs of the READMEs, run in their order: on few images, and as few steps."""

from __future__ import annotations

import importlib
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.collections_of_images import encoded, write_folder
from poa.__main__ import main

ROOT = Path(__file__).parent.parent
SHORT = [
    "method.batch_size=4",
    "method.head.prototypes=8,12",
    "method.head.hidden=16",
    "method.head.bottleneck=8",
    "method.optim.epoch_steps=1",
    "method.optim.epochs=2",
    "method.optim.warmup_epochs=1",
    "method.optim.ibot_start_epoch=1",
    "method.optim.freeze_last_layer_epochs=0",
    "method.optim.teacher_temperature_epochs=0",
]
SMALL = [
    "method.backbone.image_size=32",
    "method.crops.global_size=32",
    "method.crops.local_size=16",
    "method.canvas=32",
]
"""For a ViT of 16-pixel patches."""
TRAINED = {"small-images": SHORT, "vit-s16": [*SHORT, *SMALL]}
"""Presets that are trained here, and how; runs of others are only checked."""

RUN = re.compile(r"^```python\n(.*?)^```|^    ((?:poa|torchrun) [^\n]*)$", re.M | re.S)
NOT_RUN = {
    "pip ": "changes the environment; test_packaging.py installs a wheel",
    "PYTHONPATH=tests ": "trains for minutes",
    "make ": "makes an environment; CI begins with make test",
    "python -m benchmarks": "is run by the tests in tests/benchmarks",
    "@inproceedings": "is the citation",
    "}": "ends the citation",
}
"""How other lines of code begin, and why they are not run here."""
OPTIONAL = ("timm", "onnxruntime")
"""Packages without which programs that import them are not run, and a warning says so."""
NOT_RUN_BLOCKS = {"text": "shows output", "bash": "needs SLURM"}


def test_every_command_is_run_or_has_a_reason() -> None:
    used = set()
    for file in ("README.md", "poa/README.md", "CONTRIBUTING.md"):
        text = RUN.sub("", (ROOT / file).read_text().replace("\\\n", " "))
        for language in re.findall(r"^```(\w*)\n.*?^```", text, re.M | re.S):
            used.add(language)
            assert language in NOT_RUN_BLOCKS, f"{file}: a block of {language or 'no language'}"
        text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
        for line in re.findall(
            r"(?<=\n)    (\S.*)", re.sub(r"^(?:\d+\.|-) .*\n(?:  .*\n)*", "", text, flags=re.M)
        ):
            used.update(begin for begin in NOT_RUN if line.startswith(begin))
            assert line.startswith(tuple(NOT_RUN)), f"{file}: {line}"
    assert used == {*NOT_RUN, *NOT_RUN_BLOCKS}


def pieces() -> Iterator[tuple[str, str]]:
    """`(file, text)` of the commands and programs."""
    for file in ("README.md", "poa/README.md"):
        text = (ROOT / file).read_text().replace("\\\n", " ")
        for match in RUN.finditer(text):
            yield file, match[1] or match[2]


def arguments(command: str) -> list[str]:
    """Those of `poa`, on the images and runs there are here, with options that make a run short."""
    places = {"DATA": "path/to/images", "RUN": "runs/first", "TUNED": "runs/tuned"}
    places |= {"cifar": "path/to/images", "runs/scratch": "runs/first"}
    places |= {"source.pth": "models/vit-192x6", "head_dim=32": "head_dim=64"}
    for name in ("small", "large"):
        places[f"timm:vit_{name}_patch14_dinov2.lvd142m"] = "models/vit-192x6"
    launcher, _, rest = command.partition("poa ")
    words = [places.get(word, word) for word in shlex.split(rest)]
    if words[0] == "loader":
        return [*words, "--seconds", "0.2"]
    if words[0] == "finetune":
        if launcher:  # RandAugment needs timm
            words = [*words[: words.index("--recipe")], "--out", "runs/many", "--subnets", "192x6"]
        return [*words, "epochs=1", "warmup_epochs=0.5", "batch_size=4"]
    if words[0] == "latency":
        return [*words, *([] if "--sample" in words else ["--sample", "10"]), "--seconds", "0.01"]
    if words[0] == "select":
        return ["cpu=1e6" if word == "cpu=0.4" else "20M" if word == "5.5M" else word for word in words]
    if words[0] != "pretrain" or "--preset" not in words or "--check" in words:
        return words
    short, out = TRAINED.get(words[words.index("--preset") + 1]), words.index("--out") + 1
    if launcher or short is None or Path(words[out]).exists():
        return [*words[:out], "runs/another", *words[out + 1 :], "--check"]
    return [*words, *short]


def absent(package: str, program: str) -> bool:
    """Whether a program needs a package that cannot be imported."""
    try:
        return f"import {package}" in program and not importlib.import_module(package)
    except Exception:  # beside a torchvision that does not fit it, timm fails in many ways
        return True


def test_commands_and_programs_run_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("poa.evaluate.linear.FEWEST_STEPS", 10)
    monkeypatch.setattr("poa.selection.runtimes.ROUNDS", (1, 1))
    write_folder(Path("path/to/images"), 24)
    Path("path/to/photo.jpg").write_bytes(encoded(0))
    seen = {"trained": 0, "checked": 0, "asked": 0, "programs": 0}
    for file, text in pieces():
        if text.startswith(("poa", "torchrun")):
            words = arguments(text)
            code = main(words)
            said = capsys.readouterr()
            if words[0] == "warmup" and not torch.cuda.is_available():
                assert code == 2 and "expected a device that runs Triton kernels" in said.err
            elif "onnx" in words and absent("onnxruntime", "import onnxruntime"):
                assert code == 2 and "expected this package" in said.err
            else:
                assert code == 0 and said.out, f"{file}: {text}: {said.err}"
            kind = "trained" if "--out" in words and words[0] == "pretrain" else "asked"
            seen["checked" if "--check" in words else kind] += 1
        elif missing := next((name for name in OPTIONAL if absent(name, text)), None):
            warnings.warn(f"{file}: a program was not run, {missing} does not import here", stacklevel=1)
        else:
            exec(compile(text, file, "exec"), {})
            seen["programs"] += 1
    assert seen["trained"] >= 4 and seen["checked"] >= 4 and seen["asked"] >= 8 and seen["programs"] >= 2, (
        seen
    )
