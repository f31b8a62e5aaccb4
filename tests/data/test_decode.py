"""From files to pixels: the same picture however it is stored, the same function everywhere."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

import poa
from helpers.tiny import tiny_config
from poa import export
from poa.data.crops import CropsConfig
from poa.data.decode import decode, to_pixels
from poa.data.loader import evaluation_batches
from poa.data.preprocessing import Preprocessing
from poa.data.sources import open_data
from poa.step import initial_network


def scene(height: int = 48, width: int = 64) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(
        np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8)
    )


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


TURNS = {
    2: [Image.Transpose.FLIP_LEFT_RIGHT],
    3: [Image.Transpose.ROTATE_180],
    4: [Image.Transpose.FLIP_TOP_BOTTOM],
    5: [Image.Transpose.TRANSPOSE],
    6: [Image.Transpose.ROTATE_90],
    7: [Image.Transpose.TRANSVERSE],
    8: [Image.Transpose.ROTATE_270],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_phones_store_pictures_sideways(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = scene()
    for turn in TURNS[orientation]:
        stored = stored.transpose(turn)
    lossy = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    file = encoded(stored, kind, exif=exif.tobytes(), **lossy)
    pixels = decode(file, 64).astype(int)
    assert pixels.shape == (48, 64, 3)
    assert np.abs(pixels - np.asarray(scene())).max() <= (8 if kind == "JPEG" else 0)
    picture = Image.open(file)
    assert np.array_equal(to_pixels(picture, 64), pixels)


def test_damaged_exif_costs_no_picture() -> None:
    assert decode(encoded(scene(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), 64).shape == (48, 64, 3)


def ramp(low: int, high: int, dtype: type) -> Image.Image:
    return Image.fromarray(np.linspace(low, high, 64 * 64).round().reshape(64, 64).astype(dtype))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("bits", "largest"), [(8, 255), (9, 127), (10, 255), (12, 255), (14, 255), (16, 255)]
)
def test_deep_pictures_keep_their_contrast(kind: str, bits: int, largest: int) -> None:
    grey = decode(encoded(ramp(0, 2**bits - 1, np.uint16), kind), 64)[..., 0]
    assert (grey.min(), grey.max(), len(np.unique(grey))) == (0, largest, largest + 1)


def test_the_range_of_deep_pictures_can_be_given() -> None:
    dark = encoded(ramp(0, 1023, np.uint16))
    assert decode(dark, 64).max() == 255
    assert decode(dark, 64, bits=16).max() == 3 and decode(dark, 64, bits=8).min() == 0


def test_signed_pictures() -> None:
    """Zero is grey; 12 bits hold -1024..2000."""
    image = encoded(ramp(-1024, 2000, np.int32), "TIFF")
    grey = decode(image, 64)[..., 0]
    assert (grey[0, 0], grey[-1, -1]) == ((2048 - 1024) >> 4, (2048 + 2000) >> 4)


@pytest.mark.parametrize("kind", ["EPS", "PDF"])
def test_no_program_is_started_for_a_picture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode(encoded(scene(), kind), 64)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000"])
def test_pictures_that_are_cut_off(kind: str) -> None:
    draw = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = encoded(Image.fromarray(draw), kind).getvalue()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES and decode(io.BytesIO(whole), 64).shape == (64, 64, 3)
    with pytest.raises((ValueError, OSError, SyntaxError)):
        decode(io.BytesIO(whole[: len(whole) // 2]), 64)


def test_transparent_palettes_say_nothing(recwarn: pytest.WarningsRecorder) -> None:
    image = scene().convert("P", palette=Image.Palette.ADAPTIVE)
    image.info["transparency"] = bytes(range(256))
    assert decode(encoded(image, "PNG", transparency=bytes(256)), 64).shape == (48, 64, 3)
    assert not recwarn.list


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_what_is_deployed_is_what_was_evaluated(ending: str, tmp_path: Path) -> None:
    """Files of any shape, sideways or deep, give the same crops bit by bit."""
    exif = Image.Exif()
    exif[0x112] = 6
    for i, size in enumerate([(90, 300), (300, 90), (20, 31), (64, 64)]):
        scene(*size).save(tmp_path / f"{i}.{ending}", exif=exif.tobytes())
    if ending == "png":
        ramp(0, 4095, np.uint16).save(tmp_path / "deep.png")
    for bits in (None, 14):
        config = tiny_config(
            f"data.source={tmp_path}", "method.canvas=48", *([f"data.bits={bits}"] if bits else [])
        )
        method, backbone = config.method, initial_network(config).backbone
        path = export.extract(
            backbone, backbone.space.smallest, tmp_path / "out", method.crops, canvas=48, bits=bits
        )
        source = config.open().train
        (batch,) = evaluation_batches(source, method.canvas, 0)
        evaluated = Preprocessing.of(method.crops, 48).crop(batch.images, batch.sizes)
        files = [source.storage.name(i) for i in range(len(source))]
        assert torch.equal(poa.load(path).preprocess(files), evaluated)
        if ending == "png":
            assert torch.equal(poa.load(path).preprocess([Image.open(file) for file in files]), evaluated)


def test_the_canvas_goes_with_the_size_of_the_images(tmp_path: Path) -> None:
    config = tiny_config()
    backbone = initial_network(config).backbone
    path = export.extract(
        backbone, backbone.space.smallest, tmp_path, config.method.crops, canvas=32, image_size=48
    )
    assert poa.load(path).info["preprocessing"]["canvas"] == 64


def test_files_that_are_no_pictures_are_named(tmp_path: Path) -> None:
    config = tiny_config()
    backbone = initial_network(config).backbone
    model = poa.load(export.extract(backbone, backbone.space.smallest, tmp_path, CropsConfig(global_size=24)))
    os.mkfifo(tmp_path / "x.png")
    for name, reason in (("x.png", "not a regular file"), ("y.png", "No such file")):
        with pytest.raises(ValueError, match=f"{name}: .*{reason}"):
            model.preprocess(tmp_path / name)


def test_unreadable_files_are_listed_as_such(tmp_path: Path) -> None:
    scene().save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/full")
    data = open_data(str(tmp_path), 0.25, 0)
    (batch,) = evaluation_batches(data.train, 64, 0)
    assert len(batch.images) == 1 and "not a regular file" in batch.unreadable[0]
