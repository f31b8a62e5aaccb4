"""Elastic ViT against the official one: forward, backward, stochastic depth, parameter groups."""

from __future__ import annotations

import pytest
import torch

from helpers import golden_cases as golden
from poa.heads import HeadConfig
from poa.multicrop import StochasticDepth, kept_rows
from poa.network import Network
from poa.official import backbone_name, head_name
from poa.optim import parameter_groups
from poa.subnets import Subnet


@pytest.mark.parametrize("subnet", golden.subnets("vit_forward"), ids=str)
def test_golden_vit_forward(subnet: Subnet) -> None:
    model = golden.vit("vit_forward")
    inputs, outputs = (golden.tensors("vit_forward", "inputs"), golden.tensors("vit_forward", "outputs"))
    expected = {k: v for k, v in outputs.items() if k.startswith(f"{golden.key_of(subnet)}.")}
    assert expected
    for name in {key.split(".")[1] for key in expected}:
        crops = name.removesuffix("_masked")
        mask = inputs["masks"] if crops != name else None
        (features,) = model([inputs[f"{crops}_crops"]], subnet, masks=[mask])
        got = {
            "x_norm_clstoken": features.cls,
            "x_norm_patchtokens": features.patches,
            "x_mean_pooling": model.mean_pool(features),
        }
        for key in expected:
            _, of, field = key.split(".")
            if of == name:
                golden.assert_close(got[field], expected[key])


@pytest.mark.parametrize("subnet", golden.subnets("vit_backward"), ids=str)
def test_golden_vit_backward(subnet: Subnet) -> None:
    model, inputs = golden.vit("vit_backward"), golden.tensors("vit_forward", "inputs")
    weights = {
        key.split(".")[1]: value
        for key, value in golden.tensors("vit_backward", "loss_weights").items()
        if key.startswith(f"w{subnet.width}.")
    }
    whole, local = model(
        [inputs["global_crops"], inputs["local_crops"]], subnet, masks=[inputs["masks"], None]
    )
    features = {"global_cls": whole.cls, "global_patch": whole.patches}
    features |= {"local_cls": local.cls, "local_patch": local.patches}
    terms = torch.cat([(weights[name] * value).flatten() for name, value in features.items()])
    loss = terms.sum()
    loss.backward()
    results = golden.case("vit_backward")["results"][golden.key_of(subnet)]
    assert loss.item() == pytest.approx(results["loss"], rel=0, abs=1e-5 * float(terms.detach().norm()))
    parameters = dict(model.named_parameters())
    absent = {backbone_name(name) for name in results["grad_is_none"]}
    assert {name for name, p in parameters.items() if p.grad is None} == absent
    for name, grad in golden.tensors("vit_backward", f"grads_{golden.key_of(subnet)}").items():
        got = parameters[backbone_name(name)].grad
        assert got is not None, name
        golden.assert_close(got, grad, relative=1e-5, atol=1e-5)


@pytest.mark.parametrize("subnet", golden.subnets("vit_droppath"), ids=str)
def test_golden_vit_droppath(subnet: Subnet) -> None:
    model, case = golden.vit("vit_droppath"), golden.case("vit_droppath")
    inputs, outputs = (golden.tensors("vit_droppath", "inputs"), golden.tensors("vit_droppath", "outputs"))
    images, permutations = inputs["x"], inputs[f"{golden.key_of(subnet)}.perm"]
    crops = images.shape[0]
    patches = images.shape[2] * images.shape[3] // case["config"]["patch_size"] ** 2
    rates = model.config.active_drop_rates(subnet)
    halves = []
    for index, permutation in enumerate(permutations):
        count = max(int(crops * (1 - rates[index // 2])), 1)
        groups = ((crops, 1 + patches),)
        halves.append(kept_rows(groups, [permutation[:count]], [crops / count]))
    drop = StochasticDepth(tuple(zip(halves[::2], halves[1::2], strict=True)))
    (features,) = model([images], subnet, drop=drop)
    key = golden.key_of(subnet)
    golden.assert_close(features.cls, outputs[f"{key}.x_norm_clstoken"])
    golden.assert_close(features.patches, outputs[f"{key}.x_norm_patchtokens"])


def test_golden_param_groups() -> None:
    recorded = golden.case("param_groups")["groups"]["vit"]
    heads = recorded["dino_head (arch=vit)"]
    count = len({name.split(".")[0] for name in heads if name.startswith("mlp")})
    layers = sum(name.startswith("mlp0.") and name.endswith(".weight") for name in heads)
    network = Network(
        golden.vit_config(golden.case("vit_forward")["config"]),
        HeadConfig(prototypes=(8,) * count, hidden=8, bottleneck=4, layers=layers),
    )
    got = {}
    groups = parameter_groups(network, recorded["layerwise_decay"], recorded["patch_embed_lr_mult"])
    for group in groups:
        for name in group["names"]:
            got[name] = [group["lr_multiplier"], group["wd_multiplier"], group["last_layer"]]
    expected = {f"backbone.{backbone_name(k)}": v for k, v in recorded["params"].items()}
    expected |= {f"head.{head_name(k)}": v for k, v in heads.items()}
    assert got == expected
