"""Windows of large maps: what each block of a ViT sees, and that nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from poa.backbones.vit import ElasticViT, ViTConfig
from poa.backbones.windows import MapWindows, whole_blocks
from poa.evaluate.pyramids import SubnetPyramid
from poa.subnets import Subnet

CPU = torch.device("cpu")
SMALL = {"image_size": 32, "patch_size": 8, "min_width": 16, "max_width": 32, "min_depth": 4, "head_dim": 8}


def vit(**options: Any) -> ElasticViT:
    config = ViTConfig(**{**SMALL, "max_depth": 8, "layer_scale": 1.0, **options})
    network = config.build(torch.Generator().manual_seed(0))
    for parameter in network.parameters():  # far from the identity
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return network


def test_windows_are_even_and_cover_the_map() -> None:
    windows = MapWindows.of(2, (7, 5), 2, 3, CPU)
    assert windows.groups == ((4, 2 + 4), (6, 2 + 6), (2, 2 + 9))
    x = torch.randn(2 * 37, 4)
    torch.testing.assert_close(windows.join(windows.split(x)), x)
    apart = windows.split(x) + torch.arange(len(windows.order))[:, None]  # copies that differ
    joined = windows.join(apart).view(2, 37, 4)
    copies = [apart[windows.order == token].mean(0) for token in (0, 1)]
    torch.testing.assert_close(joined[0, :2], torch.stack(copies))
    assert (
        whole_blocks(12) == {2, 5, 8, 11}
        and whole_blocks(3) == {0, 1, 2}
        and whole_blocks(24) == {5, 11, 17, 23}
    )


@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"positions": "rotary"}], ids=str)
def test_blocks_see_their_windows(options: dict[str, Any]) -> None:
    """As a plain loop over windows has it, forward and backward."""
    network, subnet = vit(**options), Subnet(16, 8)
    images = torch.randn(2, 3, 48, 40, generator=torch.Generator().manual_seed(2))
    (got,) = network.stage_maps(images, subnet, window=3)
    (whole,) = network.stage_maps(images, subnet)
    assert got.shape == whole.shape == (2, 6, 5, 16) and not torch.allclose(got, whole, atol=1e-2)
    for large in (6, 100):
        assert torch.equal(network.stage_maps(images, subnet, window=large)[0], whole)
    torch.testing.assert_close(got, by_hand(network, images, subnet, 3))
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    parameters = [p for p in network.parameters() if p.requires_grad and p is not network.mask_token]
    grads = torch.autograd.grad((got * weights).sum(), parameters, allow_unused=True)
    expected = torch.autograd.grad(
        (by_hand(network, images, subnet, 3) * weights).sum(), parameters, allow_unused=True
    )
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_detectors_have_them() -> None:
    network, images = vit(), torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    levels = []
    for window in (0, 2, 4):
        torch.manual_seed(0)
        pyramid = SubnetPyramid(network, Subnet(16, 8), 8, frozen=True, window=window)
        levels.append(pyramid(images)["2"])
    assert torch.equal(levels[0], levels[2]) and not torch.allclose(levels[0], levels[1], atol=1e-3)


def by_hand(network: ElasticViT, images: Tensor, subnet: Subnet, size: int) -> Tensor:
    (height, breadth), prefix = network._grid(images), network.config.prefix
    x, _ = network.embed([images], subnet.width)
    rotary = network._rotary([images])
    x = x.unflatten(0, (len(images), -1))
    places = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])

    def block_on(block: Any, rows: Tensor) -> Tensor:
        """Of the tokens at `rows` of one image, one sequence."""
        turned = rotary and rotary.rows(rows.flatten())
        return block(x.flatten(0, 1)[rows], [(1, len(rows))], None, rotary=turned)

    for number, block in enumerate(network.active_blocks(subnet)):
        images_after = []
        for image in range(len(images)):
            tokens = places[image]
            if number in whole_blocks(8):
                images_after.append(block_on(block, tokens))
                continue
            grid = tokens[prefix:].view(height, breadth)
            firsts, patches = [], torch.zeros(height * breadth, subnet.width)
            for rows in grid.tensor_split(-(-height // size), 0):
                for window in rows.tensor_split(-(-breadth // size), 1):
                    after = block_on(block, torch.cat([tokens[:prefix], window.flatten()]))
                    firsts.append(after[:prefix])
                    patches = patches.index_put((window.flatten() - tokens[prefix],), after[prefix:])
            images_after.append(torch.cat([torch.stack(firsts).mean(0), patches]))
        x = torch.stack(images_after)
    return network.normalise(x)[:, prefix:].unflatten(1, (height, breadth))
