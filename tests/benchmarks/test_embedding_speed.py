"""The benchmark of `poa.embed` against timm's loop, tiny."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import embedding
from helpers.collections_of_images import write_shards


def test_both_compute_features_of_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    monkeypatch.setattr(embedding, "TURNS", 1)
    name = str(write_shards(tmp_path / "data", 24))
    embedding.main(name, 21, tmp_path)
    speeds, memory = capsys.readouterr().out.splitlines()[-2:]
    said = re.fullmatch(
        r"21 images: poa.embed [\d,]+ img/s, timm's loop [\d,]+ img/s \(\d+\.\d\dx\); "
        r"largest difference (\d\.\d{3})",
        speeds,
    )
    assert said and 0 < float(said[1]) < 0.1, "timm rounds resized pixels to 8 bits"
    assert re.search(r"grew by \d+\.\d MiB from a tenth of the images to all", memory)
    (tmp_path / "again").mkdir()
    with pytest.raises(AssertionError, match="expected 25 images .*, 1 are missing"):
        embedding.main(name, 25, tmp_path / "again")
