"""Access to the recorded behaviour of the official implementation.

`POA_GOLDEN` may name another folder of the same schema; nothing about sizes is assumed by the tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from poa.backbones import Backbone, ElasticViT, ResNetConfig, SwinConfig, ViTConfig
from poa.heads import HeadConfig
from poa.network import Network
from poa.official import backbone_name, backbone_state, network_name
from poa.subnets import Subnet

ROOT = Path(os.environ.get("POA_GOLDEN") or Path(__file__).parent.parent / "golden")


def case(name: str) -> dict[str, Any]:
    return json.loads((ROOT / name / "case.json").read_text())


def tensors(name: str, file: str) -> dict[str, Tensor]:
    return load_file(ROOT / name / f"{file}.safetensors")


def vit_config(official: dict[str, Any]) -> ViTConfig:
    """The ViTConfig of an official `vit_dynamic` configuration."""
    return ViTConfig(
        image_size=official["img_size"],
        patch_size=official["patch_size"],
        min_width=official["min_embed_dim"],
        max_width=official["max_embed_dim"],
        width_step=official["head_dim"] * official["width_interval"],
        min_depth=official["min_depth"],
        max_depth=official["max_depth"],
        depth_step=official["depth_interval"],
        head_dim=official["head_dim"],
        layer_scale=official["init_values"],
        drop_path=official.get("drop_path_rate", 0.0),
        drop_path_uniform=official.get("drop_path_uniform", True),
        sampling_scale=official["net_select_scale"],
    )


def vit(name: str, dtype: torch.dtype = torch.float32) -> ElasticViT:
    """The recorded model of the vit cases, configured as case `name`."""
    model = ElasticViT(vit_config(case(name)["config"]))
    state = tensors("vit_forward", "state")
    model.load_state_dict({backbone_name(key): value for key, value in state.items()})
    return model.to(dtype)


def swin_config(official: dict[str, Any]) -> SwinConfig:
    """The SwinConfig of an official `swin_dynamic` configuration."""
    first, second, _, last = official["max_depths"]
    return SwinConfig(
        image_size=official.get("img_size", 224),
        patch_size=official.get("patch_size", 4),
        min_width=official["min_embed_dim"],
        max_width=official["max_embed_dim"],
        head_dim=official["head_dim"],
        min_depths=(first, second, official["min_s3_depth"], last),
        max_depths=tuple(official["max_depths"]),
        window=official.get("window_size", 7),
        mask_scale=official.get("ibot_scale_factor", 2),
        sampling_scale=official["net_select_scale"],
    )


def resnet_config(official: dict[str, Any]) -> ResNetConfig:
    """The ResNetConfig of an official `resnet_dynamic` configuration."""
    base, groups = official["base_channels"], official["num_gn_groups"]
    assert official["stem_channels"] == base
    return ResNetConfig(
        image_size=official.get("img_size", 224),
        min_depths=tuple(official["min_depths"]),
        max_depths=tuple(official["max_depths"]),
        base_width=base,
        min_width=base,
        max_width=2 * base,
        norm_groups=groups,
        mask_scale=official.get("ibot_scale_factor", 2),
        sampling_scale=official["net_select_scale"],
    )


def pyramid(name: str) -> Backbone:
    """The recorded Swin or ResNet, in evaluation mode."""
    config = {"swin_forward": swin_config, "resnet_forward": resnet_config}[name](case(name)["config"])
    model = config.build().eval()
    model.load_state_dict(backbone_state(tensors(name, "state")))
    return model


def subnets(name: str) -> list[Subnet]:
    return [Subnet(*pair) for pair in case(name)["subnets"]]


def key_of(subnet: Subnet) -> str:
    return f"w{subnet.width}_d{subnet.depth}"


def step_network(branch: str) -> Network:
    """Student or teacher of the recorded step, at its start."""
    config = case("step")["config"]
    student, dino = config["student"], config["dino"]
    official = {
        **student,
        "img_size": config["crops"]["global_crops_size"],
        "init_values": student["layerscale"],
    }
    head = HeadConfig(
        prototypes=tuple(dino["head_n_prototypes"]),
        hidden=dino["head_hidden_dim"],
        bottleneck=dino["head_bottleneck_dim"],
        layers=dino["head_nlayers"],
    )
    network = Network(vit_config(official), head)
    state = tensors("step", branch)
    network.load_state_dict({network_name(key): value for key, value in state.items()})
    return network


# Of the largest entry. Results of fp32 networks differ by up to 3e-6; the smallest mistake that is known, a
# ResNet without the scale of its offsets, is 1e-4.
RELATIVE = 2e-5


def assert_close(actual: Tensor, expected: Tensor, *, relative: float = RELATIVE, atol: float = 0.0) -> None:
    """Every entry within `relative` of the largest expected one, plus `atol`; the worst element is named."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if not expected.numel():
        return
    difference = (actual - expected).detach().abs()
    allowed = relative * float(expected.detach().abs().max()) + atol
    if not bool((difference <= allowed).all()):
        worst = int(difference.nan_to_num(torch.inf).argmax())
        raise AssertionError(
            f"worst element {worst}: {actual.flatten()[worst]} against {expected.flatten()[worst]}, "
            f"{difference.flatten()[worst]:.2g} apart, allowed are {allowed:.2g}"
        )
