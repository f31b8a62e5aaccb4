"""Weighted k-NN, and scores of many subnets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.tiny import tiny_config
from poa.data.sources import open_data
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate import Origin, evaluate_subnets, knn_accuracy, knn_of_subnets
from poa.step import initial_network

ALONE = World(0, 1, torch.device("cpu"))


def clusters(count: int, spread: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return torch.eye(4)[labels] + spread * torch.randn(count, 4, generator=generator), labels


def naive(bank: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int) -> float:
    hits = 0
    for query, label in zip(queries.double(), truth, strict=True):
        similarity = torch.nn.functional.cosine_similarity(bank.double(), query[None])
        votes = [0.0] * 4
        for i in sorted(range(len(bank)), key=lambda i: -similarity[i])[:k]:
            votes[int(labels[i])] += float(np.exp(float(similarity[i]) / 0.07))
        hits += int(np.argmax(votes)) == int(label)
    return hits / len(queries)


@pytest.mark.parametrize("chunk", [1 << 17, 7], ids=["one-chunk", "many-chunks"])
def test_accuracy_equals_the_written_out_vote(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("poa.evaluate.knn.CHUNK", chunk)
    monkeypatch.setattr("poa.evaluate.knn.BANK_CHUNK", chunk)
    bank, queries = clusters(60, 0.8, seed=0), clusters(25, 0.8, seed=1)
    got = knn_accuracy(*bank, *queries, neighbours=(1, 5, 20, 500))
    assert got == {k: naive(*bank, *queries, k) for k in (1, 5, 20, 500)}
    assert 0.4 < got[5] < 1


def test_separated_classes_are_found() -> None:
    got = knn_accuracy(*clusters(60, 0.01, seed=0), *clusters(25, 0.01, seed=1), neighbours=(5,))
    assert got == {5: 1.0}


def test_wrong_input() -> None:
    bank, queries = clusters(6, 0.1, seed=0), clusters(3, 0.1, seed=1)
    with pytest.raises(InputError, match="expected features, got 0 in the bank"):
        knn_accuracy(bank[0][:0], bank[1][:0], *queries)
    with pytest.raises(InputError, match="expected a label per feature, got 5 for 6"):
        knn_accuracy(bank[0], bank[1][:5], *queries)


def test_many_subnets_at_once_equal_one_at_a_time(tmp_path: Path) -> None:
    config = tiny_config()
    data, backbone = open_data("digits", 0.25, 0), initial_network(config).backbone
    subnets = list(backbone.space)
    together = knn_of_subnets(backbone, subnets, data, config, ALONE, limit=200)
    apart = [knn_of_subnets(backbone, [s], data, config, ALONE, limit=200)[0] for s in subnets]
    assert together == apart
    assert len({tuple(scores.values()) for scores in together}) > 1
    origin = Origin("runs/a", "teacher", 6, "0.1.0")
    (report,) = evaluate_subnets(backbone, subnets[:2], data, config, ALONE, origin, initial=backbone)
    values = report.scores[0].values
    assert values["knn"] == values["knn_init"]
    assert report.settings["bank_images"] == len(data.train)
    about, sizes, protocol, titles, *_ = report.table().splitlines()
    assert about == "runs/a: teacher of step 6"
    assert sizes.startswith("digits: 1,3")
    assert protocol.startswith("knn: weighted k-NN, cosine similarity, class token;")
    assert protocol.endswith("; temperature 0.07")
    assert titles.split()[3:] == ["k=10", "k=20", "k=100", "k=200", "k=20", "init"]
    assert report.table().count("\n") == 5
    report.write(tmp_path / "report.json")
    rows = json.loads((tmp_path / "report.json").read_text())["subnets"]
    assert rows[0]["knn"]["20"] == values["knn"][20]
