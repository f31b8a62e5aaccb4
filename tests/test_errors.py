"""What goes wrong with files and streams is one line at the command line; a bug shows its trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from helpers import processes
from helpers.full_disk import full_at
from helpers.tiny import ONE_STEP, OVERRIDES
from poa.__main__ import main
from poa.checkpoint import RunFolder
from poa.cli import commands
from poa.config import with_run
from poa.errors import InputError, SaveError, as_input, one_line
from poa.train import pretrain


def of_parquet() -> Exception:
    pyarrow = pytest.importorskip("pyarrow", reason="without pyarrow")
    return pyarrow.ArrowInvalid("no magic bytes")


def of_json() -> Exception:
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads("{")
    return error.value


def of_text() -> Exception:
    with pytest.raises(UnicodeDecodeError) as error:
        b"\xff".decode()
    return error.value


ERRORS: dict[str, tuple[Callable[[], Exception], int, str]] = {
    "file": (lambda: PermissionError(13, "Permission denied", "a.pt"), 2, "a.pt: Permission denied"),
    "worker": (lambda: OSError("Caught OSError in a worker.\nTrace\nOSError: gone\n"), 2, "OSError: gone"),
    "JSON": (of_json, 2, "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    "text": (of_text, 2, "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    "tar": (lambda: tarfile.ReadError("unexpected end of data"), 2, "unexpected end of data"),
    "zip": (lambda: zipfile.BadZipFile("File is not a zip file"), 2, "File is not a zip file"),
    "safetensors": (lambda: safetensors.SafetensorError("header too large"), 2, "header too large"),
    "Parquet": (of_parquet, 2, "no magic bytes"),
    "memory": (lambda: MemoryError(), 1, "out of memory: of the machine"),
    "memory of a tensor": (
        lambda: RuntimeError("[x] err. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes\n@"),
        1,
        "out of memory: can't allocate memory: you tried 9 bytes",
    ),
    "full disk": (
        lambda: SaveError("a was not written: No space left"),
        1,
        "a was not written: No space left",
    ),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_input_are_one_line(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    make, code, line = ERRORS[kind]
    error = make()

    def fails(options: object) -> None:
        raise error

    monkeypatch.setattr(commands, "run_memory", fails)
    assert main(["memory", "--preset", "quickstart"]) == code
    assert capsys.readouterr().err == f"poa: error: {line}\n"  # type: ignore[attr-defined]


@pytest.mark.parametrize("error", [KeyError("a"), ValueError("b"), RuntimeError("c"), TypeError("d")])
def test_bugs_keep_their_trace(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(options: object) -> None:
        raise error

    monkeypatch.setattr(commands, "run_memory", fails)
    with pytest.raises(type(error)):
        main(["memory", "--preset", "quickstart"])


def test_messages_of_errors_without_one() -> None:
    assert one_line(EOFError()) == "EOFError" and one_line(OSError(5, "x")) == "x"
    assert one_line(InputError("in a\nb: no")) == "in a\\nb: no" and one_line(ValueError("a\nb")) == "b"
    with (
        pytest.raises(
            InputError, match="a: expected b, got a damaged or foreign one: KeyError: 'c'"
        ) as error,
        as_input("a: expected b"),
    ):
        raise KeyError("c")
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(InputError, match="^own$"), as_input("a: expected b"):
        raise InputError("own")


OUTPUTS = [
    (["report", "RUN", "--out", "no/x.html"], "report: expected a writable file, got no/x.html"),
    (["report", "RUN", "--out", "x.nonsense"], "report: expected .html or a picture such as .png"),
    (["report", "RUN", "--record", "no/x.json"], "--record: expected a writable file"),
    (["evaluate", "RUN", "--device", "cpu", "--out", "."], "--out: expected a file, got .: a folder"),
    (["evaluate", "RUN", "--device", "cpu", "--plot", "x.nonsense"], "--plot: expected a picture such as"),
    (["evaluate", "RUN", "--device", "cpu", "--plot", "no/x.png"], "--plot: expected a writable file"),
    (["extract", "RUN", "--subnets", "16x1", "--out", "file"], "--out: expected a folder, got file: File"),
    (["pretrain", *OVERRIDES, "--out", "file"], "out: expected a folder, got file: "),
    (["pretrain", *OVERRIDES, "--out", "x" * 300], "File name too long"),
    (["pretrain", *OVERRIDES, "--check", "--out", "file/x"], "out: expected a folder, got file/x: "),
    (["pretrain", *OVERRIDES, "--check", "--out", "RUN"], "out: expected a new folder, got "),
    (["pictures", "RUN", "--images", "file", "--out", "RUN/config.json"], "in .html or .png, got "),
    (
        ["embed", "RUN", "digits", "--out", "x.npz", "--query", "file", "--page", "RUN/config.json"],
        "--page: expected a name ending in .html, got ",
    ),
    (["data", "check", "digits", "--run", "RUN", "--channels", "1"], "--channels: expected the 3 of "),
    (["embed", "file", "digits", "--out", "x.npz", "--step", "1"], "file: expected a run with a step or"),
    (["report", "no"], "run: expected a run folder, got no: no config.json"),
    (["report", "RUN", "--record", "RUN/config.json"], "--record: expected a new file, or an older one of"),
    (["report", "RUN", "--record", "x", "--out", "y.html"], "expected one of --out and --record, got both"),
    (["evaluate", "RUN", "--device", "cpu", "--out", "RUN/config.json"], "--out: expected a new file, or"),
    (["evaluate", "RUN", "--device", "cpu", "--out", "file"], "--out: expected a new file, or an older one"),
    (["subnets", "RUN", "method.seed=1"], "subnets: expected a run, or --preset and KEY=VALUE, got both"),
    (["pretrain", "--resume", "file"], "run: expected a run folder, got file: no config.json"),
    (["pretrain", "--out", "new", "--config", "."], "config: expected a JSON file, got .: Is a directory"),
]


@pytest.mark.parametrize(
    ("arguments", "message"),
    OUTPUTS,
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_where_nothing_can_be_written(
    arguments: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said before an image is scored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("poa.evaluate.runs.evaluate_subnets", None)
    Path("file").write_text("x")
    assert main([word.replace("RUN", str(trained)) for word in arguments]) == 2
    assert message in (line := capsys.readouterr().err) and line.count("\n") == 1
    assert os.listdir() == ["file"] and not list(trained.rglob("*.partial"))


@pytest.mark.parametrize("position", [0, 300, 1500, 2000, 30_000])
def test_a_full_disk_under_a_whole_run(
    position: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the configuration, the metrics or a checkpoint; then it goes on by itself."""
    out = tmp_path / "run"
    command = ["pretrain", "--out", str(out), *OVERRIDES]
    with full_at(position):
        assert main(command) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(out.rglob("*.partial"))
    assert main([*command, "--auto-resume"]) == 0
    assert [row["step"] for row in RunFolder(out).rows()] == [1, 2, 3, 4, 5, 6]


