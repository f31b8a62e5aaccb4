"""Permutations of channels, heads and hidden units change no function, and make chosen parts prefixes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import elastic_kernels as ek
from helpers.kernels.numerics import draw

C, DIM = 24, 8


def modern() -> ek.ElasticPreNormBlock:
    norms = ek.ElasticRMSNorm(C), ek.ElasticLayerNorm(C)
    attn = ek.ElasticRotaryAttention(C, DIM, qk_norm="rms")
    return ek.ElasticPreNormBlock(norms[0], attn, norms[1], ek.ElasticSwiGLU(C, 20), ek.LayerScale(C, 1.0))


def windows() -> ek.ElasticSwinBlock:
    block = ek.ElasticSwinBlock(C, 20, DIM, 2, 1)
    nn.init.normal_(block.attn.relative_position_bias_table)
    return block


BLOCKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "plain": (lambda: ek.ElasticBlock(C, 20, DIM, layer_scale=0.5), [(2, 6)]),
    "modern": (modern, [(2, 6)]),
    "windows": (windows, [(2, 2, 3)]),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks(kind: str) -> None:
    torch.manual_seed(0)
    make, groups = BLOCKS[kind]
    block, x = make().double(), draw(12, C)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    before = block(x, groups)
    ek.sort_heads(block.attn, torch.tensor([2, 0, 1]))
    ek.sort_hidden(block.mlp, torch.randperm(20))
    torch.testing.assert_close(block(x, groups), before)
    order = torch.randperm(C)
    ek.sort_channels(block, order)
    torch.testing.assert_close(block(x[:, order], groups), before[:, order])


def test_middles_of_a_resnet() -> None:
    """Three groups of four channels; the norms between are neither of one mean nor of one variance."""
    torch.manual_seed(0)
    block, x = ek.ElasticBottleneck(6, 12, 6, groups=3, stride=2, shortcut=True).double(), draw(2, 5, 5, 6)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) / 4)
    before = block(x, 12)
    orders = [
        torch.cat([4 * group + torch.randperm(4) for group in groups]) for groups in ((2, 0, 1), (1, 2, 0))
    ]
    ek.sort_middle(block, *orders)
    torch.testing.assert_close(block(x, 12), before)
    with pytest.raises(ValueError, match="expected groups of 4 channels to stay together"):
        ek.sort_middle(block, orders[0], torch.randperm(12))


def test_chosen_units_become_a_prefix() -> None:
    mlp, x = ek.ElasticMLP(C, 20, scale=None).double(), draw(5, C)
    chosen = torch.tensor([17, 3, 8])
    h = torch.nn.functional.gelu(x @ mlp.fc1.weight[chosen].T + mlp.fc1.bias[chosen])
    expected = h @ mlp.fc2.weight[:, chosen].T + mlp.fc2.bias
    rest = torch.tensor([i for i in range(20) if i not in chosen])
    ek.sort_hidden(mlp, torch.cat([chosen, rest]))
    torch.testing.assert_close(mlp(x, hidden=3), expected)


def test_embedding_and_linear() -> None:
    embed, head, order = ek.ElasticPatchEmbed(2, C).double(), nn.Linear(C, 3).double(), torch.randperm(C)
    images = draw(1, 3, 4, 4)
    tokens = embed(images, C)
    logits = head(tokens)
    ek.sort_channels(embed, order)
    ek.sort_linear(head, inputs=order, outputs=torch.tensor([2, 1, 0]))
    torch.testing.assert_close(embed(images, C), tokens[..., order])
    torch.testing.assert_close(head(tokens[..., order]), logits.flip(-1))


@pytest.mark.parametrize("order", [torch.tensor([0, 0, 1]), torch.tensor([0, 1]), torch.arange(3.0)])
def test_wrong_orders(order: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a permutation of 0\.\.2 in int64, got \[0\.?0?, "):
        ek.sort_heads(ek.ElasticAttention(C, DIM), order)
    with pytest.raises(TypeError, match="expected a layer of a transformer, got Conv2d"):
        ek.sort_channels(nn.Conv2d(3, 3, 1), order)
