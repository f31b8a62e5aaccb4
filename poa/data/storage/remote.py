"""Files in object stores and on web servers, by URL: ranges of bytes, kept in a bounded cache on the disk.

fsspec reads them; for some stores it needs a package of its own, such as s3fs. Objects are cut into blocks,
which are files in the user's cache folder. Where these take more than `POA_CACHE_GB` (default 10), those that
were used least recently are deleted. What fails is tried again for a minute.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import re
import secrets
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from poa.errors import DataError, InputError, one_line
from poa.files import open_regular

T = TypeVar("T")
log = logging.getLogger("poa")

URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
BLOCK = 1 << 18  # bytes
AHEAD = 16  # blocks that are fetched with the one that a reader from front to back asks for
PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)  # seconds before another attempt
PATIENCE = 60.0  # seconds after which there is none
SILENCE = 30.0  # seconds in which a web server sends nothing
SAID_AFTER = 1.5  # seconds without an answer
SWEEP_EVERY = 64  # blocks that are written between looks at the size of the cache
REFUSALS = {*range(400, 500)} - {408, 425, 429}  # HTTP statuses that stay the same when one asks again
UNSIGNED = ("NoCredentialsError", "PartialCredentialsError")  # of botocore: nobody is logged in
VERSIONS = (
    *("ETag", "etag", "LastModified", "last_modified", "mtime", "generation", "blob_id", "created"),
    *("Last-Modified", "Content-MD5", "Digest"),  # of web servers
)

_written = 0


def is_url(name: str) -> bool:
    """Whether something is the URL of a file, such as `s3://bucket/train.tar`."""
    return bool(URL.match(name))


@dataclass(frozen=True)
class Url:
    """A file by its URL, used as a `Path` where shards and tables are opened."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name.partition("?")[0]).suffix


Place = Path | Url


def open_place(name: str | Place) -> BinaryIO:
    """A file that can be read and sought in, wherever it lies. Raises OSError: missing or unreadable."""
    return RemoteFile(str(name)) if is_url(str(name)) else open_regular(str(name), buffering=0)  # type: ignore[return-value]


def version(place: Place) -> str:
    """What changes when a file does. Raises OSError: it is missing, or cannot be looked at."""
    if isinstance(place, Url):
        return f"{place} {_state(place.url)}"
    state = place.stat()
    return f"{place.resolve()} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def list_urls(pattern: str) -> list[Url]:
    """The files of a pattern with `*`, or in a folder, by name. Raises InputError: none can be listed."""
    try:
        names = _persistently(lambda: _glob(pattern), pattern)
    except DataError:
        raise
    except OSError as error:
        raise InputError(f"data: expected files that can be listed, got {error}") from None
    return [Url(name) for name in sorted(names)]


def _glob(pattern: str) -> list[str]:
    system, path = _system(pattern)
    names = system.glob(path) if "*" in path else system.ls(path, detail=False)
    return [system.unstrip_protocol(name) for name in names]


