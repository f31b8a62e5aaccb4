"""Elastic Swin and ResNet against the official ones: features, search spaces, learning-rate factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kernels.dispatch import INTERPRETED
from helpers import golden_cases as golden
from poa.backbones import Backbone, ResNetConfig, SwinConfig
from poa.heads import HeadConfig
from poa.network import Network
from poa.official import UNUSED, backbone_name
from poa.optim import parameter_groups
from poa.subnets import Subnet, active_blocks

SWIN, RESNET = golden.case("swin_forward"), golden.case("resnet_forward")
SWIN_SUBNETS = SWIN["subnets"]
if INTERPRETED:  # windows are slow there: every width once, at its least depth
    SWIN_SUBNETS = dict(sorted(SWIN_SUBNETS, reverse=True)).items()


def swin_subnet(width: int, depth: int) -> Subnet:
    first, second, _, last = SWIN["config"]["max_depths"]
    return Subnet(width, (first, second, depth, last))


CASES = [
    *(("swin_forward", swin_subnet(w, d), f"w{w}_d{d}") for w, d in SWIN_SUBNETS),
    *(("resnet_forward", Subnet(w[0], tuple(d)), key) for w, d, key in RESNET["subnets"]),
]


def expected(name: str, key: str) -> dict[str, Tensor]:
    outputs = golden.tensors(name, "outputs")
    matching = {k.removeprefix(f"{key}."): v for k, v in outputs.items() if k.startswith(f"{key}.")}
    assert matching, sorted(outputs)[:5]
    return matching


@pytest.mark.parametrize(("name", "subnet", "key"), CASES, ids=[f"{c[0][:4]}-{c[1]}" for c in CASES])
def test_golden_forward(name: str, subnet: Subnet, key: str) -> None:
    model, inputs = golden.pyramid(name), golden.tensors(name, "inputs")
    recorded = expected(name, key)
    for case in {field.split(".")[0] for field in recorded}:
        crops = case.removesuffix("_masked")
        mask = inputs["masks"] if crops != case else None
        (features,) = model([inputs[f"{crops}_crops"]], subnet, masks=[mask])
        got = {"x_norm_clstoken": features.cls, "x_norm_patchtokens": features.patches}
        got["x_mean_pooling"] = features.cls
        compared = 0
        for field, value in got.items():
            if f"{case}.{field}" in recorded:
                golden.assert_close(value, recorded[f"{case}.{field}"])
                compared += 1
        assert compared


@pytest.mark.parametrize("name", ["swin_forward", "resnet_forward"])
def test_crops_of_several_sizes_are_one_forward(name: str) -> None:
    model, inputs = golden.pyramid(name), golden.tensors(name, "inputs")
    crops = [inputs["local_crops"], inputs["global_crops"]]
    mask, subnet = inputs["masks"], model.space.smallest
    together = model(crops, subnet, masks=[None, mask])
    for features, group, its_mask in zip(together, crops, [None, mask], strict=True):
        (alone,) = model([group], subnet, masks=[its_mask])
        golden.assert_close(features.cls, alone.cls)
        golden.assert_close(features.patches, alone.patches)


@pytest.mark.parametrize("name", ["swin_forward", "resnet_forward"])
def test_reading_gives_rows_of_the_whole(name: str) -> None:
    model, inputs = golden.pyramid(name), golden.tensors(name, "inputs")
    crops, mask = [inputs["local_crops"], inputs["global_crops"]], inputs["masks"]
    chosen = mask.flatten().nonzero().flatten()
    assert len(chosen)
    rows = model.gather_tokens(crops, chosen, model.space.smallest, masks=[None, mask])
    local, whole = model(crops, model.space.smallest, masks=[None, mask])
    patches = whole.patches.flatten(0, 1)[chosen]
    torch.testing.assert_close(rows, torch.cat([local.cls, whole.cls, patches]))


@pytest.mark.parametrize(("name", "subnet", "key"), CASES, ids=[f"{c[0][:4]}-{c[1]}" for c in CASES])
def test_a_static_subnet_equals_the_elastic_one(name: str, subnet: Subnet, key: str) -> None:
    """At two input sizes; both official conversions fail this."""
    model, inputs = golden.pyramid(name), golden.tensors(name, "inputs")
    static = model.to_static(subnet)
    copy = static.config.plain().eval()
    copy.load_state_dict(static.exported_state())
    assert model.config.parameters(subnet) == sum(p.numel() for p in static.parameters())
    for crops in (inputs["global_crops"], inputs["local_crops"]):
        (wanted,), (got,) = model([crops], subnet), copy([crops])
        golden.assert_close(got.cls, wanted.cls)
        golden.assert_close(got.patches, wanted.patches)


def test_golden_extract_of_swin() -> None:
    """The official tool's weights are ours but for the patch embedding, which it cuts before its norm."""
    results = golden.case("extract")["results"]["swin"]["tiny"]
    subnet = swin_subnet(*results["width_s3depth"])
    static = golden.pyramid("swin_forward").to_static(subnet)
    ours, compared = static.state_dict(), 0
    for key, recorded in golden.tensors("extract", "swin_tiny").items():
        name = key.removeprefix("backbone.")
        if UNUSED.match(name) or name == "mask_token":
            continue
        mine = ours[backbone_name(name)]
        golden.assert_close(mine[: len(recorded)], recorded, relative=1e-6)
        compared += 1
        assert mine.shape == recorded.shape or name.startswith("patch_embed.")
    assert compared == len(ours)
    (features,) = static([golden.tensors("swin_forward", "inputs")["global_crops"]])
    expected = golden.tensors("extract", "swin_tiny_expected")["elastic_in_place.x_norm_clstoken"]
    golden.assert_close(features.cls, expected)


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_golden_param_groups(kind: str) -> None:
    recorded = golden.case("param_groups")["groups"][kind]
    config = golden.pyramid(f"{kind}_forward").config
    network = Network(config, HeadConfig(prototypes=(8,), hidden=8, bottleneck=4))
    got = {}
    groups = parameter_groups(network, recorded["layerwise_decay"], recorded["patch_embed_lr_mult"])
    for group in groups:
        for name in group["names"]:
            got[name] = [group["lr_multiplier"], group["wd_multiplier"], group["last_layer"]]
    wanted = {f"backbone.{backbone_name(k)}": v for k, v in recorded["params"].items() if not UNUSED.match(k)}
    assert {name: value for name, value in got.items() if name.startswith("backbone.")} == wanted


