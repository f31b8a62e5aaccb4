"""What the kernels of crops share: a table with a row for each crop, tiles of images, and levels.

What is random comes in the table, so that every crop takes its own branches and filters and the number of
launches does not grow with what was drawn.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CONTRAST, SATURATION, HUE = map(tl.constexpr, (1, 2, 3))  # and brightness 0, as columns of the factors
SKIPPED = -1
TURNS = 5  # colour operations of a crop at most: the jitter's four, then grayscale

# Columns of the table, see `crop_table`. Kernels use them and helpers do not: where a helper of another
# module uses a constant, Triton's key of a kernel depends on which kernels were asked for before.
TOP, LEFT, HEIGHT, WIDTH, FLIP, FIRST_ROW, SIGMA, SOLARIZE, COUNT, CONTRAST_TURN = map(
    tl.constexpr, range(10)
)
OPERATION, AMOUNT, GAIN = map(tl.constexpr, (10, 15, 20))  # and the shifts after as many gains as channels


@triton.jit
def tile_of(tiles_y, tiles_x):
    """Number of the image, and of the tile in it, of this program."""
    pid = tl.program_id(0)
    rest = pid // tiles_x
    return rest // tiles_y, rest % tiles_y, pid % tiles_x


@triton.jit
def clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0)


@triton.jit
def from_byte(x):
    """A uint8 as float32, put into the digits of 2 ** 23: faster than the GPU's conversion."""
    return (x.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


def crop_table(
    boxes: Tensor,
    flip: Tensor,
    rows: Tensor,
    operations: Tensor,
    amounts: Tensor,
    sigma: Tensor,
    solarize: Tensor,
    gain: Tensor,
    shift: Tensor,
) -> Tensor:
    """What the kernels read of each crop, float32 `[N, columns]`.

    Args:
        boxes, flip, sigma, solarize: as in `elastic_kernels.crops.CropParameters`.
        rows: int64 `[N]`, pixel rows that each box touches. The table holds how many rows of the intermediate
            image come before those of the crop, as the bits of an int32.
        operations: int64 `[N, TURNS]`, `SKIPPED` or an operation. The table also holds how many turns there
            are up to the last operation, and which one is the contrast, or -1.
        amounts: float32 `[N, TURNS]`, factors, and turns of the hue.
        gain, shift: float32 `[channels]`; the result is x * gain - shift.
    """
    turns = torch.arange(TURNS)
    columns = [
        boxes,
        flip[:, None],
        (rows.cumsum(0) - rows).int().view(torch.float32)[:, None],
        sigma[:, None],
        solarize[:, None],
        ((operations >= 0) * (turns + 1)).amax(1, keepdim=True),
        torch.where(operations == CONTRAST.value, turns, -1).amax(1, keepdim=True),
        operations,
        amounts,
        gain.expand(len(rows), -1),
        shift.expand(len(rows), -1),
    ]
    return torch.cat([column.float() for column in columns], 1)
