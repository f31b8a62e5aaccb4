"""A batch of several widths equals each width by itself, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import elastic_kernels as ek
from elastic_kernels.linear import Scale
from helpers.kernels.numerics import draw

WIDTHS = (8, 16, 24)


def poisoned(width: int, rows: int) -> Tensor:
    """Rows that are NaN beyond their width, which is never read."""
    return torch.cat([draw(rows, width, seed=width), torch.full((rows, 24 - width), torch.nan)], 1).double()


def modern(scale: Scale) -> ek.ElasticPreNormBlock:
    """RMSNorm before attention with norms of queries and keys, LayerNorm before a gate."""
    attn = ek.ElasticRotaryAttention(24, 4, qk_norm="layer", scale=scale)
    mlp = ek.ElasticSwiGLU(24, 40, scale=scale, activation="gelu")
    return ek.ElasticPreNormBlock(ek.ElasticRMSNorm(24), attn, ek.ElasticLayerNorm(24), mlp)


@pytest.mark.parametrize("free", [False, True], ids=["shares", "free"])
@pytest.mark.parametrize("kind", ["plain", "modern"])
@pytest.mark.parametrize("scale", ["offset", None, 0.5])
def test_block(scale: Scale, kind: str, free: bool) -> None:
    torch.manual_seed(0)
    plain = ek.ElasticBlock(24, 40, 4, layer_scale=0.5, scale=scale)
    block = (plain if kind == "plain" else modern(scale)).double()
    parts = [poisoned(width, 3) for width in WIDTHS]
    widths = torch.tensor(WIDTHS).repeat_interleave(3)
    sizes = [{"hidden": 7 + width, "heads": 6 - width // 8} if free else {} for width in WIDTHS]
    tensors = {
        key: torch.tensor([size[key] for size in sizes]).repeat_interleave(3)
        for key in ("hidden", "heads")
        if free
    }
    angles = {key: ek.Rotary.of_grid(1, 2, 4, prefix=1, count=n) for key, n in (("one", 1), ("all", 3))}
    rotary = [{"rotary": angles[n]} for n in ("one", "all")]
    together = ek.mixed_width_block(block, torch.cat(parts), [(3, 3)], widths, **tensors, **rotary[1])
    alone = [
        block(part[:, :width], [(1, 3)], **size, **rotary[0])
        for part, width, size in zip(parts, WIDTHS, sizes, strict=True)
    ]
    padded = torch.cat([torch.nn.functional.pad(y, (0, 24 - y.shape[1])) for y in alone])
    torch.testing.assert_close(together, padded)
    gradients = [torch.autograd.grad(y.sin().sum(), list(block.parameters())) for y in (together, padded)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        (torch.tensor([1, 2]), r"expected widths \[3\], got \[2\]"),
        (torch.tensor([1.0, 2, 3]), r"expected widths int64 \[3\], got torch.float32"),
    ],
)
def test_wrong_widths(widths: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ek.mixed_width_linear(torch.zeros(3, 4), torch.zeros(4, 4), None, widths, widths)
    with pytest.raises(ValueError, match=r"x \[rows, 4\], got \[3, 5\]"):
        ek.mixed_width_linear(torch.zeros(3, 5), torch.zeros(4, 4), None, widths, widths)


@pytest.mark.parametrize("scale", ["offset", 0.5])
def test_widths_beyond_the_largest_count_as_the_largest(scale: Scale) -> None:
    block, x = modern(scale).double(), draw(3, 24)
    most, more = (torch.full((3,), width) for width in (24, 30))
    assert torch.equal(*(ek.mixed_width_block(block, x, [(1, 3)], widths) for widths in (most, more)))