def swin_space() -> tuple[SwinConfig, dict[str, Any]]:
    case = golden.case("search_space")["swin_base"]
    return golden.swin_config(case["config"]), case


def resnet_space() -> tuple[ResNetConfig, dict[str, Any]]:
    case = golden.case("search_space")["resnet_152"]
    return golden.resnet_config(case["config"]), case


def test_golden_search_space_of_swin() -> None:
    config, case = swin_space()
    space = config.space
    assert list(space.widths) == case["widths"]
    assert len(space) == case["n_unique"] == 39
    counts = [[s.width, s.blocks[2], count] for s, count in space.multiplicities().items()]
    assert counts == case["networks_with_multiplicity"]
    for depth, blocks in case["s3_block_idx"].items():
        assert active_blocks(config.max_depths[2], int(depth)) == blocks


def test_golden_search_space_of_resnet() -> None:
    config, case = resnet_space()
    space = config.space
    assert list(space.widths) == [width for width, *_ in case["widths"]]
    assert [list(depth) for depth in space.depths] == case["depths_sorted"]
    assert len(space) == case["n_unique"] == 465
    counts = [[s.width, list(s.blocks), count] for s, count in space.multiplicities().items()]
    assert counts == case["networks_with_multiplicity"]
    for layer, recorded in case["block_idx"].items():
        most = config.max_depths[int(layer.removeprefix("layer")) - 1]
        assert all(active_blocks(most, int(depth)) == blocks for depth, blocks in recorded.items())
    assert sum(p.numel() for p in meta(config).parameters()) == case["n_params_backbone"]


def meta(config: ResNetConfig) -> Backbone:
    with torch.device("meta"):
        return config.build()


def gradients(model: Backbone, subnet: Subnet, inputs: dict[str, Tensor], recompute: bool) -> list[Tensor]:
    model = model.double()
    crops = [inputs["local_crops"].double(), inputs["global_crops"].double()]
    features = model(crops, subnet, masks=[None, inputs["masks"]], recompute=recompute)
    sum(f.cls.sin().sum() + f.patches.cos().sum() for f in features).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", ["swin_forward", "resnet_forward"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    inputs, subnet = golden.tensors(name, "inputs"), golden.pyramid(name).space.smallest
    stored, again = (
        gradients(golden.pyramid(name), subnet, inputs, recompute) for recompute in (False, True)
    )
    for a, b in zip(stored, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["swin_forward", "resnet_forward"])
def test_gradients_are_finite_differences(name: str) -> None:
    """Along a random direction of all parameters, in float64; the gradient has the size of slopes."""
    model, inputs = golden.pyramid(name).double(), golden.tensors(name, "inputs")
    crops, subnet = [inputs["global_crops"].double()[:1]], list(model.space)[1]
    parameters, draw = list(model.parameters()), torch.Generator().manual_seed(0)
    directions = [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in parameters]

    def value() -> Tensor:
        (features,) = model(crops, subnet, masks=[inputs["masks"][:1]])
        return features.cls.sin().sum() + features.patches.cos().sum()

    def moved(step: float) -> float:
        for p, d in zip(parameters, directions, strict=True):
            p.data += step * d
        actual = float(value().detach())
        for p, d in zip(parameters, directions, strict=True):
            p.data -= step * d
        return actual

    grads = torch.autograd.grad(value(), parameters, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(grads, directions, strict=True) if g is not None)
    size, step = torch.cat([g.flatten() for g in grads if g is not None]).norm(), 1e-7
    assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(slope, rel=0, abs=1e-6 * float(size))
