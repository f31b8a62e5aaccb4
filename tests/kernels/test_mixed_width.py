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


@pytest.mark.parametrize("scale", ["offset", None, 0.5])
def test_block(scale: Scale) -> None:
    torch.manual_seed(0)
    block = ek.ElasticBlock(24, 40, 4, layer_scale=0.5, scale=scale).double()
    parts = [poisoned(width, 3) for width in WIDTHS]
    widths = torch.tensor(WIDTHS).repeat_interleave(3)
    together = ek.mixed_width_block(block, torch.cat(parts), [(3, 3)], widths)
    alone = [block(part[:, :width], [(1, 3)]) for part, width in zip(parts, WIDTHS, strict=True)]
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
