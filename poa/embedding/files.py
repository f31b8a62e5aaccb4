"""Features of images in files that grow batch by batch: `.npy`, `.npz` and Parquet, whole or not at all."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from poa.errors import InputError
from poa.files import require_json, require_writable, writing

GROUP = 32 << 20  # bytes of a row group of Parquet
COPIED = 16 << 20  # bytes that are copied at a time


class Rows(NamedTuple):
    """Some images: names, labels (None where one has none), and float32 `[images, ...]` by token."""

    names: list[str]
    labels: list[str | None]
    features: Mapping[str, np.ndarray]


Add = Callable[[Rows], None]


def require_feature_file(path: Path, tokens: int) -> None:
    """Raise InputError, before any work is done for it, where no features can be written at a path."""
    if path.suffix not in KINDS:
        raise InputError(f"--out: expected a name ending in {', '.join(KINDS)}, got {path}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise InputError("--out: Parquet tables need pyarrow; install it with: pip install pyarrow")
    if path.suffix == ".npy":
        if tokens > 1:
            raise InputError(f"--tokens: expected one kind of tokens for {path}, got {tokens}")
        require_json(path.with_suffix(".json"), "--out", "about")
    require_writable(path, "--out")


@contextmanager
def writing_features(path: Path, about: Mapping[str, Any]) -> Iterator[Add]:
    """A function that adds rows to a file, which is there when the block ends without an error.

    - `.npy`: an array `[images, ...]`, which `numpy.load(path, mmap_mode="r")` leaves on the disk; names and
      labels are in a JSON file of the same name;
    - `.npz`: an array for each token, `names`, `labels`, and `about` as JSON;
    - `.parquet`: columns `name` and `label`, a list for each token; `about` in the metadata of the schema.

    Args:
        path: of the file; its ending chooses the kind.
        about: where the features come from.

    Raises:
        SaveError: the file system refused something; what was there before is there still.
    """
    with KINDS[path.suffix](path, about) as add:
        yield add


class _Array:
    """An array whose number of rows is known in the end only."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.rows = self.crc32 = 0
        self.shape: tuple[int, ...] = (0,)

    def add(self, rows: np.ndarray) -> None:
        if not self.rows:
            self.shape = rows.shape[1:]
            self._write_header()
        self.rows += len(rows)
        content = np.ascontiguousarray(rows, dtype=np.float32).data
        self.crc32 = zlib.crc32(content, self.crc32)
        self.file.write(content)

    def end(self) -> None:
        self.file.seek(0)
        self._write_header()

    def _write_header(self) -> None:
        """Which NumPy pads, so that the first dimension can grow in place."""
        shape = (self.rows, *self.shape)
        np.lib.format.write_array_header_1_0(
            self.file, {"shape": shape, "fortran_order": False, "descr": "<f4"}
        )


@contextmanager
def _npy(path: Path, about: Mapping[str, Any]) -> Iterator[Add]:
    with writing(path) as file, writing(path.with_suffix(".json")) as listed:
        array, separator = _Array(file.file), ""
        listed.write(f'{{"about": {json.dumps(about)},\n"images": ['.encode())

        def add(rows: Rows) -> None:
            nonlocal separator
            array.add(*rows.features.values())
            for name, label in zip(rows.names, rows.labels, strict=True):
                listed.write(f"{separator}\n{json.dumps({'name': name, 'label': label})}".encode())
                separator = ","

        yield add
        array.end()
        listed.write(f'\n],\n"crc32": {array.crc32}}}\n'.encode())


@contextmanager
def _npz(path: Path, about: Mapping[str, Any]) -> Iterator[Add]:
    with writing(path) as file, tempfile.TemporaryDirectory(dir=path.absolute().parent) as folder:
        files: dict[str, BinaryIO] = {}
        arrays: dict[str, _Array] = {}
        texts = {name: _Texts(Path(folder), name) for name in ("names", "labels")}

        def add(rows: Rows) -> None:
            for name, values in rows.features.items():
                if name not in arrays:
                    files[name] = (Path(folder) / name).open("x+b")
                    arrays[name] = _Array(files[name])
                arrays[name].add(values)
            texts["names"].add(rows.names)
            texts["labels"].add([label or "" for label in rows.labels])

        yield add
        with zipfile.ZipFile(file.file, "w", zipfile.ZIP_STORED) as packed:
            for name, array in arrays.items():
                array.end()
                files[name].seek(0)
                with packed.open(f"{name}.npy", "w", force_zip64=True) as member, files[name] as source:
                    shutil.copyfileobj(source, member, COPIED)
            for name, text in texts.items():
                with packed.open(f"{name}.npy", "w", force_zip64=True) as member:
                    text.copy_to(member)
            with packed.open("about.npy", "w") as member:
                np.lib.format.write_array(member, np.array(json.dumps(about)))


class _Texts:
    """Lines of text that become an array of NumPy, whose elements are as long as the longest."""

    def __init__(self, folder: Path, name: str):
        self.file = (folder / f"{name}.jsonl").open("x+", encoding="ascii")
        self.longest, self.count = 1, 0

    def add(self, lines: list[str]) -> None:
        self.longest = max(self.longest, *map(len, lines), 1)
        self.count += len(lines)
        self.file.writelines(json.dumps(line) + "\n" for line in lines)

    def copy_to(self, file: Any) -> None:
        kind = f"<U{self.longest}"
        header = {"shape": (self.count,), "fortran_order": False, "descr": kind}
        np.lib.format.write_array_header_1_0(file, header)
        self.file.seek(0)
        for line in self.file:
            file.write(np.array(json.loads(line), dtype=kind).tobytes())
        self.file.close()


@contextmanager
def _parquet(path: Path, about: Mapping[str, Any]) -> Iterator[Add]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with writing(path) as file:
        waiting: list[Any] = []
        writer = None

        def flush() -> None:
            nonlocal writer
            table = pa.Table.from_batches(waiting)
            if writer is None:
                named = {"poa": json.dumps(about)}
                writer = pq.ParquetWriter(
                    file.file, table.schema.with_metadata(named), use_dictionary=["label"]
                )
            writer.write_table(table, row_group_size=len(table))
            waiting.clear()

        def add(rows: Rows) -> None:
            columns = {"name": pa.array(rows.names), "label": pa.array(rows.labels, pa.string())}
            for name, values in rows.features.items():
                flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).ravel())
                for size in reversed(values.shape[1:]):
                    flat = pa.FixedSizeListArray.from_arrays(flat, size)
                columns[name] = flat
            waiting.append(pa.RecordBatch.from_pydict(columns))
            if sum(batch.nbytes for batch in waiting) >= GROUP:
                flush()

        yield add
        if waiting:
            flush()
        if writer:
            writer.close()


KINDS: dict[str, Callable[..., Any]] = {".npz": _npz, ".npy": _npy, ".parquet": _parquet}
