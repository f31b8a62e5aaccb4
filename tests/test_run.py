"""Runs from Python: datasets as objects, options as keywords, callbacks, resuming, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

import poa
from helpers.run_folders import assert_same_run
from helpers.tiny import OVERRIDES
from poa.data.layout import find_datasets
from poa.data.sources import DataSplit, open_data
from poa.errors import InputError
from poa.options import describe
from poa.presets import preset

TINY = dict(assignment.split("=", 1) for assignment in OVERRIDES)
DRAW = np.random.default_rng(0)
PIXELS = DRAW.integers(0, 256, (24, 20, 16, 3), dtype=np.uint8)
CHANNELS_FIRST = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())


class Mine(Dataset[Any]):
    """What a user writes."""

    def __init__(self, make: Any, labels: Any = None):
        self.make, self.labels = make, labels

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> Any:
        image = self.make(index)
        return image if self.labels is None else (image, self.labels[index])


class Columns(Mine):
    """As Hugging Face's datasets answer."""

    classes = type("ClassLabel", (), {"names": ["cat", "dog"]})()
    features = {"img": None, "label": classes}  # noqa: RUF012

    def __getitem__(self, index: int | str) -> Any:
        if isinstance(index, str):
            return [n % 2 for n in range(24)]
        return {"img": Image.fromarray(PIXELS[index]), "label": index % 2}


def opened(data: Any) -> DataSplit:
    name, openers = find_datasets(data)
    return open_data(name, 0.25, 0, openers=openers)


@pytest.mark.parametrize(
    "make",
    [lambda i: Image.fromarray(PIXELS[i]), lambda i: PIXELS[i], lambda i: CHANNELS_FIRST[i]],
    ids=["Pillow", "array", "tensor"],
)
def test_images_of_every_kind_are_the_same(make: Any) -> None:
    split = opened(Mine(make))
    assert split.test is None and split.train.labels is None
    assert np.array_equal(split.train.read(3, 32), PIXELS[3])
    assert max(split.train.read(3, 10).shape) == 10
    assert split.digest() == opened(Mine(lambda i: PIXELS[i])).digest()
    assert split.digest() != opened(Mine(lambda i: PIXELS[i] ^ 1)).digest()


def test_labels_are_those_of_targets_columns_subsets_or_samples() -> None:
    labels = np.arange(24) % 3
    of_samples = opened(TensorDataset(CHANNELS_FIRST, torch.from_numpy(labels)))
    assert of_samples.labels_from == "samples" and of_samples.train.classes == ("0", "1", "2")
    with_targets = Mine(lambda i: PIXELS[i])
    with_targets.targets, with_targets.classes = labels.tolist(), ["a", "b", "c"]  # type: ignore[attr-defined]
    part = opened(Subset(with_targets, range(12)))
    assert part.train.classes == ("a", "b", "c") and part.test is not None
    assert len(part.train) + len(part.test) == 12
    splits = opened({"train": Columns(None), "test": Columns(None)})
    assert splits.train.classes == ("cat", "dog") and splits.labels_from == "column 'label'"
    assert splits.test is not None and splits.test.labels.tolist() == [0, 1] * 12
    boxes = opened(Mine(lambda i: PIXELS[i], [{"box": 1}] * 24))
    assert boxes.train.labels is None and "labels that are no numbers or names" in str(boxes.left_out)