def cache_folder() -> Path | None:
    """Of this package, if the user has one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))  # ignored if relative, as its specification says
    try:
        return (cache if cache.is_absolute() else Path.home() / ".cache") / "poa"
    except RuntimeError:  # no home
        return None


class RemoteFile(io.RawIOBase):
    """A remote file, read by ranges."""

    def __init__(self, url: str):
        self.url = url
        self.size, self.version = _state(url)
        self.position, self.end = 0, -1

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size)
        content = self._range(self.position, stop) if stop > self.position else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)

    def _range(self, start: int, stop: int) -> bytes:
        first, last = start // BLOCK, (stop - 1) // BLOCK
        blocks: dict[int, bytes] = {}
        for index in range(first, last + 1):
            if index not in blocks:
                kept = self._kept(index)
                blocks |= {index: kept} if kept is not None else self._fetch(index, last)
        content = b"".join(blocks[index] for index in range(first, last + 1))
        return content[start - first * BLOCK : stop - first * BLOCK]

    def _fetch(self, first: int, last: int) -> dict[int, bytes]:
        """Blocks from the store, more of them where the last ones were read before this."""
        ahead = AHEAD if first == self.end else 0
        start, stop = first * BLOCK, min((max(last, first) + 1 + ahead) * BLOCK, self.size)
        content = _persistently(lambda: _ranged(self.url, start, stop), self.url)
        blocks = {first + i: content[i * BLOCK : (i + 1) * BLOCK] for i in range(-(-len(content) // BLOCK))}
        for index, block in blocks.items():
            self._keep(index, block)
        self.end = first + len(blocks)
        return blocks

    def _file(self, index: int) -> Path | None:
        folder = cache_folder()
        key = hashlib.sha256(f"{self.url} {self.version} {index}".encode()).hexdigest()[:40]
        return folder and folder / "blocks" / key[:2] / key[2:]

    def _kept(self, index: int) -> bytes | None:
        file = self._file(index)
        with suppress(OSError, struct.error):
            if file:
                checksum, content = struct.unpack("<I", (kept := file.read_bytes())[:4])[0], kept[4:]
                os.utime(file)
                return content if zlib.crc32(content) == checksum else None
        return None

    def _keep(self, index: int, block: bytes) -> None:
        global _written
        file = self._file(index)
        with suppress(OSError):  # a cache is a convenience
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(secrets.token_hex(8))
                partial.write_bytes(struct.pack("<I", zlib.crc32(block)) + block)
                os.replace(partial, file)  # not synced: a checksum finds what a loss of power tears
                _written += 1
                if _written % SWEEP_EVERY == 0:
                    sweep(file.parent.parent)


def sweep(folder: Path) -> None:
    """Delete the blocks that were used least recently, where all take more than they may."""
    left, files = _capacity(), []
    for file in folder.glob("*/*"):
        with suppress(FileNotFoundError):
            state = file.stat()
            files.append((state.st_mtime_ns, state.st_size, file))
    for _, size, file in sorted(files, reverse=True):
        left -= size
        if left < 0:
            file.unlink(missing_ok=True)


def _capacity() -> float:
    """Bytes that the cache may take."""
    text = os.environ.get("POA_CACHE_GB", "10")
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise InputError(f"POA_CACHE_GB: expected a number in the environment, got {text!r}")
    return float(text) * 1e9


def _system(url: str) -> tuple[Any, str]:
    """The store of this process, and the path in it."""
    try:
        import fsspec  # type: ignore[import-untyped]

        options = {"client_kwargs": {"timeout": _timeout()}} if url.startswith("http") else {}
        system, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"data: expected what reads {url} to be installed, got: {one_line(error)}") from None
    return system, path


def _timeout() -> Any:
    """Of aiohttp, whose own is five minutes for a whole answer."""
    aiohttp = importlib.import_module("aiohttp")
    return aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)


@lru_cache(maxsize=1 << 16)
def _state(url: str) -> tuple[int, str]:
    """Size in bytes and what tells versions of a file apart."""

    def ask() -> dict[str, Any]:
        system, path = _system(url)
        try:
            info: dict[str, Any] = system.info(path)
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec calls whatever fails on a web server a missing file
            if "http" in system.protocol and cause and getattr(cause, "status", None) != 404:
                raise cause from None
            raise
        return info

    info = _persistently(ask, url)
    if info.get("size") is None:
        raise OSError(f"{url}: the server does not say its size")
    return int(info["size"]), json.dumps([info["size"], *(str(info.get(key, "")) for key in VERSIONS)])


def _ranged(url: str, start: int, stop: int) -> bytes:
    system, path = _system(url)
    content: bytes = system.cat_file(path, start=start, end=stop)
    if len(content) > stop - start:
        raise InputError(
            f"data: expected a server that sends ranges of bytes, got {len(content):,} bytes of {url} where "
            f"{stop - start:,} were asked for"
        )
    if len(content) < stop - start:
        raise OSError(f"{len(content):,} bytes came of {stop - start:,}")
    return content


def _persistently(ask: Callable[[], T], url: str) -> T:
    """Ask a store until it answers.

    Raises:
        FileNotFoundError: it says that there is no such file.
        PermissionError: it refuses.
        InputError: a package is missing, or it cannot send ranges of bytes.
        DataError: it does not answer for a minute.
    """
    start, said = time.perf_counter(), False
    for pause in (*PAUSES, None):
        try:
            return ask()
        except (FileNotFoundError, PermissionError) as error:
            raise type(error)(f"{url}: {one_line(error)}") from None
        except InputError:
            raise
        except Exception as error:  # of whatever package reads such URLs
            text = f"{type(error).__name__}: {one_line(error)}"
            if _status(error) in REFUSALS or type(error).__name__ in UNSIGNED:
                raise PermissionError(f"{url}: {text}") from None
            if pause is None or time.perf_counter() - start > PATIENCE:
                raise DataError(f"data: expected an answer about {url}, got for a minute: {text}") from None
            if not said and time.perf_counter() - start > SAID_AFTER:
                log.warning("no answer about %s, asking again for a minute: %s", url, text)
                said = True
        time.sleep(pause)
    raise AssertionError


def _status(error: Exception) -> int | None:
    """The HTTP status that an error of aiohttp or huggingface_hub is about."""
    response = getattr(error, "response", None)
    return getattr(error, "status", None) or getattr(response, "status_code", None)
