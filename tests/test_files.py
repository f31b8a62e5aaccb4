"""Files are whole or as they were; torn lines are named and cost nothing else."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import stat
from pathlib import Path

import pytest

from helpers.full_disk import full_at
from poa import files
from poa.errors import InputError, SaveError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("position", [0, 1, 4095, 4096, 70_000, 99_999])
def test_a_full_disk_leaves_what_was_there(position: int, tmp_path: Path) -> None:
    """Below, at and beyond the size of a write buffer."""
    path = tmp_path / "a"
    files.write_bytes(path, b"before")
    with full_at(position), pytest.raises(SaveError, match=f"{path} was not written: File too large"):
        files.write_bytes(path, bytes(100_000))
    assert path.read_bytes() == b"before" and names(tmp_path) == ["a"]
    with full_at(100_000):
        files.write_bytes(path, bytes(100_000))
    assert path.read_bytes() == bytes(100_000)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("x")], ids=["Ctrl-C", "error"])
def test_what_ends_a_write_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)), files.writing(tmp_path / "a") as file:
        file.write(b"x")
        raise error
    assert names(tmp_path) == []


def test_an_error_hidden_by_a_library_is_told(tmp_path: Path) -> None:
    with full_at(0), pytest.raises(SaveError, match="File too large"), files.writing(tmp_path / "a") as file:
        try:
            file.write(bytes(100_000))
        except OSError:
            raise RuntimeError("unexpected position") from None
    assert names(tmp_path) == []


@pytest.mark.parametrize("refusal", sorted(files.REFUSED), ids=errno.errorcode.get)
def test_a_folder_that_cannot_be_synced(
    refusal: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, synced = os.fsync, []

    def fsync(handle: int) -> None:
        synced.append(stat.S_ISDIR(os.fstat(handle).st_mode))
        if synced[-1]:
            raise OSError(refusal, os.strerror(refusal))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    files.write_text(tmp_path / "a", "x")
    assert synced == [False, True] and (tmp_path / "a").read_text() == "x"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "there" / "b")
    files.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").is_symlink() and (tmp_path / "there" / "b").read_text() == "x"


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    files.write_text(tmp_path / "a", os.fsdecode(b"\xff"))
    assert (tmp_path / "a").read_text() == "\\udcff"


def test_json_has_numbers_on_a_line_and_text_as_it_is(tmp_path: Path) -> None:
    value = {"mean": [0.5, -1e-9], "k": {"a  b": 1, "c": 2}, "names": ["[1,  2]", "a\n[\n3]"], "none": []}
    files.write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert '"mean": [0.5, -1e-09],\n' in text and '"k": {"a  b": 1, "c": 2},\n' in text


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, Path(os.devnull)):
        with pytest.raises(InputError, match=f"--out: expected a file, got {path}: a folder or device"):
            files.require_writable(path, "--out")
    for path in (tmp_path / "no" / "x", tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match=f"--out: expected a writable file, got {path}: "):
            files.require_writable(path, "--out")
    files.require_writable(tmp_path / "file", "--out")
    assert names(tmp_path) == ["file"]
    with pytest.raises(InputError, match="--out: expected a folder, got .*file: File exists"):
        files.make_folder(tmp_path / "file", "--out")
    with pytest.raises(
        InputError, match="--out: expected a folder, got ~/file: ~ means the home folder to sh"
    ):
        files.make_folder(Path("~/file"), "--out")


ROWS = [{"step": step, "loss": step / 7, "knn": {"16x1": 0.5}} for step in range(1, 6)]


@pytest.mark.parametrize("position", [0, 1, 40, 80, 120])
def test_a_line_is_appended_or_not(position: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    files.append_rows(path, ROWS[:1])
    size = path.stat().st_size
    with full_at(size + position), pytest.raises(SaveError, match="rows.jsonl was not written: File too"):
        files.append_rows(path, ROWS[1:3])
    assert path.stat().st_size == size
    files.append_rows(path, ROWS[1:])
    assert files.read_rows(path, "step", int) == ROWS


DAMAGES = {
    "torn": lambda lines: [*lines[:-1], lines[-1][:20]],
    "torn in the middle": lambda lines: [lines[0], lines[1][:20] + lines[2], *lines[3:]],
    "zeros": lambda lines: [*lines[:2], bytes(50), *lines[2:]],
    "not UTF-8": lambda lines: [*lines[:2], b"\xff\xfe\n", *lines[2:]],
    "a digit": lambda lines: [*lines[:2], lines[2].replace(b"3", b"4", 1), *lines[3:]],
    "no checksum": lambda lines: [*lines[:2], re.sub(rb', "crc32.*?"(?=})', b"", lines[2]), *lines[3:]],
    "a list": lambda lines: [b"[1]\n", *lines],
    "no step": lambda lines: [b'{"loss": 1}\n', *lines],
    "deep": lambda lines: [b"[" * 100_000 + b"\n", *lines],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_lines_are_named(damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    path = tmp_path / "rows.jsonl"
    files.append_rows(path, ROWS)
    path.write_bytes(b"".join(DAMAGES[damage](path.read_bytes().splitlines(keepends=True))))
    kept = files.read_rows(path, "step", int)
    assert [row for row in ROWS if row in kept] == kept and len(kept) >= 3
    assert f"{path}: damaged lines left out: 1, the first is line " in caplog.text
    files.append_rows(path, [{"step": 9}])
    assert files.read_rows(path, "step", int) == [*kept, {"step": 9}]


def test_lines_of_others_and_no_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert files.read_rows(tmp_path / "none", "step", int) == []
    former = {"step": 1, "note": "of a former version"}
    (tmp_path / "rows").write_text(json.dumps(former) + "\n")
    files.append_rows(tmp_path / "rows", ROWS)
    assert files.read_rows(tmp_path / "rows", "step", int) == [former, *ROWS]
    assert not caplog.text


def test_only_regular_files_are_read_and_appended_to(tmp_path: Path) -> None:
    """Of a FIFO a reader would wait for ever."""
    os.mkfifo(fifo := tmp_path / "fifo")
    with pytest.raises(InputError, match=f"x: expected JSON, got {fifo}: not a regular file"):
        files.read_json(fifo, "x: expected JSON")
    with pytest.raises(OSError, match="not a regular file"):
        files.read_rows(fifo, "step", int)
    with pytest.raises(SaveError, match=f"{fifo} was not written: not a regular file"):
        files.append_rows(fifo, ROWS)
