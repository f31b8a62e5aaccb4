"""Writing files whole or not at all, and reading JSON that may be torn.

What is written gets its name when it is complete and on the disk: a temporary file beside it (`.partial`) is
renamed. JSON of which the program depends carries a checksum of the rest, `crc32`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from poa.errors import InputError, SaveError, one_line

PARTIAL = ".partial"
CHECKSUM = "crc32"
# In indented JSON, what holds nothing but numbers and truths; no string has a line break of its own there.
NUMBERS = re.compile(r'([\[{])\n((?: *(?:"[^"\\\n]*": )?(?:-?\d[\d.e+-]*|true|false|null),?\n)+) *([\]}])')
REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR}

log = logging.getLogger("poa")


class HashedFile:
    """A file being written that knows the SHA-256 of its content.

    It gets the name `path`, which may be set until it is complete; `error` is of the file system, which a
    library may have hidden behind one of its own.
    """

    def __init__(self, file: BinaryIO, path: Path):
        self.file, self.path = file, path
        self.error: OSError | None = None
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


@contextmanager
def writing(path: Path) -> Iterator[HashedFile]:
    """A file that is there when the block ends without an error, and leaves no trace otherwise.

    Links are followed; the mode is what the umask leaves. Raises SaveError: the file system refused
    something; what was there before is there still.
    """
    path = Path(os.path.realpath(path))
    partial, file = _beside(path), None
    try:
        with partial.open("xb") as raw:
            yield (file := HashedFile(raw, path))
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(partial, file.path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        reason = file.error if file and file.error else error
        if isinstance(reason, OSError):
            raise SaveError(f"{path} was not written: {reason.strerror or reason}") from reason
        raise


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name[:100]}.{secrets.token_hex(4)}{PARTIAL}")


def _sync_folder(folder: Path) -> None:
    """Make a renaming in it survive a loss of power, where the file system does such a thing."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in REFUSED:
            raise


def remove_partial(folder: Path, name: str = "") -> None:
    """Remove what interrupted writes of this name (default: of any) left in a folder."""
    for rest in folder.glob(f"{name}*{PARTIAL}"):
        rest.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; see `writing`."""
    with writing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8, with escapes for what names of files may hold and UTF-8 may not; see `writing`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON, objects and lists of nothing but numbers on a line each; see `writing`."""

    def on_a_line(found: re.Match[str]) -> str:
        return found[1] + " ".join(line.strip() for line in found[2].splitlines()) + found[3]

    write_text(path, NUMBERS.sub(on_a_line, json.dumps(value, indent=2)) + "\n")


def require_writable(path: Path, option: str) -> None:
    """Raise InputError, before any work is done for it, where no file can be written at a path."""
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise InputError(f"{option}: expected a file, got {path}: a folder or device")
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise InputError(f"{option}: expected a writable file, got {path}: {error.strerror}") from None


def require_json(path: Path, option: str, key: str) -> None:
    """Raise InputError where no JSON can be written, or there is a file without this key, thus another's."""
    require_writable(path, option)
    expected = f"{option}: expected a new file, or an older one of this command to replace"
    there = read_json(path, expected) if path.exists() else {key: None}
    if not isinstance(there, dict) or key not in there:
        raise InputError(f"{expected}, got {path}")


def make_folder(path: Path, option: str) -> None:
    """Make a folder and those above it; raise InputError where none can be."""
    if path.parts[:1] == ("~",):
        raise InputError(f"{option}: expected a folder, got {path}: ~ means the home folder to shells alone")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: expected a folder, got {path}: {error.strerror}") from None


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file; of anything else, such as a FIFO, a reader might wait for ever. Raises OSError: it
    cannot be opened, or is none."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(mode := os.fstat(number).st_mode):
        os.close(number)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return open(number, "rb", buffering)


def read_json(path: Path, expected: str) -> Any:
    """The value in a JSON file. Raises InputError: `NAME: expected ...`, and why it is not."""
    try:
        with open_regular(path) as file:
            return json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else one_line(error)
        raise InputError(f"{expected}, got {path}: {reason}") from None


def sealed(row: Mapping[str, Any]) -> dict[str, Any]:
    """The object with its checksum."""
    return {**row, CHECKSUM: f"{zlib.crc32(json.dumps(row).encode()):08x}"}


def unsealed(row: dict[str, Any]) -> dict[str, Any] | None:
    """The object without its checksum; None where that is missing or another's."""
    content = {key: value for key, value in row.items() if key != CHECKSUM}
    return content if row.get(CHECKSUM) == sealed(content)[CHECKSUM] else None


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines of JSON, all or none, after a torn one, too. Raises SaveError: the file system refused."""
    text = "".join(json.dumps(sealed(row)) + "\n" for row in rows).encode()
    try:
        if path.exists():
            open_regular(path).close()
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
                text = b"\n" + text
            try:
                while text:
                    text = text[file.write(text) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise SaveError(f"{path} was not written: {error.strerror}") from error


def read_rows(path: Path, key: str, kind: type) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects that have a `key` of a kind; others are named and left out.

    Those of a former version, which come first, have no checksum; any other without one has lost it.
    """
    if not path.exists():
        return []
    rows, damaged, former = [], [], True
    with open_regular(path) as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, 1):
        row = _object(line)
        if row is not None:
            former = former and CHECKSUM not in row
            row = row if former else unsealed(row)
        if row is None or type(row.get(key)) is not kind:
            damaged.append(number)
        else:
            rows.append(row)
    if damaged:
        log.warning("%s: damaged lines left out: %d, the first is line %d", path, len(damaged), damaged[0])
    return rows


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def sync(path: Path) -> None:
    """Bring what was appended to a file to the disk, if there is one."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())
