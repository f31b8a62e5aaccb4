"""Images of other than three channels: decoded, trained on, exported, embedded; statistics of channels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import poa
from helpers.commands import fails
from helpers.tiny import ONE_STEP, OVERRIDES
from poa.__main__ import main
from poa.contact_sheet import contact_sheet
from poa.data.decode import decode, to_picture

DRAW = np.random.default_rng(0)
NOISE = DRAW.integers(0, 256, (20, 30, 5), dtype=np.uint8)
DEEP = NOISE.astype(np.uint16) * 257
BANDS, DEEP_BANDS = ([Image.fromarray(x[..., c].copy()) for c in range(5)] for x in (NOISE, DEEP))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> io.BytesIO:
    image.save(file := io.BytesIO(), kind, **options)
    file.seek(0)
    return file


def array(pixels: np.ndarray) -> io.BytesIO:
    np.save(file := io.BytesIO(), pixels)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("file", "channels"),
    [
        (saved(BANDS[0]), 1),
        (saved(Image.merge("LA", BANDS[:2])), 1),
        (saved(Image.merge("LA", BANDS[:2])), 2),
        (saved(Image.merge("RGBA", BANDS[:4])), 4),
        (saved(DEEP_BANDS[0]), 1),
        (saved(BANDS[0], "TIFF", save_all=True, append_images=BANDS[1:]), 5),
        (saved(DEEP_BANDS[0], "TIFF", save_all=True, append_images=DEEP_BANDS[1:]), 5),
        (array(NOISE), 5),
        (array(DEEP), 5),
        (array(NOISE[..., 0]), 1),
        (array(NOISE[..., :3]), 3),
    ],
    ids=[
        "grey",
        "grey of LA",
        "LA",
        "RGBA",
        "deep",
        "pages",
        "deep pages",
        "array",
        "deep array",
        "2D",
        "RGB",
    ],
)
def test_pixels_are_those_of_the_file(file: io.BytesIO, channels: int) -> None:
    assert np.array_equal(decode(file, 64, channels=channels), NOISE[..., :channels])
    file.seek(0)
    small = decode(file, 15, channels=channels)
    each = [band.resize((15, 10), Image.Resampling.BICUBIC, reducing_gap=2.0) for band in BANDS[:channels]]
    assert np.array_equal(small, np.stack(each, 2))
    assert to_picture(small).size == (15, 10)
    file.seek(0)


@pytest.mark.parametrize(
    ("file", "channels", "message"),
    [
        (saved(Image.merge("RGB", BANDS[:3])), 1, r"an image of channels=1, got 3 \(RGB\)"),
        (saved(BANDS[0]), 5, r"an image of channels=5, got 1 \(L\)"),
        (array(NOISE), 4, r"an array \[H, W, 4\], got \[20, 30, 5\]"),
        (array(NOISE / 255), 5, r"integers \[H, W\] or \[H, W, channels\], got float64 \[20, 30, 5\]"),
        (array(np.array([object()])), 5, "Object arrays cannot be loaded"),
    ],
)
def test_other_channels_are_refused(file: io.BytesIO, channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(file, 64, channels=channels)
    file.seek(0)


def test_from_statistics_to_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed options are those of a run, whose model reads the same files; others are refused."""
    images, out = tmp_path / "images", tmp_path / "run"
    pixels = DRAW.integers(0, 256, (24, 18, 26, 5), dtype=np.uint8)
    for index, one in enumerate(pixels):
        (folder := images / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{index:02}.npy", one)
    (images / "a" / "broken.npy").write_bytes(b"\x93NUMPY")
    command = ["data", "stats", str(images), "holdout=0", "--workers", "0", "--channels"]
    assert main([*command, "5"]) == 0
    *_, unreadable, options, last = capsys.readouterr().out.splitlines()
    known = json.loads(last)
    scaled = pixels / 255
    assert unreadable.endswith("24 training images used; 1 more could not be read") and known["images"] == 24
    assert known["mean"] == pytest.approx(scaled.mean((0, 1, 2)), abs=1e-4)
    assert known["std"] == pytest.approx(scaled.std((0, 1, 2)), abs=1e-4)
    assert "expected readable images, got none of 25: " in fails(capsys, *command, "4")

    overrides = [*OVERRIDES, *ONE_STEP, f"data.source={images}", "unreadable_share=0.1", "workers=0"]
    assert "expected a value for each of the 5 channels" in fails(
        capsys, "pretrain", "--out", str(out), *overrides, "channels=5"
    )
    assert (
        main(["pretrain", "--out", str(out), *overrides, *options.split(), "jitter=1", "grayscale=0.5"]) == 0
    )
    assert "saturation, hue and grey-scale crops need 3 channels" in capsys.readouterr().out
    run = poa.Run(out)
    assert run.evaluate("16x1").scores
    files = sorted(map(str, images.glob("*/[0-9]*.npy")))
    features = run.embed("16x1", workers=0)
    with torch.no_grad():
        assert np.allclose(features["cls"], run.subnet("16x1")(files), atol=1e-5)
    assert contact_sheet(run.config)
    page = poa.Nearest(files[:1], count=2)
    run.embed("16x1", workers=0, nearest=page)
    assert page.page().count("<img") == 3 and page.neighbours[0][0].name == files[0]
