"""Sorting by importance: the same function, and what matters comes first."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers.pretrained import random_weights, same_features
from helpers.tiny import MODERN, tiny_config, tiny_pyramid
from poa.errors import InputError
from poa.initialization.order import ResNetOrder, ViTOrder, random_order
from poa.subnets import Subnet


@pytest.mark.parametrize("design", [[], MODERN, ["positions=learned-axial", "axial_grid=5"]])
def test_sorting_changes_nothing_but_the_order(design: list[str]) -> None:
    vit: Any = random_weights(
        tiny_config("registers=2", "layer_scale=1", "max_depth=4", *design).method.backbone.build()
    )
    order: Any = random_order(vit, torch.Generator().manual_seed(3))
    result: Any = order.applied(vit)
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        (before,), (after,) = vit([images]), result([images])
    for a, b in ((before.cls, after.cls), (before.patches, after.patches)):
        assert float((a[..., order.channels] - b).abs().max()) < 1e-5
    assert result.config.active(Subnet(16, 2)) == sorted(order.blocks[:2])
    with pytest.raises(InputError, match="block_order: expected each of 0..3 once, got "):
        replace(vit.config, block_order=(0, 1, 2))


def test_a_sorted_resnet_computes_the_same_and_keeps_what_matters() -> None:
    """Groups of its norms and blocks that have no effect come last, the first block of a stage never."""
    resnet: Any = random_weights(tiny_pyramid("resnet", "max_depths=1,2,3").method.backbone.build())
    groups, block = resnet.config.norm_groups, resnet.layer2[1]
    with torch.no_grad():
        block.conv2.weight[:, :4] = 0  # of 64 channels in 8 groups: half of the first
        block.conv3.weight[:, 8:16] = 0
        for parameter in resnet.layer3[1].norm3.parameters():
            parameter.zero_()
    images = [torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    order: Any = ResNetOrder.taylor(resnet, images, torch.Generator().manual_seed(0))
    size = block.conv2.in_channels // groups
    assert order.blocks == [0, 0, 1, 0, 2, 1] and sorted(order.second[2][-size:]) == list(range(8, 16))
    place = order.first[2].index(4)
    assert set(order.first[2][place : place + size]) & {0, 1, 2, 3} and place % size < size // 2
    for chosen in (order, random_order(resnet, torch.Generator().manual_seed(3))):
        same_features(resnet, chosen.applied(resnet))
    config, shallow = order.applied(resnet).config, Subnet(32, (1, 1, 2))
    assert [config.active(shallow, stage) for stage in range(3)] == [[0], [0], [0, 2]]
    assert config.of_one_size(shallow).block_order == ()
    with pytest.raises(InputError, match="block_order: expected all blocks of stages .* 0 as the first, got"):
        replace(resnet.config, block_order=(0, 1, 0, 0, 1, 2))


def test_what_is_unused_comes_last() -> None:
    """A block, heads, hidden units and channels without effect have the least importance."""
    vit: Any = random_weights(tiny_config("layer_scale=1", "max_depth=4").method.backbone.build())
    with torch.no_grad():
        for scale in (vit.blocks[2].ls1, vit.blocks[2].ls2):
            scale.gamma.zero_()
        vit.blocks[0].attn.proj.weight[:, :16] = 0
        vit.blocks[1].mlp.fc2.weight[:, 5] = 0
        writers = [s.gamma for block in vit.blocks for s in (block.ls1, block.ls2)]
        for weight in (
            vit.cls_token.permute(2, 0, 1),
            vit.pos_embed.permute(2, 0, 1),
            *vit.patch_embed.proj.parameters(),
            *writers,
        ):
            weight[:4] = 0
    images = [torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    order: Any = ViTOrder.taylor(vit, images, torch.Generator().manual_seed(0))
    assert order.blocks[-1] == 2 and order.heads[0] == [1, 0] and order.hidden[1][-1] == 5
    assert set(order.channels[-4:]) == {0, 1, 2, 3}
