"""Reading checkpoints of the official implementation."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from helpers import golden_cases as golden
from poa.errors import InputError
from poa.official import load_backbone


def state(name: str = "vit_forward") -> dict[str, torch.Tensor]:
    return golden.tensors(name, "state")


def prefixed(prefix: str, name: str = "vit_forward") -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in state(name).items()}


HEAD = {"dino_head.mlp0.0.linear.weight": torch.zeros(2, 2)}


@pytest.mark.parametrize(
    "content",
    [
        {"teacher": prefixed("backbone.") | HEAD},
        {"model": prefixed("teacher.backbone.") | prefixed("student.backbone.")},
        prefixed("backbone."),
        state(),
    ],
    ids=["teacher-checkpoint", "training-checkpoint", "prefixed", "bare"],
)
def test_official_checkpoints_give_the_recorded_features(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "official.pth")
    case = golden.case("vit_forward")
    model = load_backbone(tmp_path / "official.pth", head_dim=case["config"]["head_dim"])
    inputs, outputs = golden.tensors("vit_forward", "inputs"), golden.tensors("vit_forward", "outputs")
    for subnet in golden.subnets("vit_forward"):
        (features,) = model([inputs["global_crops"]], subnet)
        expected = outputs[f"{golden.key_of(subnet)}.global.x_norm_clstoken"]
        golden.assert_close(features.cls, expected)


@pytest.mark.parametrize("name", ["swin_forward", "resnet_forward"])
def test_the_kind_is_read_from_the_names(name: str, tmp_path: Path) -> None:
    case, recorded = golden.case(name), golden.pyramid(name)
    torch.save({"teacher": prefixed("backbone.", name) | HEAD}, tmp_path / "official.pth")
    model = load_backbone(tmp_path / "official.pth", norm_groups=case["config"].get("num_gn_groups", 32))
    assert model.config.kind == recorded.config.kind
    assert model.space.intact == recorded.space.intact
    images = golden.tensors(name, "inputs")["global_crops"]
    for subnet in (recorded.space.intact, recorded.space.smallest):
        (got,), (wanted,) = model([images], subnet), recorded([images], subnet)
        assert torch.equal(got.cls, wanted.cls)


def test_safetensors_with_official_names(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "official.safetensors")
    head_dim = golden.case("vit_forward")["config"]["head_dim"]
    assert load_backbone(tmp_path / "official.safetensors", head_dim=head_dim).space.intact.depth == max(
        int(key.split(".")[1]) + 1 for key in state() if key.startswith("blocks.")
    )


def test_wrong_files(tmp_path: Path) -> None:
    head_dim = golden.case("vit_forward")["config"]["head_dim"]
    path = tmp_path / "official.pth"

    def load(content: Any) -> None:
        torch.save(content, path)
        load_backbone(path, head_dim=head_dim)

    with pytest.raises(InputError, match="no such file"):
        load_backbone(tmp_path / "nothing.pth")
    with pytest.raises(InputError, match="expected weights of a ViT, Swin or ResNet, got none of cls_token"):
        load({"weights": torch.zeros(2)})
    with pytest.raises(InputError, match=r"0 expected weights missing .* 1 unknown \(first: extra\)"):
        load(state() | {"extra": torch.zeros(1)})
    missing = state()
    del missing["blocks.1.ls1.gamma"]
    with pytest.raises(InputError, match=r"1 expected weights missing \(first: blocks.1.ls1.gamma\)"):
        load(missing)
    path.write_bytes(pickle.dumps({"teacher": _Trap(tmp_path / "sprung")}))
    with pytest.raises(InputError, match="expected a complete file of weights only"):
        load_backbone(path)
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
