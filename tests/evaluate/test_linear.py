"""Linear classifiers on frozen features, and features by several processes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from helpers import processes
from helpers.tiny import OVERRIDES, tiny_config
from poa.__main__ import main
from poa.data.sources import open_data
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate import features as features_module
from poa.evaluate import linear as linear_module
from poa.evaluate import sweep as sweep_module
from poa.evaluate.features import extract_features
from poa.evaluate.knn import class_token
from poa.evaluate.linear import BLOCKS, MOMENTUM, RATES, linear_accuracy, probe_input
from poa.evaluate.sweep import knn_of_subnets
from poa.step import initial_network
from poa.subnets import Subnet

ALONE = World(0, 1, torch.device("cpu"))
CPU = ALONE.device
WIDTH = 3


def clusters(count: int, seed: int, columns: slice, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    """Five blocks of features, of which only some columns tell the four classes."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=draw)
    x = 0.1 * torch.randn(count, 5 * WIDTH, generator=draw)
    centers = torch.randn(4, columns.stop - columns.start, generator=torch.Generator().manual_seed(9))
    x[:, columns] += centers[labels]
    return x.unflatten(1, (5, WIDTH)), labels


@pytest.mark.parametrize(
    ("columns", "blocks", "mean_patch"),
    [(slice(0, 9), 4, False), (slice(9, 12), 1, False), (slice(12, 15), 1, True)],
    ids=["earlier-blocks", "last-block", "mean-patch"],
)
def test_the_input_that_tells_the_classes_is_found(columns: slice, blocks: int, mean_patch: bool) -> None:
    scores = linear_accuracy(*clusters(400, 0, columns), *clusters(200, 1, columns), CPU, steps=200)
    assert len(scores) == len(RATES) * 4
    assert scores[0].accuracy > 0.95
    best = {(s.blocks, s.mean_patch): s.accuracy for s in reversed(scores)}
    assert best[blocks, mean_patch] > 0.95
    if blocks == 4:
        assert best[1, False] < 0.5 and best[1, True] < 0.5
    if mean_patch:
        assert best[1, False] < 0.5 and best[4, False] < 0.5 and best[4, True] > 0.9


def test_a_step_is_that_of_sgd() -> None:
    """Of one rate, written with autograd and torch.optim."""
    (part, *_) = linear_module._inputs(4, WIDTH)
    probe = linear_module._Probe(part, 5, CPU, seed=0)
    x, y = torch.randn(32, 5 * WIDTH), torch.randint(5, (32,))
    which = 9
    head = nn.Linear(WIDTH, 5)
    with torch.no_grad():
        head.weight.copy_(probe.weight.view(len(RATES), 5, WIDTH)[which])
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=RATES[which] * 4, momentum=MOMENTUM)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x[:, part.columns]), y).backward()
        optimizer.step()
        probe.step(x, y, 1.0)
    torch.testing.assert_close(probe.weight.view(len(RATES), 5, WIDTH)[which], head.weight.detach())
    torch.testing.assert_close(probe.bias.view(len(RATES), 5)[which], head.bias.detach())


def test_wrong_input() -> None:
    x, y = clusters(10, 0, slice(0, 3))
    with pytest.raises(InputError, match="a label per query feature, got 9 for 10"):
        linear_accuracy(x, y, x, y[:9], CPU)
    with pytest.raises(InputError, match="a label per train feature, got 0 for 0"):
        linear_accuracy(x[:0], y[:0], x, y, CPU)


def test_inputs_of_a_backbone() -> None:
    """Class tokens of the last blocks, in order, each normed, then the mean of the normed patches."""
    backbone = initial_network(tiny_config("method.backbone.max_depth=6")).backbone
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        for subnet in (Subnet(32, 6), Subnet(16, 2)):
            got = probe_input(backbone, subnet)(images).float()
            blocks = min(max(BLOCKS), subnet.depth)
            assert got.shape == (2, blocks + 1, subnet.width)
            whole = backbone([images], subnet)[0]
            cut = backbone.last_blocks(images, subnet, 2)[0].cls
            expected = torch.stack([cut, whole.cls, whole.patches.mean(1)], 1)
            torch.testing.assert_close(got[:, -3:], expected, atol=4e-3, rtol=0)


def test_many_features_go_to_a_file_and_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    data, backbone = open_data("digits", 0.25, 0), initial_network(config).backbone
    subnets = list(backbone.space)
    together = knn_of_subnets(backbone, subnets, data, config, ALONE, limit=100)
    monkeypatch.setattr(features_module, "MEMORY", 1000)
    monkeypatch.setattr(sweep_module, "MEMORY", 1000)
    assert knn_of_subnets(backbone, subnets, data, config, ALONE, limit=100) == together


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    from helpers import collections_of_images as collections

    root = collections.write_folder(tmp_path, 30)
    for path in sorted(root.glob("*/*.png"))[::5]:
        path.write_bytes(b"no")
    data, config = open_data(str(root), 0.25, 0), tiny_config()
    backbone = initial_network(config).backbone
    extracted = extract_features(
        [class_token(backbone, Subnet(16, 1))], data.train, config.method.crops, ALONE, canvas=32
    )
    assert extracted is not None
    assert len(extracted.labels) == len(extracted.features[0]) == len(data.train) - len(extracted.unreadable)
    assert 0 < len(extracted.unreadable) <= 6


def test_several_processes_find_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(["pretrain", "--out", str(out), *OVERRIDES, "run.save_every=6"]) == 0
    evaluate = ["evaluate", str(out), "--linear", "--subnets", "32x2"]
    capsys.readouterr()
    monkeypatch.setattr(linear_module, "FEWEST_STEPS", 200)
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "linear" in printed.split("subnet", 1)[1].splitlines()[0]
    alone = json.loads((out / "evaluation.json").read_text())
    program = "from poa.evaluate import linear; linear.FEWEST_STEPS = 200\n"
    done = processes.run(3, "-c", f"{program}from poa.__main__ import main; main({evaluate})")
    together = json.loads((out / "evaluation.json").read_text())
    assert [d[1] for d in done[1:]] == ["", ""]
    assert together["settings"] == alone["settings"] and together["settings"]["linear"]["rates"] == list(
        RATES
    )
    for ours, theirs in zip(together["subnets"], alone["subnets"], strict=True):
        assert ours["knn"] == theirs["knn"]
        assert len(ours["linear"]) == 52 if ours["depth"] > 1 else 26
        assert ours["linear"][0]["accuracy"] == pytest.approx(theirs["linear"][0]["accuracy"], abs=0.005)
        assert ours["linear"][0]["accuracy"] > 0.5
