"""Shards and tables by URL: the same run as from the disk, also where the store fails for a while."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from helpers.collections_of_images import write_parquet, write_shards
from helpers.commands import fails
from helpers.run_folders import assert_same, newest
from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.data.sources import open_data
from poa.data.storage import remote
from poa.errors import DataError, InputError
from poa.train import pretrain


class Store(LocalFileSystem):
    """A store whose objects lie in a folder, and which fails as often as a test wants."""

    protocol = "store"
    failures = 0
    asked: list[tuple[str, int, int]] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(super()._strip_protocol(path.removeprefix("store://")))

    def unstrip_protocol(self, name: str) -> str:
        return f"store://{name}"

    def cat_file(self, path: str, start: int = 0, end: int = 0, **rest: Any) -> bytes:
        Store.asked.append((path, start, end))
        if Store.failures:
            Store.failures -= 1
            raise ConnectionError("the server is gone")
        return bytes(super().cat_file(path, start, end))


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Store]:
    fsspec.register_implementation("store", Store, clobber=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0,) * 4)
    monkeypatch.setattr(remote, "BLOCK", 1000)
    monkeypatch.setattr(remote, "SWEEP_EVERY", 4)
    Store.failures, Store.asked = 0, []
    return Store


@pytest.mark.parametrize(
    ("write", "names"),
    [(write_shards, ["", "/part-{0000..0002}.tar", "/part-*.tar"]), (write_parquet, ["", "/*.parquet"])],
    ids=["tar", "Parquet"],
)
def test_images_by_url_are_those_of_the_disk(write: Any, names: list[str], tmp_path: Path) -> None:
    root = write(tmp_path / "data", 24)
    disk = open_data(str(root), 0.25, 0)
    for name in names:
        there = open_data(f"store://{root}{name}", 0.25, 0)
        assert there.digest() == disk.digest() and there.train.name(3) == f"store://{disk.train.name(3)}"
        assert (there.train.read(3, 64) == disk.train.read(3, 64)).all()


def test_a_run_goes_on_after_the_store_failed(tmp_path: Path, store: type[Store]) -> None:
    """Every byte is fetched once while the cache has room for all."""
    root = write_shards(tmp_path / "data", 24)

    def fails_for_a_while(row: dict[str, Any]) -> None:
        store.failures = 3

    for source, out in ((str(root), "disk"), (f"store://{root}", "there")):
        config = tiny_config(f"data.source={source}", "performance.workers=0", "epochs=1.5")
        pretrain(config, tmp_path / out, callbacks=[fails_for_a_while])
    disk, there = (newest(tmp_path / out) for out in ("disk", "there"))
    del disk["config"], there["config"]
    assert_same(disk, there)
    assert any(store.asked.count(part) == 4 for part in store.asked), "it was asked again"
    places = {part: store.asked.count(part) for part in store.asked}
    fetched = sorted((path, start, end) for path, start, end in places)
    assert all(a[0] != b[0] or a[2] <= b[1] for a, b in zip(fetched, fetched[1:], strict=False))


def test_the_cache_stays_within_its_bound(
    tmp_path: Path, store: type[Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_shards(tmp_path / "data", 24)
    monkeypatch.setenv("POA_CACHE_GB", "0.000009")
    data = open_data(f"store://{root}", 0.0, 0).train
    for _ in range(2):
        for index in range(len(data)):
            assert data.read(index, 64).shape[2] == 3
        blocks = [path.stat().st_size for path in (tmp_path / "cache/poa/blocks").glob("*/*")]
        assert sum(blocks) <= 9000 + remote.SWEEP_EVERY * (remote.BLOCK + 4)
    monkeypatch.setenv("POA_CACHE_GB", "much")
    with pytest.raises(InputError, match="POA_CACHE_GB: expected a number in the environment, got 'much'"):
        remote.sweep(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("store://ROOT/part-{0002..0003}.tar", "store://ROOT/part-0003.tar is missing"),
        ("store://ROOT/none-*.tar", "expected files named store://ROOT/none-*.tar, got none"),
        ("store://ROOT/nowhere", "expected files that can be listed, got store://ROOT/nowhere: "),
        ("store://ROOT/x", "expected .tar shards or .parquet tables in store://ROOT/x, got 1 other"),
        ("nonsense://ROOT/a.tar", "expected what reads nonsense://ROOT/a.tar to be installed, got: Protocol"),
    ],
)
def test_what_is_missing_is_named(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_shards(tmp_path / "data", 24)
    (root / "x").mkdir()
    (root / "x" / "notes.txt").write_text("")
    line = fails(capsys, "pretrain", "--check", "--data", name.replace("ROOT", str(root)))
    assert message.replace("ROOT", str(root)) in line


def test_a_store_that_is_gone_ends_the_run_and_no_image_is_replaced(
    tmp_path: Path, store: type[Store], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, message = write_shards(tmp_path / "data", 24), "ConnectionError: the server is gone"
    data = open_data(f"store://{root}", 0.25, 0)
    store.failures = 1000
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    with pytest.raises(DataError, match=f"part-0000.tar, got for a minute: {message}"):
        data.train.read(0, 64)
    assert main(["pretrain", "--check", "--data", f"store://{root}"]) == 1
    assert f"store://{root}/part-0000.tar, got for a minute: {message}" in capsys.readouterr().err
