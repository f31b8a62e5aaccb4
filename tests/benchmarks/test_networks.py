"""The benchmark of subnets as networks on a CPU, tiny."""

from __future__ import annotations

import pytest
import torch

from benchmarks import networks
from benchmarks.failures import Refused, Unavailable
from benchmarks.peers import timm_networks
from benchmarks.results import REQUIRED
from poa.backbones import BackboneConfig, ResNetConfig, SwinConfig, ViTConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about the machine without a GPU")

CPU = torch.device("cpu")
FAST = ("ours", "reference", "naive", "static")
FOUR_STAGES = {"min_depths": (1, 1, 1, 1), "max_depths": (1, 1, 2, 1)}


@pytest.mark.parametrize(
    ("name", "which"),
    [("vit-l16", "smallest"), ("vit-l16", "intact"), ("swin-b", "middle"), ("resnet-152", "middle")],
)
def test_every_provider_that_runs_on_a_cpu(name: str, which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "PROVIDERS", FAST)
    rows = [event for event in networks.run(name, which, 2, CPU, 0.001) if isinstance(event, dict)]
    assert {row["provider"] for row in rows} == set(FAST)
    assert [row["mode"] for row in rows[:2]] == ["fwd", "fwd+bwd"]
    for row in rows:
        assert all(key in row for key in REQUIRED)
        assert row["images_per_s"] == pytest.approx(2e6 / row["p50"])
        assert row["tflop_per_s"] > 0


def test_another_function_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.peers import naive

    attention = naive.attention
    monkeypatch.setattr(networks, "PROVIDERS", ("ours", "naive"))
    monkeypatch.setattr(naive, "attention", lambda *arguments: 1.01 * attention(*arguments))
    events = list(networks.run("vit-l16", "middle", 2, CPU, 0.001))
    assert {event["provider"] for event in events if isinstance(event, dict)} == {"ours"}
    (refused,) = (event for event in events if isinstance(event, Refused))
    assert refused.provider == "naive"
    assert refused.reason.startswith("its features differ by")


@pytest.mark.parametrize(
    ("config", "same"),
    [
        (ViTConfig(image_size=32, min_width=32, max_width=64, head_dim=16, min_depth=2, max_depth=4), True),
        (SwinConfig(image_size=64, min_width=16, max_width=32, window=4, **FOUR_STAGES), False),
        (ResNetConfig(image_size=64, **FOUR_STAGES), True),
    ],
    ids=lambda value: value.kind if isinstance(value, BackboneConfig) else "",
)
def test_networks_of_timm(config: BackboneConfig, same: bool) -> None:
    pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    subnet = config.space.smallest
    static = config.build().eval().to_static(subnet)
    model, matches = timm_networks.build(static)
    assert matches == same
    images = torch.randn(2, 3, config.image_size, config.image_size)
    with torch.no_grad():
        ours, theirs = static([images])[0].cls, model(images)
    assert ours.shape == theirs.shape
    assert same == torch.allclose(ours, theirs, atol=1e-5)
    assert abs(sum(p.numel() for p in model.parameters()) / config.parameters(subnet) - 1) < 0.01


def test_what_timm_lacks_is_said() -> None:
    pytest.importorskip("timm", reason="timm does not import here", exc_type=Exception)
    config = ResNetConfig(image_size=64, base_width=32, min_width=32, max_width=32, **FOUR_STAGES)
    with pytest.raises(Unavailable, match="four stages and a stem of 64"):
        timm_networks.build(config.build().to_static(config.space.smallest))
