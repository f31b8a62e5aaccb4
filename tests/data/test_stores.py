"""Shards and tables from servers of this machine: a web server that fails, and one of S3; no hub to reach."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest

from helpers import processes
from helpers.collections_of_images import write_parquet, write_shards
from helpers.s3_interrupted import settings, upload
from poa.__main__ import main
from poa.data.sources import DataSplit, open_data
from poa.data.storage import remote
from poa.errors import InputError


class Files(SimpleHTTPRequestHandler):
    """A folder, by ranges of bytes; with a fault in all answers, or in those to the next ranges."""

    always = ""
    faults: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if Files.always == "503":
            self.send_error(503)
            return
        if not part or Files.always == "no ranges":
            super().do_GET()
            return
        fault = Files.faults.pop(0) if Files.faults else ""
        self.close_connection = True
        if fault.isdecimal():
            self.send_error(int(fault))
        else:
            content = Path(self.translate_path(self.path)).read_bytes()[int(part[1]) : int(part[2]) + 1]
            self.send_response(206)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-1] if fault == "cut" else content)

    def do_HEAD(self) -> None:
        if Files.always == "503":
            self.send_error(503)
        else:
            super().do_HEAD()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def slept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that this process waited for stores, without waiting."""
    pauses: list[float] = []
    clock = SimpleNamespace(sleep=pauses.append, perf_counter=lambda: sum(pauses))
    monkeypatch.setattr(remote, "time", clock)
    monkeypatch.setattr(remote, "BLOCK", 1000)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return pauses


@pytest.fixture
def web(tmp_path: Path, slept: list[float]) -> Iterator[str]:
    """The URL of a folder with `shards/` and `tables/`."""
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    write_shards(tmp_path / "shards", 24)
    write_parquet(tmp_path / "tables", 24)
    Files.always, Files.faults = "", []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(tmp_path))) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def assert_same_images(there: DataSplit, disk: DataSplit) -> None:
    assert there.digest() == disk.digest()
    for index in range(len(disk.train)):
        assert (there.train.read(index, 64) == disk.train.read(index, 64)).all()


@pytest.mark.parametrize("name", ["shards", "shards/part-{0000..0002}.tar", "tables/*.parquet"])
def test_images_of_a_web_server_that_fails_now_and_then(
    name: str, web: str, slept: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it fails to send is asked for again, after longer and longer pauses."""
    Files.faults = ["503", "cut", "429", "500"]
    assert_same_images(open_data(f"{web}/{name}", 0.25, 0), open_data(str(tmp_path / name), 0.25, 0))
    assert slept == list(remote.PAUSES[:4])
    (said,) = (record.message for record in caplog.records)
    file = f"{web}/{'tables/part-0000.parquet' if 'tables' in name else 'shards/part-0000.tar'}"
    assert said.startswith(f"no answer about {file}, asking again for a minute: ClientResponseError: 500")


@pytest.mark.parametrize(
    ("name", "always", "code", "message"),
    [
        ("part-{0002..0003}.tar", "", 2, "1 of 2 missing or damaged (WEB/shards/part-0003.tar is missing)"),
        ("none-*.tar", "", 2, "expected files named WEB/shards/none-*.tar, got none"),
        ("nowhere", "", 2, "expected files that can be listed, got WEB/shards/nowhere: "),
        ("part-0000.tar", "403", 2, "WEB/shards/part-0000.tar: ClientResponseError: 403"),
        ("part-0000.tar", "503", 1, "expected an answer about WEB/shards/part-0000.tar, got for a minute: "),
        ("part-0000.tar", "no ranges", 2, "expected a server that sends ranges of bytes, got "),
    ],
)
def test_what_a_web_server_refuses_is_named(
    name: str,
    always: str,
    code: int,
    message: str,
    web: str,
    slept: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At once, but where waiting may help: files of a server that is down are not called missing."""
    Files.always, Files.faults = always, ["403"] * (always == "403")
    assert main(["pretrain", "--check", "--data", f"{web}/shards/{name}"]) == code
    assert message.replace("WEB", web) in capsys.readouterr().err
    assert slept == (list(remote.PAUSES) if code == 1 else [])


def test_a_hub_that_cannot_be_reached(
    slept: list[float], free_port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port}")
    name = "hf://datasets/me/mine/data/*.parquet"
    assert main(["pretrain", "--check", "--data", name]) == 1
    assert f"data: expected an answer about {name}, got for a minute: ConnectError" in capsys.readouterr().err


def need_s3() -> None:
    for name in ("moto", "s3fs"):
        pytest.importorskip(name, reason=f"{name} is not installed")


def test_images_of_an_s3_server(
    tmp_path: Path, free_port: int, slept: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    need_s3()
    from moto.server import ThreadedMotoServer

    for variable, value in settings(free_port).items():
        monkeypatch.setenv(variable, value)
    root, server = write_shards(tmp_path / "shards", 24), ThreadedMotoServer("127.0.0.1", free_port)
    server.start()
    try:
        upload(root)
        for name in ("", "/part-{0000..0002}.tar", "/part-*.tar"):
            assert_same_images(open_data(f"s3://images{name}", 0.25, 0), open_data(str(root), 0.25, 0))
        for name, message in (
            ("images/part-{0002..0003}.tar", "s3://images/part-0003.tar is missing"),
            ("images/none-*.tar", "expected files named s3://images/none-*.tar, got none"),
            ("nothing", "expected files that can be listed, got s3://nothing"),
        ):
            with pytest.raises(InputError, match=re.escape(message)):
                open_data(f"s3://{name}", 0.25, 0)
        for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(variable)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(InputError, match="got s3://images: NoCredentialsError"):
            open_data("s3://images", 0.25, 0)
    finally:
        server.stop()
    assert not slept


def test_a_run_goes_on_after_an_s3_server_was_away() -> None:
    need_s3()
    ((code, printed, errors),) = processes.run(1, str(processes.HELPERS / "s3_interrupted.py"), "1")
    assert code == 0 and "the run is bitwise that from the disk" in printed, errors