def test_datasets_of_hugging_face(tmp_path: Path) -> None:
    """Alone, as splits, and of decoding processes; those that stream have no positions."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    columns = {"image": list(map(Image.fromarray, PIXELS)), "label": [n % 2 for n in range(24)]}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    splits = opened(datasets.DatasetDict(train=dataset, validation=dataset.select(range(4))))
    assert splits.train.classes == ("cat", "dog") and splits.labels_from == "column 'label'"
    assert splits.test is not None and splits.test.labels.tolist() == [0, 1, 0, 1]
    assert all(np.array_equal(splits.train.read(n, 32), PIXELS[n]) for n in range(24))
    with pytest.raises(InputError, match="with __len__ and __getitem__, got IterableDataset"):
        opened(dataset.to_iterable_dataset())
    run = poa.pretrain(dataset, out=tmp_path / "run", **TINY | {"epochs": 1.5, "workers": 1})
    assert "knn" in run.metrics[-1] or run.evaluate("16x1").scores
    assert run.embed("16x1", workers=0).names[1] == "Dataset[1]"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([1]), "expected a dataset with __len__ and __getitem__, got list_iterator"),
        (TensorDataset(CHANNELS_FIRST[:0]), "with images, got an empty TensorDataset"),
        (Mine(lambda i: DRAW.bytes(3) and DRAW.integers(0, 9, (8, 8), dtype=np.uint8)), "without random"),
        ({"test": Mine(None)}, "expected a split called train, got test"),
    ],
    ids=["iterable", "empty", "random", "no split"],
)
def test_wrong_datasets(data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        opened(data)


def test_a_dataset_of_other_pixels_is_refused(tmp_path: Path) -> None:
    floats = Mine(lambda i: CHANNELS_FIRST[i] / 255)
    with pytest.raises(InputError, match=r"Mine\[0\]: expected uint8 pixels .*, got float32 \[3, 20, 16\]"):
        poa.pretrain(floats, out=tmp_path / "run", **TINY)
    assert not (tmp_path / "run").exists()


def test_a_run_on_a_dataset_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted one ends as one that was not; its rows go to the callbacks; it shows itself."""
    labels = torch.arange(24) % 2
    data, rows = TensorDataset(CHANNELS_FIRST, labels), []
    options = TINY | {"evaluate_every": 3, "method.batch_size": 4, "workers": 0}
    whole = poa.pretrain(data, out=tmp_path / "whole", callbacks=[rows.append], **options)
    assert rows == whole.metrics and [row["step"] for row in rows if "knn" in row] == [0, 3, 6]

    def stops(row: dict[str, Any]) -> None:
        if row["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        poa.pretrain(data, out=tmp_path / "parts", callbacks=[stops], **options)
    again = poa.Run(tmp_path / "parts")
    with pytest.raises(InputError, match="expected the dataset TensorDataset as an object"):
        again.resume()
    capsys.readouterr()
    again = again.resume(data)
    assert "names or labels" not in capsys.readouterr().err
    assert_same_run(tmp_path / "whole", tmp_path / "parts")

    report = again.evaluate("32x2")
    assert "<td>32x2</td>" in report._repr_html_() and "k=20" in repr(report) and report.plot().axes
    table = again.models()
    assert "teacher of step 6, dataset:TensorDataset: k=20" in repr(table) and len(table) == 4
    assert "loss" in repr(again) and "<table>" in again._repr_html_() and len(again.plot().axes) == 15
    assert again.subnet("16x1")(Image.fromarray(PIXELS[0])).shape == (1, 16)


@pytest.mark.parametrize("name", ["quickstart", "quickstart-swin", "quickstart-resnet"])
def test_every_option_is_named_by_its_last_part(name: str) -> None:
    last = [key.rpartition(".")[2] for key, *_ in describe(preset(name))]
    assert len(set(last)) == len(last)


def test_scores_of_other_images_of_a_name_are_replaced(run: Path) -> None:
    """Datasets of as many images may be others."""
    labels = torch.arange(len(PIXELS)) % 2
    first, second = (TensorDataset(CHANNELS_FIRST, y) for y in (labels, 1 - labels))
    assert poa.Run(run, first).evaluate("16x1").files == poa.Run(run, second).evaluate("16x2").files
    (file,) = poa.Run(run, second).evaluate("32x1").files
    assert [row["subnet"] for row in json.loads(file.read_text())["subnets"]] == ["16x2", "32x1"]
    for wrong in (poa.Run(run).subnet, poa.Run(run).evaluate):
        with pytest.raises(InputError, match="branch: expected teacher or student, got 'ema'"):
            wrong("16x1", branch="ema")


def test_wrong_keywords(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="out: expected the folder of the run, got None"):
        poa.pretrain("digits", "quickstart", out=None)
    with pytest.raises(InputError, match="unknown option 'epoch'; did you mean 'method.optim.epoch_steps'"):
        poa.pretrain(out=tmp_path / "run", epoch=3)
    with pytest.raises(InputError, match="crops.global_scale: expected float,float, got 1"):
        poa.pretrain(out=tmp_path / "run", global_scale=1)
    assert not (tmp_path / "run").exists()