def test_an_extract_on_a_full_disk(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["extract", str(trained), "--subnets", "all", "--out", str(tmp_path / "models")]
    with full_at(1500):
        assert main(command) == 1
    assert "vit-16x1/config.json was not written: File too large\n" in capsys.readouterr().err
    assert main(command) == 0
    assert len(list((tmp_path / "models").rglob("*.*"))) == 12


@pytest.mark.parametrize("command", ["run | true", "run >&-", "run | head -n 1"])
def test_a_run_outlives_its_standard_output(command: str, tmp_path: Path) -> None:
    options = " ".join([*OVERRIDES, *ONE_STEP])
    run = f"({sys.executable} -m poa pretrain --out run {options}; echo $? > code)"
    done = subprocess.run(command.replace("run", run, 1), shell=True, cwd=tmp_path, stderr=-1, text=True)
    assert (tmp_path / "code").read_text() == "0\n", done.stderr
    assert "Traceback" not in done.stderr and RunFolder(tmp_path / "run").newest().step == 1


def test_a_run_in_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    """Which Linux allows: bytes that are not UTF-8."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/r\xff")
    for command in (
        ["pretrain", "--out", out, *OVERRIDES, *ONE_STEP],
        ["report", out],
        ["extract", out, "--subnets", "16x1"],
    ):
        ((_, printed, _),) = processes.run(1, "-m", "poa", *command)
        assert "r\\udcff" in printed


def test_a_resume_with_torn_metrics(trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = Path(shutil.copytree(trained, tmp_path / "run"))
    folder = RunFolder(out)
    before = folder.rows()
    lines = folder.metrics.read_bytes().splitlines(keepends=True)
    folder.metrics.write_bytes(b"".join([*lines[:2], lines[2][:30], *lines[3:]]))
    pretrain(with_run(folder.config()), out, resume=True)
    assert "damaged lines left out: 1, the first is line 3" in caplog.text
    assert folder.rows() == before[:2] + before[4:]
    caplog.clear()
    folder.rows()
    assert not caplog.text
