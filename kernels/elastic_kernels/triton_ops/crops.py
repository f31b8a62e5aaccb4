"""Triton kernels of random multi-crop augmentation: boxes of uint8 canvases to normalised crops.

    resample   horizontally, then vertically: antialiased bicubic (a = -0.5), mirrored where flipped
    colour     brightness, contrast, saturation and hue in the order of each crop, then grayscale
    finish     Gaussian blur (horizontally, then vertically), solarisation, normalisation

What is random comes in a table, see `crops_table.py`. A filter is worked out where it is used, for all rows
and three channels of a tile at once. Pixels are 0..255, products and sums fp32.

Bytes: the horizontal pass reads the boxes as uint8 and writes touched rows * C * S elements; after it, every
pass reads and writes N * C * S * S elements, colour reads those of crops with contrast twice, and the
horizontal blur only touches the crops that are blurred.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.crops_table import (
    AMOUNT,
    CONTRAST,
    CONTRAST_TURN,
    COUNT,
    FIRST_ROW,
    FLIP,
    GAIN,
    HEIGHT,
    HUE,
    LEFT,
    OPERATION,
    SATURATION,
    SIGMA,
    SOLARIZE,
    TOP,
    WIDTH,
    clip,
    from_byte,
    tile_of,
)
from elastic_kernels.triton_ops.device import cdiv, unit_stride
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import register


@dataclass(frozen=True)
class TileConfig:
    """Launch settings: `rows` rows of `block` columns a program."""

    rows: int
    block: int
    warps: int


# 224 and 96 are multiples of the columns. With 4 warps a thread of the horizontal kernel has twice as many
# loads, and ptxas makes it wait for one after the other. Not timed on a GPU yet.
HORIZONTAL = TileConfig(32, 32, 8)
VERTICAL = BLUR = FINISH = TileConfig(32, 32, 4)
COLOUR_BLOCK, COLOUR_WARPS = 2048, 16  # pixels at a time of the one program that a crop has


@triton.jit
def _window(position, start, length, size):
    """Filters of output positions: centres, first pixels; of all of them: 1 / widening, end, taps.

    Pixels from the first one on that the box touches, before `end`, may be read.
    """
    scale = tl.div_rn(length, tl.cast(size, tl.float32))
    center = start + (position.to(tl.float32) + 0.5) * scale
    widening = tl.maximum(scale, 1.0)
    end = tl.ceil(start + length)
    first = tl.maximum(tl.ceil(center - 2 * widening - 0.5), tl.floor(start))
    taps = tl.minimum(tl.ceil(4 * widening) + 1, end - tl.floor(start)).to(tl.int32)
    return center, first, tl.div_rn(1.0, widening), end, taps


@triton.jit
def _tap(index, center, narrowing, end):
    """Weight of a pixel, not normalised, and a pixel that may be read for it."""
    x = tl.minimum(tl.abs((index + 0.5 - center) * narrowing), 2.0)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = tl.where(x < 1, near, far)
    return tl.where(index < end, weight, 0.0), tl.minimum(index, end - 1).to(tl.int32)


# Were it known that 16 divides the size, a thread would take columns side by side for the sake of the store,
# and work out as many filters; like this, a warp takes a line, and a thread one column of several rows.
@launched("batch", "size", "tiles_y", "tiles_x")
def _crops_horizontal_kernel(
    images_ptr, table_ptr, rows_ptr,
    batch, size, tiles_y, tiles_x,
    stride_b, stride_c, stride_h,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Pixel rows that a box touches, `[rows, channels, size]` one crop after the other."""
    crop, tile_y, tile_x = tile_of(tiles_y, tiles_x)
    table_ptr += crop * (GAIN + 2 * CHANNELS)
    top, left = tl.load(table_ptr + TOP), tl.load(table_ptr + LEFT)
    height, width = tl.load(table_ptr + HEIGHT), tl.load(table_ptr + WIDTH)
    rows = (tl.ceil(top + height) - tl.floor(top)).to(tl.int32)
    if tile_y * ROWS < rows:
        offs_r, offs_x = tile_y * ROWS + tl.arange(0, ROWS), tile_x * BLOCK + tl.arange(0, BLOCK)
        # What lies beyond the last row or column repeats it and is not stored.
        position = tl.minimum(offs_x, size - 1)
        if tl.load(table_ptr + FLIP) > 0:
            position = size - 1 - position
        center, first, narrowing, end, taps = _window(position, left, width, size)
        base = images_ptr + (crop % batch).to(tl.int64) * stride_b
        line = (tl.floor(top).to(tl.int32) + tl.minimum(offs_r, rows - 1)).to(tl.int64) * stride_h
        place = tl.load(table_ptr + FIRST_ROW).to(tl.int32, bitcast=True).to(tl.int64)
        out = rows_ptr + place * CHANNELS * size + offs_r[:, None] * CHANNELS * size + offs_x[None, :]
        mask = (offs_r < rows)[:, None] & (offs_x < size)[None, :]
        dtype: tl.constexpr = rows_ptr.dtype.element_ty
        for channel in tl.static_range(0, CHANNELS, 3):
            # Where there is no second or third channel, the first is read again and not stored.
            to_green = stride_c if channel + 1 < CHANNELS else 0
            to_blue = 2 * tl.cast(stride_c, tl.int64) if channel + 2 < CHANNELS else 0
            plane = base + channel * tl.cast(stride_c, tl.int64) if channel else base
            red = tl.zeros([ROWS, BLOCK], tl.float32)
            green, blue, total = red, red, tl.zeros([BLOCK], tl.float32)
            for tap in range(0, taps):
                weight, pixel = _tap(first + tap, center, narrowing, end)
                at = plane + line[:, None] + pixel[None, :]
                red += weight[None, :] * from_byte(tl.load(at))
                green += weight[None, :] * from_byte(tl.load(at + to_green))
                blue += weight[None, :] * from_byte(tl.load(at + to_blue))
                total += weight
            share = (1.0 / total)[None, :]
            tl.store(out + channel * size, clip(red * share).to(dtype), mask=mask)
            if channel + 1 < CHANNELS:
                tl.store(out + (channel + 1) * size, clip(green * share).to(dtype), mask=mask)
            if channel + 2 < CHANNELS:
                tl.store(out + (channel + 2) * size, clip(blue * share).to(dtype), mask=mask)


