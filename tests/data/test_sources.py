"""Folders of images and the built-in digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.config import with_data
from poa.data.decode import ImageError
from poa.data.sources import ImageSource, open_data
from poa.data.storage import read_folder
from poa.distributed import World
from poa.errors import InputError
from poa.images import open_on_ranks


def picture(path: Path, size: tuple[int, int] = (12, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color=tuple([60] * len(Image.new(mode, (1, 1)).getbands()))).save(path)
    return path


def class_folders(root: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        for i in range(count):
            picture(root / name / f"{i}.png")
    return root


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", {"b": 8, "a": 40, "single": 1})
    picture(root / "a" / "deeper" / "x.JPG")
    picture(root / ".hidden" / "x.png")
    picture(root / "b" / "._x.png")
    (root / "b" / "notes.txt").write_text("")
    (root / "empty").mkdir()
    split = open_data(str(root), 0.25, seed=0)
    assert split.train.classes == ("a", "b", "single")
    assert np.bincount(split.test.labels).tolist() == [10, 2]
    assert np.bincount(split.train.labels).tolist() == [31, 6, 1]
    assert not set(split.train.positions) & set(split.test.positions)
    again, other = (open_data(str(root), 0.25, seed=seed) for seed in (0, 1))
    assert np.array_equal(again.test.positions, split.test.positions)
    assert not np.array_equal(other.test.positions, split.test.positions)


@pytest.mark.parametrize("test", ["val", "test"])
def test_given_test_folder(test: str, tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 3, "b": 2})
    class_folders(tmp_path / test, {"a": 1, "b": 1})
    split = open_data(str(tmp_path), 0.25, seed=0)
    assert (len(split.train), len(split.test)) == (5, 2)
    class_folders(tmp_path / test, {"c": 1})
    with pytest.raises(InputError, match="got 1 of test images alone: c"):
        open_data(str(tmp_path), 0.25, seed=0)


def test_held_out_images_whose_class_is_not_trained_on_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    class_folders(tmp_path / "train", {"1": 3, "2": 2})
    class_folders(tmp_path / "val", {"1": 1, "2": 1})
    assert open_data(str(tmp_path), 0.25, seed=0).untaught() == ""
    class_folders(tmp_path / "val", {"3": 4, "4": 1, "5": 1, "60": 1})
    split = open_data(str(tmp_path), 0.25, seed=0)
    counted = "7 of 9 held-out images are of classes without training images (3, 4, 5, ...)"
    assert split.untaught() == counted
    open_on_ranks(with_data(tiny_config(), str(tmp_path)), World(0, 1, torch.device("cpu")))
    assert caplog.messages == [f"data: {counted}"]
    assert main(["data", "check", str(tmp_path)]) == 0
    assert f"untaught: {counted}\n" in capsys.readouterr().out


def test_train_folder_without_a_test_folder(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 8, "b": 4})
    split = open_data(str(tmp_path), 0.25, seed=0)
    assert split.train.classes == ("a", "b")
    assert (len(split.train), len(split.test)) == (9, 3)


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    split = open_data(str(tmp_path), 0.25, seed=0)
    assert len(split.train) == 3
    assert split.train.labels is None
    assert split.test is None


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    ending = ".jpg" if mode == "CMYK" else ".png"
    source = ImageSource.whole(read_folder(picture(tmp_path / f"x{ending}", mode=mode).parent))
    image = source.read(0, canvas=32)
    assert image.shape == (8, 12, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("ending", [".png", ".jpg"])
def test_large_images_are_shrunk_to_the_canvas(ending: str, tmp_path: Path) -> None:
    source = ImageSource.whole(read_folder(picture(tmp_path / f"x{ending}", size=(900, 300)).parent))
    assert source.read(0, canvas=64).shape == (21, 64, 3)
    assert source.read(0, canvas=1000).shape == (300, 900, 3)


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"], ids=["empty", "text", "truncated"])
def test_damaged_files_are_named(content: bytes | str, tmp_path: Path) -> None:
    path = picture(tmp_path / "broken.png", size=(200, 200))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(ImageError, match=r"broken.png: "):
        ImageSource.whole(read_folder(tmp_path)).read(0, canvas=32)


def test_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder or file"):
        open_data(str(tmp_path / "nowhere"), 0.25, seed=0)
    with pytest.raises(InputError, match="expected images .* got none"):
        open_data(str(tmp_path), 0.25, seed=0)


def test_digits() -> None:
    split = open_data("digits", 0.25, seed=0)
    assert len(split.train) + len(split.test) == 1797
    assert abs(len(split.test) - 449) < 5
    image = split.train.read(0, canvas=32)
    assert image.shape == (32, 32, 3)
    assert image.max() > 200
    assert (image[..., 0] == image[..., 2]).all()
