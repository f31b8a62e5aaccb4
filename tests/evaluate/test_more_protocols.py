"""Metrics of the protocols against reference libraries, and against what they must beat."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers import collections_of_images as collections
from helpers import digit_scenes
from helpers.commands import fails
from helpers.tiny import tiny_config
from poa.__main__ import main
from poa.backbones.base import Features
from poa.data.crops import CropsConfig
from poa.data.sources import open_data
from poa.distributed import World
from poa.errors import InputError
from poa.evaluate.baselines import Baseline, histogram
from poa.evaluate.correspondence import SHARE, centers, correspondence, pck, second_view
from poa.evaluate.kmeans import KMEANS, cluster_scores
from poa.evaluate.knn import KNN
from poa.evaluate.logistic import LOGISTIC, _best, logistic_accuracy
from poa.evaluate.models import open_peer
from poa.evaluate.protocol import Labelled, Task
from poa.evaluate.quality import alpha_req, lidar, quality, rankme, spearman
from poa.evaluate.retrieval import RETRIEVAL, average_precisions, retrieval_scores
from poa.evaluate.robustness import (
    CORRUPTIONS,
    DROPS,
    LEVELS,
    ROBUSTNESS,
    conditions,
    damaged_tokens,
    drop_patches,
    shuffle_tiles,
)
from poa.evaluate.scores import number_format
from poa.evaluate.suite import PROTOCOLS, SEPARATE
from poa.evaluate.sweep import score
from poa.evaluate.top1 import top_accuracy
from poa.step import initial_network
from poa.subnets import Subnet

metrics = pytest.importorskip("sklearn.metrics")
CPU = torch.device("cpu")
DRAW = torch.Generator().manual_seed(0)


def clusters(count: int, spread: float) -> Labelled:
    labels = torch.arange(count) % 4
    return Labelled(torch.eye(4, 8)[labels] + spread * torch.randn(count, 8, generator=DRAW), labels)


def test_metrics_are_those_of_scikit_learn() -> None:
    similarities = torch.randn(20, 50, generator=DRAW)
    relevant = torch.rand(20, 50, generator=DRAW) < 0.2
    expected = [metrics.average_precision_score(r, s) for r, s in zip(relevant, similarities, strict=True)]
    np.testing.assert_allclose(average_precisions(similarities, relevant), expected, atol=1e-6)
    logits, labels = torch.randn(60, 7, generator=DRAW), torch.arange(60) % 7
    for name, k in (("top1", 1), ("top5", 5)):
        expected = metrics.top_k_accuracy_score(labels, logits, k=k)
        assert top_accuracy(logits, labels)[name] == pytest.approx(expected, abs=1e-6)
    renamed = (labels + 3) % 7
    assert [*cluster_scores(renamed.numpy(), labels.numpy()).values()] == pytest.approx([1.0] * 4)
    from scipy.stats import spearmanr

    for a, b in (similarities[:2], similarities[:2].round()):  # the latter has ties
        assert spearman(a.tolist(), b.tolist()) == pytest.approx(spearmanr(a, b).statistic, abs=1e-6)


def test_figures_of_random_predictions_are_those_of_references() -> None:
    labels, found = torch.randint(4, (2, 90), generator=DRAW).numpy()
    best = max((labels == np.array(names)[found]).mean() for names in itertools.permutations(range(4)))
    kinds = (metrics.normalized_mutual_info_score, metrics.adjusted_rand_score, metrics.fowlkes_mallows_score)
    expected = [*(kind(labels, found) for kind in kinds), best]
    assert [*cluster_scores(found, labels).values()] == pytest.approx(expected, abs=1e-6)
    bank, asked = (
        Labelled(torch.randn(count, 8, generator=DRAW), torch.randint(30, (count,), generator=DRAW))
        for count in (400, 300)
    )
    similarities = metrics.pairwise.cosine_similarity(asked.features.double(), bank.features.double())
    relevant = (asked.labels[:, None] == bank.labels).numpy()
    got = retrieval_scores(bank, asked, CPU)
    rows = zip(relevant, similarities, strict=True)
    expected = float(np.mean([metrics.average_precision_score(r, s) for r, s in rows]))
    assert got["map"] == pytest.approx(expected, abs=1e-6)
    order = np.take_along_axis(relevant, np.argsort(-similarities, 1), 1)
    for k in (1, 5, 10):
        assert got[f"recall@{k}"] == pytest.approx(order[:, :k].any(1).mean(), abs=1e-6)
    assert got["recall@1"] < got["recall@5"] < got["recall@10"] < 1


def test_recall_and_map_of_few_images() -> None:
    bank = Labelled(torch.eye(3), torch.tensor([0, 1, 1]))
    asked = Labelled(torch.tensor([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0]]), torch.tensor([1, 1]))
    got = retrieval_scores(bank, asked, CPU)
    assert got["recall@1"] == 0 and got["recall@5"] == 1
    assert got["map"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    with pytest.raises(InputError, match="expected training images with labels, got none"):
        retrieval_scores(Labelled(torch.zeros(0, 3), torch.zeros(0).long()), asked, CPU)


def test_pixels_of_digits_beat_noise_under_each_protocol() -> None:
    """By one call, which takes all protocols."""
    config, data = tiny_config(), open_data("digits", 0.25, 0)
    noise = torch.randn(3 * 24 * 24, 16, generator=DRAW)
    shown = Baseline("pixels", config.method.backbone, config.method.crops)
    for protocol, least, title in (
        (LOGISTIC, 0.9, "logistic"),
        (KMEANS, 0.5, "NMI"),
        (RETRIEVAL, 0.5, "mAP"),
    ):
        tasks = [
            Task(protocol, lambda x: shown([x])[0].cls[:, ::7]),
            Task(protocol, lambda x: (x.flatten(1) @ noise).sin()),
        ]
        values, others = score(tasks, data, config, World(0, 1, CPU), limit=300)
        assert protocol.accuracies(values)[title] > least > protocol.accuracies(others)[title], title


def test_logistic_regression_chooses_its_regularisation() -> None:
    train, queries = clusters(200, 0.5), clusters(100, 0.5)
    got = logistic_accuracy(train, queries, 0)
    assert got["accuracy"] > 0.6 and got == logistic_accuracy(train, queries, 0)
    for wanted in (1e-7, 1e-5, 0.1, 1e3, 1e5):  # also beyond those that are always tried, and not for ever
        assert _best(lambda c, wanted=wanted: -abs(math.log10(c / wanted))) == wanted
    assert _best(lambda c: c) == 1e5 and _best(lambda c: -c) == 1e-7 and _best(lambda c: 0.5) == 1e-3
    with pytest.raises(InputError, match="expected images of two classes or more, got 1"):
        logistic_accuracy(Labelled(train.features, torch.zeros(200).long()), queries, 0)


def test_spectra_of_known_features() -> None:
    """k equal directions have effective rank k, eigenvalues i^-2 the exponent 2; LiDAR sees through noise."""
    basis = torch.linalg.qr(torch.randn(300, 40, generator=DRAW).double())[0]
    basis = basis - basis.mean(0)
    assert rankme(torch.linalg.qr(basis)[0][:, :16]) == pytest.approx(16, abs=0.1)
    assert rankme(torch.full((3, 2), float("nan"))) == 0
    assert not any(quality(torch.full((3, 4, 2), float("nan"))).values())
    decayed = torch.linalg.qr(basis)[0] / torch.arange(1, 41)
    assert alpha_req(decayed) == pytest.approx(2, abs=0.05)

    def views(directions: int) -> Tensor:
        images = torch.zeros(300, 1, 40)
        images[:, 0, :directions] = torch.randn(300, directions, generator=DRAW)
        return images + 0.1 * torch.randn(300, 4, 40, generator=DRAW)

    few, many = lidar(views(4)), lidar(views(20))
    assert 3 < few < 8 < many < 30
    formats = [number_format(title) for title in ("RankMe", "RankMe init", "k=20", "k=20 init")]
    assert formats == [".2f", ".2f", ".1%", ".1%"]
    assert quality(views(4))["lidar"] == pytest.approx(few, abs=2)


def test_damage_of_images() -> None:
    """As much as asked for, the same for an image in any batch, and more with each level of noise."""
    images = torch.rand(5, 3, 16, 16, generator=DRAW) + 0.1
    kept = drop_patches(images, 0.25, 4)
    assert torch.equal((kept != 0).flatten(1).float().mean(1), torch.full((5,), 0.75))
    moved = shuffle_tiles(images, 2)
    assert torch.equal(moved.flatten(1).sort(1).values, images.flatten(1).sort(1).values)
    assert not torch.equal(moved, images)
    every = conditions(4, CropsConfig())
    assert len(every) == 1 + 5 + 2 + LEVELS * len(CORRUPTIONS)
    for kind, strength, damage in every:
        whole = damage(images)
        torch.testing.assert_close(damage(images[3:4]), whole[3:4], msg=f"{kind} {strength}")
        assert torch.equal(whole, images) == (kind == "clean"), f"{kind} {strength}"
    changes = [float((CORRUPTIONS["gaussian_noise"](images, i) - images).std()) for i in range(LEVELS)]
    assert changes == sorted(changes)


def test_the_standard_suite_of_a_run_and_of_a_model(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("poa.evaluate.linear.FEWEST_STEPS", 5)
    data = ["--data", str(collections.write_folder(tmp_path / "images", 24))]
    out = ["--out", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    assert main(["evaluate", str(trained), "--suite", "standard", "--baselines", *data, *out]) == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines()[-5:-3]] == ["pixels", "histogram"]
    assert "Spearman's correlation with k=20 over 4 subnets: RankMe" in said
    assert (tmp_path / "a.png").exists() and (tmp_path / "a-robustness.png").exists()
    written = json.loads((tmp_path / "a.json").read_text())
    assert set(written["correlations"]) == {"RankMe", "alpha-ReQ", "LiDAR"}
    names = {p.name for p in PROTOCOLS if p not in SEPARATE}
    assert all(names <= set(row) for row in written["subnets"])
    assert all(1 <= row["quality"]["rankme"] <= row["width"] for row in written["subnets"])
    assert main(["extract", str(trained), "--subnets", "16x2", "--out", str(tmp_path)]) == 0
    model = [str(tmp_path / "vit-16x2"), "--kmeans", "--robustness"]
    assert main(["evaluate", *model, *data]) == 0
    (row,) = json.loads((tmp_path / "vit-16x2/evaluation.json").read_text())["subnets"]
    same = next(one for one in written["subnets"] if one["subnet"] == "16x2")
    assert {**same, **row} == same
    others = collections.write_folder(tmp_path / "others", 24)
    assert main(["evaluate", model[0], "--data", str(others)]) == 0
    files = [json.loads(Path(model[0], f"evaluation{n}.json").read_text()) for n in ("", "-2")]
    assert [file["settings"]["data"] for file in files] == [written["settings"]["data"], str(others)]
    assert "expected --data with the model" in fails(capsys, "evaluate", *model)
    assert "expected no --initial" in fails(capsys, "evaluate", *model, *data, "--initial")


def test_several_models_have_a_table_each_and_one_plot(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(trained), "--subnets", "16x1", "32x2", "--out", str(tmp_path)]) == 0
    models, out = [str(tmp_path / name) for name in ("vit-16x1", "vit-32x2")], str(tmp_path / "a.json")
    data = ["--data", str(collections.write_folder(tmp_path / "images", 24)), "--kmeans"]
    for model in models:
        assert main(["evaluate", model, *data, "--plot", str(tmp_path / "one.png")]) == 0
    capsys.readouterr()
    plot = ["--plot", str(tmp_path / "a.png")]
    assert main(["evaluate", *models, *data, "--out", out, *plot]) == 0
    said = capsys.readouterr().out
    assert all(f"{model}: model" in said for model in models) and said.endswith(f"{out}\n{plot[1]}\n")
    written = json.loads(Path(out).read_text())["models"]
    assert written == [json.loads(Path(model, "evaluation.json").read_text()) for model in models]
    assert (tmp_path / "a.png").exists() and (tmp_path / "one.png").exists()
    again = ["evaluate", *models, *data[:2], "--retrieval", "--out", out]
    assert main(again) == 0
    both = json.loads(Path(out).read_text())["models"]
    assert all({"kmeans", "retrieval"} <= model["subnets"][0].keys() for model in both)
    (tmp_path / "vit-16x1").rename(moved := tmp_path / "moved")
    assert main([*again[:1], models[1], str(moved), *again[3:]]) == 0
    assert json.loads(Path(out).read_text())["models"][0::2] == both[::-1]  # and between them the moved one
    moved.rename(models[0])
    assert "expected --out with" in fails(capsys, "evaluate", *models, *data)
    for other in (str(trained), str(tmp_path / "none")):
        wrong = fails(capsys, "evaluate", models[0], other, *data)
        assert f"expected one run, or folders of extracted models and timm:NAME, got {other} among 2" in wrong
    Path(models[1], "model.safetensors").write_bytes(b"damaged")
    with mock.patch("poa.evaluate.models._reports") as scored:
        assert "model.safetensors" in fails(capsys, "evaluate", *models, *data, "--out", out)
    assert not scored.called


def test_features_without_a_network() -> None:
    """Raw pixels of digits are a strong baseline; histograms are shares, of the image and of each patch."""
    config, data = tiny_config(), open_data("digits", 0.25, 0)
    crops, space = config.method.crops, config.method.backbone.space
    tasks = [
        KNN.task(Baseline(kind, config.method.backbone, crops), space.intact, crops) for kind in KNN.baselines
    ]
    pixels, shares = score(tasks, data, config, World(0, 1, CPU))
    assert pixels[20] > 0.97 > 0.8 > shares[20] > 0.2
    images = torch.rand(2, 3, 24, 24, generator=DRAW)
    expected = [torch.histc(channel, 16, 0, 1) / 24**2 for channel in images[1]]
    torch.testing.assert_close(histogram(images)[1], torch.cat(expected))
    std, mean = (torch.tensor(values)[:, None, None] for values in (crops.std, crops.mean))
    (features,) = Baseline("histogram", config.method.backbone, crops)([(images - mean) / std])
    torch.testing.assert_close(features.patches[1, 5], histogram(images[1:, :, 8:16, 16:24])[0])


def test_points_of_views_are_found() -> None:
    """Tokens that tell the place of a patch in the image are found at their places, others by chance."""
    side = 8
    places = centers(side)
    seen = SHARE * torch.stack([1 - places[:, 0], places[:, 1]], 1)
    frequencies = 3 * torch.randn(2, 64, generator=DRAW)
    tokens = torch.stack([(points @ frequencies).cos() for points in (places, seen)])[None]
    noise = torch.randn(tokens.shape, generator=DRAW)
    found, missed = correspondence(tokens, CPU), correspondence(noise, CPU)
    assert found["0.1"] > 0.95 and missed["0.1"] < 0.3
    distances = np.linalg.norm(seen.numpy()[:, None] - places.numpy(), axis=2)
    assert found["chance"] == missed["chance"] == pytest.approx((distances <= 0.1).mean(), abs=1e-6)
    image = torch.arange(8.0).expand(1, 3, 8, 8)
    assert (second_view(image)[0, 0, 0].diff() < 0).all()
    assert pck(torch.tensor([[0.0, 0.0], [0.3, 0.4]]), torch.tensor([[0.0, 0.15], [0.3, 0.4]])) == {
        "0.05": 0.5, "0.1": 0.5, "0.2": 1.0,
    }  # fmt: skip
    drawn, truth = torch.rand(2, 500, 2, generator=DRAW)
    away = np.linalg.norm(drawn.numpy() - truth.numpy(), axis=1)
    expected = [(away <= alpha).mean() for alpha in (0.05, 0.1, 0.2)]
    assert [*pck(drawn, truth).values()] == pytest.approx(expected, abs=1e-6)


def test_a_peer_of_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm", exc_type=ImportError)
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, **options))
    data = ["--data", str(collections.write_folder(tmp_path / "images", 8))]
    masks = digit_scenes.write_scenes(tmp_path, 2, 2) / "masks"
    data += ["--correspondence", "--segmentation", str(masks), "steps=2"]
    # The third pools by attention, the last two into wider features, of maps [B, H, W, C] and [B, C, H, W].
    for name in ("test_vit", "test_resnet", "test_vit3", "test_mambaout", "mobilenetv3_small_050"):
        out = tmp_path / f"{name}.json"
        assert main(["evaluate", f"timm:{name}", *data, "--robustness", "--out", str(out)]) == 0
        (row,) = json.loads(out.read_text())["subnets"]
        assert row["params"] > 1000 and row["flops"] > 1000 and 0 <= row["knn"]["20"] <= 1
        assert 0 <= row["segmentation"]["linear"] <= 1 and 0 <= row["robustness"]["salient"]["0.5"] <= 1
        if name == "mobilenetv3_small_050":
            features = open_peer(f"timm:{name}").backbone([torch.rand(1, 3, 64, 64)])
            assert (features[0].cls.shape, features[0].patches.shape) == ((1, 1024), (1, 4, 288))


def test_robustness_of_a_subnet() -> None:
    config, data = tiny_config(), open_data("digits", 0.25, 0)
    backbone = initial_network(config).backbone
    tasks = [p.task(backbone, Subnet(16, 1), config.method.crops) for p in (KNN, ROBUSTNESS)]
    clean, damaged = score(tasks, data, config, World(0, 1, CPU), limit=60)
    assert damaged["clean"]["0"] == clean[20]
    assert [*damaged["drop"]] == ["0.1", "0.3", "0.5", "0.7", "0.9"] and damaged["drop"]["0.9"] < clean[20]
    assert all(len(damaged[kind]) == LEVELS for kind in CORRUPTIONS)
    assert set(ROBUSTNESS.accuracies(damaged)) >= {"drop 50%", "salient 50%", "background 50%", "corrupted"}


def test_salient_patches_are_those_like_the_class_token() -> None:
    """Of a network whose class token is the mean brightness, and like the bright patches."""

    class Bright:
        config = tiny_config().method.backbone

        def __call__(self, crops: list[Tensor], subnet: Subnet) -> list[Features]:
            light = crops[0].mean(1).unfold(1, 8, 8).unfold(2, 8, 8).mean((3, 4)).flatten(1)
            patches = torch.stack([light, 1 - light], 2)
            return [Features(F.pad(light.mean(1, keepdim=True), (0, 1)), patches, patches)]

    images = torch.rand(2, 3, 3, 3, generator=DRAW).repeat_interleave(8, 2).repeat_interleave(8, 3)
    tokens = damaged_tokens(Bright(), Subnet(16, 1), tiny_config().method.crops)(images)  # type: ignore[arg-type]
    salient, background = tokens[:, -2 * len(DROPS) :, 0].split(len(DROPS), 1)
    light = images.mean(1)[:, ::8, ::8].flatten(1).sort(1).values
    for kept, share in enumerate(DROPS):
        gone = round(share * 9)
        torch.testing.assert_close(salient[:, kept], light[:, : 9 - gone].sum(1) / 9)
        torch.testing.assert_close(background[:, kept], light[:, gone:].sum(1) / 9)
