"""The report takes measured rows only, and writes nothing that is not in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, results

PLACE = {
    "device": "cuda",
    "gpu": "NVIDIA H200",
    "driver": "580.1",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "commit": "abc1234",
    "date": "2026-11-23",
}


def row(op: str, provider: str, p50: float, **more: Any) -> dict[str, Any]:
    base = {"op": op, "provider": provider, "mode": "fwd+bwd", "shape": "102x197 640", "dtype": "bfloat16"}
    times = {
        "p20": p50,
        "p50": p50,
        "p80": p50,
        "gb_per_s": 1000.0,
        "tflop_per_s": 50.0,
        "share_of_floor": 0.5,
    }
    return base | times | PLACE | more


STEP = {"mode": "mix", "batch": 64, "images_per_s": 300.0, "mfu": 0.5, "peak_mib": 30720.0}
ROWS = [
    row("mlp", "ours", 100.0),
    row("mlp", "naive", 210.0),
    row("mlp", "compiled", 180.0),
    row("step", "ours", 2e5, **STEP),
    row("step", "official", 4e5, **(STEP | {"images_per_s": 150.0})),
    row("step", "official", 4e5, **(STEP | {"images_per_s": 170.0, "mode": "640x18"})),
    row("step", "compiled", 4e5, **(STEP | {"images_per_s": 200.0, "mode": "640x18"})),
    row("network", "ours", 1e4, shape="swin 96x2-2-6-2 64x224px", images_per_s=6400.0),
    row("network", "timm", 2e4, shape="swin 96x2-2-6-2 64x224px", images_per_s=3200.0, mode="fwd"),
    row("quality", "ours", 1.0, mode="64x4", seconds=10.0, images=640, accuracy=0.9, k=20),
]


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    return path


def written(readme: Path, rows: list[dict[str, Any]]) -> str:
    path = readme.parent / "rows.jsonl"
    path.unlink(missing_ok=True)
    results.append(path, rows)
    report.write([path], readme, readme.parent / "plots")
    return readme.read_text()


def test_tables_and_plots_from_rows(readme: Path) -> None:
    text = written(readme, ROWS)
    assert text.startswith(f"before\n{report.BEGIN}")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| mlp | 102x197 640 | 100 | compiled 180 | 1.80x | 50% |" in text
    assert "| official | 102x197 640 | 150 | 50.0% | 30720 | 50% | 640x18 170 |" in text
    assert "| compiled | 102x197 640 |  |  |  |  | 640x18 200 |" in text
    assert "| ours | swin 96x2-2-6-2 64x224px |  | 6400 |" in text
    assert "| timm | swin 96x2-2-6-2 64x224px | 3200 |  |" in text
    assert "90.0%" in text
    assert "commit abc1234" in text
    assert sorted(p.name for p in (readme.parent / "plots").iterdir()) == [
        "quality.png",
        "roofline.png",
        "step.png",
    ]


def test_the_newest_row_counts(readme: Path) -> None:
    text = written(readme, [*ROWS, row("mlp", "ours", 90.0)])
    assert "| mlp | 102x197 640 | 90 |" in text


def test_times_in_which_launches_show_say_so(readme: Path) -> None:
    text = written(readme, [row("mlp", "ours", 90.0, unhidden=0.1), row("mlp", "naive", 99.0, unhidden=1.0)])
    assert "| 90 | naive 99 with launches | 1.10x |" in text


def test_no_rows(readme: Path) -> None:
    report.write([], readme, readme.parent / "plots")
    text = readme.read_text()
    assert "| NVIDIA H200 | 300 | 340 | 365 | 425 | not measured |" in text
    assert "| NVIDIA H100 80GB HBM3 | 275 | 310 | 335 | 394 | not measured |" in text
    assert f"{report.NOTHING}\n\n{report.END}" in text


def test_a_step_of_ours_stands_beside_its_goal(readme: Path) -> None:
    mine = row("step", "ours", 2e5, **STEP | {"shape": "1024x24 64 images"})
    others = [mine | {"provider": "naive"}, mine | {"shape": "1024x24 32 images"}, mine | {"mode": "640x18"}]
    slower = [other | {"images_per_s": 100.0} for other in others]
    text = written(readme, [mine, *slower])
    assert "| NVIDIA H200 | 300 | 340 | 365 | 425 | 300 |" in text
    assert "| NVIDIA H100 80GB HBM3 | 275 | 310 | 335 | 394 | not measured |" in text


@pytest.mark.parametrize(
    "change", [{"device": "cpu"}, {"gpu": "none"}, {"gpu": "fake"}, {"driver": "unknown"}], ids=str
)
def test_rows_of_a_device_that_is_no_gpu_are_refused(change: dict[str, str], readme: Path) -> None:
    before = readme.read_text()
    with pytest.raises(ValueError, match="expected rows measured on an NVIDIA GPU, got device"):
        written(readme, [*ROWS, row("mlp", "ours", 1.0, **change)])
    assert readme.read_text() == before


def test_wrong_files(readme: Path) -> None:
    with pytest.raises(ValueError, match="expected a row with op"):
        written(readme, [{"provider": "ours"}])
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="expected the markers"):
        written(readme, ROWS)


def test_the_readme_has_the_markers_once() -> None:
    text = report.README.read_text()
    assert text.count(report.BEGIN) == text.count(report.END) == 1