@launched("tiles_y", "tiles_x")
def _crops_vertical_kernel(
    rows_ptr, table_ptr, crops_ptr,
    size, tiles_y, tiles_x,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The touched rows of each crop to `[channels, size, size]`."""
    crop, tile_y, tile_x = tile_of(tiles_y, tiles_x)
    table_ptr += crop * (GAIN + 2 * CHANNELS)
    top, height = tl.load(table_ptr + TOP), tl.load(table_ptr + HEIGHT)
    offs_y, offs_x = tile_y * ROWS + tl.arange(0, ROWS), tile_x * BLOCK + tl.arange(0, BLOCK)
    center, first, narrowing, end, taps = _window(tl.minimum(offs_y, size - 1), top, height, size)
    place = tl.load(table_ptr + FIRST_ROW).to(tl.int32, bitcast=True).to(tl.int64)
    base = rows_ptr + place * CHANNELS * size + offs_x[None, :]
    mask_x = (offs_x < size)[None, :]
    area = size * size
    out = crops_ptr + crop.to(tl.int64) * CHANNELS * area + offs_y[:, None] * size + offs_x[None, :]
    mask = (offs_y < size)[:, None] & mask_x
    dtype: tl.constexpr = crops_ptr.dtype.element_ty
    for channel in tl.static_range(0, CHANNELS, 3):
        to_green = size if channel + 1 < CHANNELS else 0
        to_blue = 2 * size if channel + 2 < CHANNELS else 0
        red = tl.zeros([ROWS, BLOCK], tl.float32)
        green, blue, total = red, red, tl.zeros([ROWS], tl.float32)
        for tap in range(0, taps):
            weight, pixel = _tap(first + tap, center, narrowing, end)
            at = base + channel * size + ((pixel - tl.floor(top).to(tl.int32)) * CHANNELS * size)[:, None]
            red += weight[:, None] * tl.load(at, mask=mask_x, other=0.0).to(tl.float32)
            green += weight[:, None] * tl.load(at + to_green, mask=mask_x, other=0.0).to(tl.float32)
            blue += weight[:, None] * tl.load(at + to_blue, mask=mask_x, other=0.0).to(tl.float32)
            total += weight
        share = (1.0 / total)[:, None]
        tl.store(out + channel * area, clip(red * share).to(dtype), mask=mask)
        if channel + 1 < CHANNELS:
            tl.store(out + (channel + 1) * area, clip(green * share).to(dtype), mask=mask)
        if channel + 2 < CHANNELS:
            tl.store(out + (channel + 2) * area, clip(blue * share).to(dtype), mask=mask)


@triton.jit
def _luma(red, green, blue):
    return red * 0.299 + green * 0.587 + blue * 0.114


@triton.jit
def _turn_hue(red, green, blue, shift):
    """Largest and smallest channel stay; between, each one is a trapezoid function of the hue."""
    high = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = high - low
    sixths = tl.where(high == green, blue - red + 2 * chroma, red - green + 4 * chroma)
    sixths = tl.where(high == red, green - blue, sixths)
    # Gray has no hue: 0 / tiny is as good as any.
    sixths = sixths / tl.maximum(chroma, 1e-6) + 6 * shift
    sixths -= 6 * tl.floor(sixths * (1 / 6))
    share_red = tl.minimum(tl.maximum(tl.abs(sixths - 3) - 1, 0.0), 1.0)
    share_green = tl.minimum(tl.maximum(2 - tl.abs(sixths - 2), 0.0), 1.0)
    share_blue = tl.minimum(tl.maximum(2 - tl.abs(sixths - 4), 0.0), 1.0)
    return low + share_red * chroma, low + share_green * chroma, low + share_blue * chroma


@triton.jit
def _recolour(red, green, blue, table_ptr, turns, mean):
    """The first operations of a crop: turns of the hue, and blends with black, the mean or the gray image."""
    for turn in range(0, turns):
        operation = tl.load(table_ptr + OPERATION + turn)
        amount = tl.load(table_ptr + AMOUNT + turn)
        if operation == HUE:
            red, green, blue = _turn_hue(red, green, blue, amount)
        elif operation >= 0:
            even = tl.where(operation == CONTRAST, mean, 0.0)
            other = tl.where(operation == SATURATION, _luma(red, green, blue), even) * (1 - amount)
            red = clip(other + red * amount)
            green = clip(other + green * amount)
            blue = clip(other + blue * amount)
    return red, green, blue


@triton.jit
def _load_colours(base, offs, mask, area):
    red = tl.load(base + offs, mask=mask, other=0.0).to(tl.float32)
    green = tl.load(base + area + offs, mask=mask, other=0.0).to(tl.float32)
    blue = tl.load(base + 2 * area + offs, mask=mask, other=0.0).to(tl.float32)
    return red, green, blue


@launched()
def _crops_colour_kernel(crops_ptr, table_ptr, area, BLOCK: tl.constexpr):
    """A crop a program, in place; contrast needs the crop's mean luma at its turn, hence two passes."""
    crop = tl.program_id(0)
    table_ptr += crop * (GAIN + 2 * 3)
    turns = tl.load(table_ptr + COUNT).to(tl.int32)
    if turns > 0:
        base = crops_ptr + crop.to(tl.int64) * 3 * area
        before = tl.load(table_ptr + CONTRAST_TURN).to(tl.int32)
        mean = 0.0
        if before >= 0:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, area, BLOCK):
                offs = start + tl.arange(0, BLOCK)
                red, green, blue = _load_colours(base, offs, offs < area, area)
                red, green, blue = _recolour(red, green, blue, table_ptr, before, 0.0)
                total += _luma(red, green, blue)  # black beyond the end stays black before the contrast
            mean = tl.sum(total, 0) / area
        for start in range(0, area, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            mask = offs < area
            red, green, blue = _load_colours(base, offs, mask, area)
            red, green, blue = _recolour(red, green, blue, table_ptr, turns, mean)
            tl.store(base + offs, red.to(crops_ptr.dtype.element_ty), mask=mask)
            tl.store(base + area + offs, green.to(crops_ptr.dtype.element_ty), mask=mask)
            tl.store(base + 2 * area + offs, blue.to(crops_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _reflect(index, size):
    index = tl.abs(index)
    return tl.minimum(index, 2 * (size - 1) - index)


@triton.jit
def _blurred(plane_ptr, offs_y, offs_x, mask, sigma, taps, size, VERTICAL: tl.constexpr):
    """A tile of a plane blurred along one axis; the border is reflected."""
    x = tl.zeros([offs_y.shape[0], offs_x.shape[0]], tl.float32)
    total = 0.0
    for tap in range(0, taps):
        offset = tap - taps // 2
        away = offset.to(tl.float32) / sigma
        weight = tl.exp(-0.5 * away * away)
        if VERTICAL:
            at = (_reflect(offs_y + offset, size) * size)[:, None] + offs_x[None, :]
        else:
            at = (offs_y * size)[:, None] + _reflect(offs_x + offset, size)[None, :]
        x += weight * tl.load(plane_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total += weight
    return x / total


@launched("tiles_y", "tiles_x", "taps")
def _crops_blur_kernel(
    crops_ptr, table_ptr, blurred_ptr,
    size, tiles_y, tiles_x, taps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Horizontally, and only the crops that are blurred."""
    plane, tile_y, tile_x = tile_of(tiles_y, tiles_x)
    sigma = tl.load(table_ptr + plane // CHANNELS * (GAIN + 2 * CHANNELS) + SIGMA)
    if sigma > 0:
        offs_y, offs_x = tile_y * ROWS + tl.arange(0, ROWS), tile_x * BLOCK + tl.arange(0, BLOCK)
        mask = (offs_y < size)[:, None] & (offs_x < size)[None, :]
        base = plane.to(tl.int64) * size * size
        x = _blurred(crops_ptr + base, offs_y, offs_x, mask, sigma, taps, size, False)
        out = blurred_ptr + base + offs_y[:, None] * size + offs_x[None, :]
        tl.store(out, x.to(blurred_ptr.dtype.element_ty), mask=mask)


@launched("tiles_y", "tiles_x", "taps")
def _crops_finish_kernel(
    crops_ptr, blurred_ptr, table_ptr, out_ptr,
    size, tiles_y, tiles_x, taps,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The vertical blur, solarisation and normalisation."""
    plane, tile_y, tile_x = tile_of(tiles_y, tiles_x)
    table_ptr += plane // CHANNELS * (GAIN + 2 * CHANNELS)
    offs_y, offs_x = tile_y * ROWS + tl.arange(0, ROWS), tile_x * BLOCK + tl.arange(0, BLOCK)
    mask = (offs_y < size)[:, None] & (offs_x < size)[None, :]
    base = plane.to(tl.int64) * size * size
    at = base + offs_y[:, None] * size + offs_x[None, :]
    sigma = tl.load(table_ptr + SIGMA)
    if sigma > 0:
        x = _blurred(blurred_ptr + base, offs_y, offs_x, mask, sigma, taps, size, True)
    else:
        x = tl.load(crops_ptr + at, mask=mask, other=0.0).to(tl.float32)
    # Inverts from 128 up, which for integers is the smaller of the value and its inverse.
    x = tl.where(tl.load(table_ptr + SOLARIZE) > 0, tl.minimum(x, 255 - x), x)
    gain_ptr = table_ptr + GAIN + plane % CHANNELS
    y = x * tl.load(gain_ptr) - tl.load(gain_ptr + CHANNELS)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def crops_resample(
    images: Tensor, table: Tensor, size: int, most_rows: int, all_rows: int, dtype: torch.dtype
) -> Tensor:
    """Boxes of uint8 `[B, C, H, W]` as `[N, C, size, size]` of `dtype` in 0..255.

    `most_rows` and `all_rows` count the pixel rows that boxes touch: of the tallest, and of all together.
    """
    channels = images.shape[1]
    crops = torch.empty(table.shape[0], channels, size, size, dtype=dtype, device=images.device)
    if crops.shape[0]:
        images = unit_stride(images)
        rows = torch.empty(all_rows, channels, size, dtype=dtype, device=images.device)
        grid, tiles = _grid(crops.shape[0], most_rows, size, HORIZONTAL)
        _crops_horizontal_kernel[grid](
            images, table, rows,
            images.shape[0], size, *tiles,
            *images.stride()[:3],
            CHANNELS=channels, **_options(HORIZONTAL),
        )  # fmt: skip
        grid, tiles = _grid(crops.shape[0], size, size, VERTICAL)
        _crops_vertical_kernel[grid](
            rows, table, crops, size, *tiles, CHANNELS=channels, **_options(VERTICAL)
        )
    return crops


def crops_colour_(crops: Tensor, table: Tensor) -> None:
    """The colour operations of contiguous crops `[N, 3, S, S]`, in place."""
    area = crops.shape[2] * crops.shape[3]
    if crops.shape[0]:
        _crops_colour_kernel[(crops.shape[0],)](
            crops, table, area, BLOCK=COLOUR_BLOCK, num_warps=COLOUR_WARPS
        )


def crops_finish(crops: Tensor, table: Tensor, taps: int, dtype: torch.dtype) -> Tensor:
    """Blurred, solarised and normalised crops `[N, C, S, S]` of `dtype`; `taps` is 0 if none is blurred."""
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    count, channels, size, _ = crops.shape
    if count:
        blurred = crops
        if taps:
            blurred = torch.empty(crops.shape, dtype=crops.dtype, device=crops.device)
            grid, tiles = _grid(count * channels, size, size, BLUR)
            _crops_blur_kernel[grid](
                crops, table, blurred, size, *tiles, taps, CHANNELS=channels, **_options(BLUR)
            )
        grid, tiles = _grid(count * channels, size, size, FINISH)
        _crops_finish_kernel[grid](
            crops, blurred, table, out, size, *tiles, taps, CHANNELS=channels, **_options(FINISH)
        )
    return out


def _grid(images: int, height: int, width: int, config: TileConfig) -> tuple[tuple[int], tuple[int, int]]:
    """Programs, and tiles of an image (vertically, horizontally)."""
    tiles = cdiv(height, config.rows), cdiv(width, config.block)
    return (images * tiles[0] * tiles[1],), tiles


def _options(config: TileConfig) -> dict[str, int]:
    return {"ROWS": config.rows, "BLOCK": config.block, "num_warps": config.warps}


register(
    "crops_resample(Tensor images, Tensor table, int size, int most_rows, int all_rows, ScalarType dtype)"
    " -> Tensor",
    crops_resample,
    lambda images, table, size, most_rows, all_rows, dtype: images.new_empty(
        table.shape[0], images.shape[1], size, size, dtype=dtype
    ),
)
register("crops_colour_(Tensor(a!) crops, Tensor table) -> ()", crops_colour_)
register(
    "crops_finish(Tensor crops, Tensor table, int taps, ScalarType dtype) -> Tensor",
    crops_finish,
    lambda crops, table, taps, dtype: crops.new_empty(crops.shape, dtype=dtype),
)
