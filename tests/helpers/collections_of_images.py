"""The same images as a folder, a list, tar shards and Parquet tables, and images nobody wants to meet."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "owl")
SHARD = 8  # images


def encoded(number: int) -> bytes:
    """A small PNG, different for every number, of different sizes."""
    draw = np.random.default_rng(number)
    pixels = draw.integers(0, 256, (30 + number % 4, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images(count: int) -> list[tuple[str, int, bytes]]:
    """(class, label, file) of images, class by class."""
    share = count // len(CLASSES)
    return [(c, label, encoded(label * share + i)) for label, c in enumerate(CLASSES) for i in range(share)]


def write_folder(root: Path, count: int) -> Path:
    for number, (name, _, data) in enumerate(images(count)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number:04}.png").write_bytes(data)
    return root


def write_list(root: Path, count: int) -> Path:
    write_folder(root, count)
    paths = sorted(root.glob("*/*.png"))
    lines = [f"{path.relative_to(root)}\t{path.parent.name}\n" for path in paths]
    (root / "images.txt").write_text("".join(lines))
    return root / "images.txt"


def write_shards(root: Path, count: int) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    every = images(count)
    for start in range(0, len(every), SHARD):
        with tarfile.open(root / f"part-{start // SHARD:04}.tar", "w") as tar:
            for number, (_, label, data) in enumerate(every[start : start + SHARD], start):
                add(tar, f"{number:06}.cls", str(label).encode())
                add(tar, f"{number:06}.json", b"{}")
                add(tar, f"{number:06}.png", data)
    return root


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(root: Path, count: int) -> Path:
    """As Hugging Face's datasets do, with names of the classes in the metadata."""
    import pyarrow as pa
    import pyarrow.parquet

    root.mkdir(parents=True, exist_ok=True)
    every = images(count)
    names = {"info": {"features": {"label": {"names": list(CLASSES), "_type": "ClassLabel"}}}}
    for start in range(0, len(every), SHARD):
        part = every[start : start + SHARD]
        rows = [{"bytes": data, "path": f"{i}.png"} for i, (_, _, data) in enumerate(part, start)]
        table = pa.table({"image": rows, "label": [label for _, label, _ in part]})
        table = table.replace_schema_metadata({b"huggingface": json.dumps(names).encode()})
        pyarrow.parquet.write_table(table, root / f"part-{start // SHARD:04}.parquet", row_group_size=3)
    return root


WRITERS = {"folder": write_folder, "list": write_list, "shards": write_shards, "parquet": write_parquet}


def huge_png(side: int) -> bytes:
    """A valid PNG of black pixels, 20,000 of which a side take little room until they are decoded."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join(packer.compress(bytes(1 + side)) for _ in range(side)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", rows) + part(b"IEND", b"")


def write_odd(root: Path) -> tuple[set[str], set[str]]:
    """Odd images of both kinds; the names of the readable and of the unreadable ones."""
    root.mkdir(parents=True, exist_ok=True)
    ramp = np.linspace(0, 255, 40 * 30).reshape(30, 40)
    grey = Image.fromarray(ramp.astype(np.uint8))
    grey.save(root / "grey.png")
    grey.convert("RGB").convert("CMYK").save(root / "cmyk.jpg")
    grey.convert("P").save(root / "palette.png")
    grey.convert("LA").save(root / "alpha.png")
    grey.convert("1").save(root / "bits.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(root / "deep.png")
    Image.fromarray((ramp * 257).astype(np.uint16)).save(root / "deep.tif")
    readable = {path.name for path in root.iterdir()}
    (root / "huge.png").write_bytes(huge_png(20000))
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("not an image")
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(
        whole, "JPEG"
    )
    (root / "cut.jpg").write_bytes(whole.getvalue()[:3000])
    Image.fromarray(ramp.astype(np.float32)).save(root / "float.tif")
    (root / "gone.png").symlink_to(root / "nowhere.png")
    return readable, {path.name for path in root.iterdir()} - readable
