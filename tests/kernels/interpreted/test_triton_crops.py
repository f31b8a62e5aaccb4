"""The fused augmentation under Triton's interpreter, against its definition on the CPU.

With these means and deviations crops come out in levels 0..255.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import elastic_kernels.triton_ops.crops  # noqa: F401, registers the operators
from elastic_kernels import backend
from elastic_kernels.crops import CropParameters, crops_backend, render_crops
from elastic_kernels.triton_ops.crops_table import GAIN
from helpers.crops import HUE, LEVELS, neutral, noise
from helpers.kernels.numerics import opcheck
from poa.data.augment import draw_views, render
from poa.data.crops import CropsConfig

TOLERANCES = {torch.float32: 2e-3, torch.float16: 0.35}  # levels, by the dtype between kernels
BOXES = {
    (20, 28): [(0, 0, 20, 28), (3, 7, 9, 6), (19, 27, 1, 1), (0, 20, 20, 8), (11, 0, 2, 28), (5, 5, 8, 8)],
    (40, 33): [(0, 0, 40, 33), (36, 1, 4, 32), (0, 0, 1, 1), (7, 9, 33, 3), (1, 2, 38, 30), (2, 3, 16, 16)],
}


def fused(images: Tensor, views: CropParameters, size: int, blur_kernel: int = 9, **options: Any) -> Tensor:
    return render_crops(images, views, size, **({"blur_kernel": blur_kernel, **LEVELS} | options))


def assert_like_plain(
    images: Tensor,
    views: CropParameters,
    size: int,
    config: CropsConfig | None = None,
    intermediate: torch.dtype = torch.float32,
) -> None:
    config = config or CropsConfig(**LEVELS)
    with patch("elastic_kernels.crops.between_kernels", return_value=intermediate):
        ours = fused(images, views, size, config.blur_kernel, mean=config.mean, std=config.std)
    with backend("reference"):
        plain = render(images, views, size, config)
    assert ours.shape == plain.shape and ours.dtype == torch.float32 and ours.is_contiguous()
    assert (ours - plain).abs().max() <= TOLERANCES[intermediate]


@pytest.mark.parametrize("intermediate", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [8, 13, 16])
@pytest.mark.parametrize("canvas", BOXES, ids=str)
def test_resampling(canvas: tuple[int, int], size: int, intermediate: torch.dtype) -> None:
    boxes = BOXES[canvas]
    views = neutral(boxes, flip=torch.arange(len(boxes)) % 3 == 0)
    images = noise(2, 3, *canvas)
    assert_like_plain(images, views, size, intermediate=intermediate)
    assert_like_plain((images > 127).to(torch.uint8) * 255, views, size, intermediate=intermediate)


@pytest.mark.parametrize("size", [1, 2])
def test_tiny_crops(size: int) -> None:
    assert_like_plain(noise(2, 3, 40, 33), neutral(BOXES[40, 33]), size)


def test_crops_of_several_tiles() -> None:
    size, boxes = 48, [(3, 2, 67, 41), (10, 30, 20, 20)]
    views = neutral(
        boxes,
        flip=torch.tensor([False, True]),
        jitter=torch.tensor([True, True]),
        factors=torch.tensor([[1.3, 0.7, 1.2, 0.1], [0.8, 1.4, 0.9, -0.1]]),
        order=torch.tensor([[3, 1, 0, 2], [0, 2, 1, 3]]),
        sigma=torch.tensor([0.0, 1.3]),
    )
    assert_like_plain(noise(1, 3, 70, 50), views, size)


def test_canvases_of_other_strides() -> None:
    images, views = noise(2, 3, 20, 28), neutral(BOXES[20, 28])
    expected = fused(images, views, 8)
    padded = torch.zeros(2, 3, 24, 40, dtype=torch.uint8)
    padded[:, :, :20, :28] = images
    others = (
        padded[:, :, :20, :28],
        images.to(memory_format=torch.channels_last),
        images.transpose(0, 1).contiguous().transpose(0, 1),
    )
    for other in others:
        assert not other.is_contiguous()
        assert torch.equal(fused(other, views, 8), expected)


def test_fractional_boxes_read_the_pixels_they_touch() -> None:
    images, boxes = noise(1, 3, 20, 28), torch.tensor([[2.25, 3.5, 9.5, 11.75], [0.1, 16.0, 19.9, 12.0]])
    views = dataclasses.replace(neutral([(0, 0, 1, 1)] * 2), boxes=boxes)
    assert_like_plain(images, views, 8)


def test_reads_nothing_outside_of_the_boxes() -> None:
    views = dataclasses.replace(
        neutral([(4, 8, 15, 12), (9, 3, 4, 5)]),
        jitter=torch.tensor([True, True]),
        factors=torch.full((2, 4), 0.8),
        sigma=torch.tensor([1.0, 0.5]),
    )
    for crop, (top, left, height, width) in enumerate(views.boxes.tolist()):
        one = CropParameters(**{k: x[crop : crop + 1] for k, x in vars(views).items() if x is not None})
        images = noise(1, 3, 20, 28)
        poisoned = noise(1, 3, 20, 28, seed=1)
        inside = (..., slice(top, top + height), slice(left, left + width))
        poisoned[inside] = images[inside]
        assert torch.equal(fused(images, one, 10), fused(poisoned, one, 10))


@pytest.mark.parametrize("intermediate", TOLERANCES, ids=str)
@pytest.mark.parametrize("operation", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_each_operation_alone(operation: int, intermediate: torch.dtype) -> None:
    views = neutral([(2, 3, 16, 12)] * 4, jitter=torch.tensor([True, True, False, True]))
    amounts = torch.tensor([-0.4, 0.3, 0.2, 0.0] if operation == HUE else [0.6, 1.4, 1.3, 0.0])
    views.factors[:, operation] = amounts
    assert_like_plain(noise(2, 3, 20, 28), views, 9, intermediate=intermediate)


def test_operations_that_change_nothing_are_left_out() -> None:
    boxes = [(2, 3, 16, 12)] * 2
    jittered = neutral(boxes, jitter=torch.tensor([True, True]))
    images = noise(2, 3, 20, 28)
    assert torch.equal(fused(images, jittered, 9), fused(images, neutral(boxes), 9))


@pytest.mark.parametrize("intermediate", TOLERANCES, ids=str)
def test_all_orders(intermediate: torch.dtype) -> None:
    orders = torch.tensor(list(itertools.permutations(range(4))))
    draw = torch.Generator().manual_seed(1)
    factors = torch.empty(24, 4).uniform_(0.6, 1.4, generator=draw)
    factors[:, HUE] = factors[:, HUE] / 4 - 0.25
    views = neutral(
        [(0, 0, 12, 12), (3, 5, 17, 20)] * 12,
        jitter=torch.ones(24, dtype=torch.bool),
        factors=factors,
        order=orders,
        grayscale=torch.arange(24) % 5 == 0,
    )
    assert_like_plain(noise(2, 3, 20, 28), views, 8, intermediate=intermediate)


def test_hue_across_sextants_and_gray_pixels() -> None:
    levels = torch.tensor([0, 90, 180, 255])
    colours = torch.cartesian_prod(levels, levels, levels)  # ties between channels, gray, every sextant
    images = colours.T.reshape(1, 3, 8, 8).to(torch.uint8)
    shifts = torch.linspace(-0.5, 0.5, 11)
    views = neutral([(0, 0, 8, 8)] * 11, jitter=torch.ones(11, dtype=torch.bool))
    views.factors[:, HUE] = shifts
    assert_like_plain(images, views, 8)


@pytest.mark.parametrize("intermediate", TOLERANCES, ids=str)
@pytest.mark.parametrize("taps", [1, 3, 9])
def test_blur(taps: int, intermediate: torch.dtype) -> None:
    views = neutral([(0, 0, 20, 28), (4, 4, 8, 8)] * 2, sigma=torch.tensor([0.0, 0.1, 2.0, 0.7]))
    config = CropsConfig(**LEVELS, blur_kernel=taps)
    assert_like_plain(noise(2, 3, 20, 28), views, 8, config, intermediate)


def test_grayscale_and_solarisation() -> None:
    views = neutral(
        [(0, 0, 20, 28), (4, 4, 8, 8)] * 2,
        grayscale=torch.tensor([True, False, True, False]),
        solarize=torch.tensor([True, True, False, False]),
    )
    assert_like_plain(noise(2, 3, 20, 28), views, 8)


def everything(seed: int = 0, channels: int = 3) -> tuple[Tensor, CropParameters, CropsConfig]:
    chances: dict[str, Any] = {"blur": (0.5, 0.5, 0.5), "solarize": (0.3, 0.3, 0.3)}
    levels = {name: values[:1] * channels for name, values in LEVELS.items()}
    config = CropsConfig(global_size=12, local_size=12, local_count=0, **chances, **levels)
    sizes = torch.tensor([[40, 33], [20, 28], [33, 9]])
    views, _ = draw_views(config, sizes, torch.Generator().manual_seed(seed))
    return noise(3, channels, 40, 33), views, config


@pytest.mark.parametrize("intermediate", TOLERANCES, ids=str)
def test_everything_together(intermediate: torch.dtype) -> None:
    for seed in range(2):
        images, views, config = everything(seed)
        assert_like_plain(images, views, 12, config, intermediate)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_of_other_than_three_channels(channels: int) -> None:
    images, views, config = everything(1, channels)
    assert_like_plain(images, views, 12, config, torch.float16)


@pytest.mark.parametrize("intermediate", TOLERANCES, ids=str)
def test_rotation_lies_between_resampling_and_colours(intermediate: torch.dtype) -> None:
    images, views, config = everything()
    views = dataclasses.replace(views, angle=torch.linspace(-20, 20, len(views.flip)))
    assert_like_plain(images, views, 12, config, intermediate)


def test_normalisation_and_dtype_of_the_result() -> None:
    images, views, _ = everything()
    config = CropsConfig()
    options: dict[str, Any] = {"mean": config.mean, "std": config.std}
    ours = fused(images, views, 12, **options)
    with backend("reference"):
        plain = render(images, views, 12, config)
    torch.testing.assert_close(ours, plain, atol=4e-5, rtol=0)  # 2e-3 levels of 255, over a deviation of 0.22
    half = fused(images, views, 12, **options, dtype=torch.float16)
    assert half.dtype == torch.float16 and torch.equal(half, ours.half())


def test_repeats_bitwise() -> None:
    images, views, _ = everything()
    assert torch.equal(fused(images, views, 12), fused(images, views, 12))


def test_no_crops() -> None:
    crops = fused(noise(2, 3, 20, 28), neutral([]), 8, dtype=torch.float16)
    assert crops.shape == (0, 3, 8, 8) and crops.dtype == torch.float16


def test_registered_operators() -> None:
    images, table = noise(1, 3, 4, 5), torch.zeros(1, GAIN.value + 6)
    table[:, 2:4] = 4.0
    operators = torch.ops.elastic_kernels
    arguments = (images, table, 3, 4, 4, torch.float16)
    opcheck((operators.crops_resample, arguments))
    crops = operators.crops_resample(*arguments)
    opcheck((operators.crops_colour_, (crops, table)))
    opcheck((operators.crops_finish, (crops, table, 0, torch.float32)))
    on_meta = operators.crops_resample(images.to("meta"), table.to("meta"), *arguments[2:])
    operators.crops_colour_(on_meta, table.to("meta"))
    out = operators.crops_finish(on_meta, table.to("meta"), 9, torch.bfloat16)
    assert out.is_meta and out.shape == (1, 3, 3, 3) and out.dtype == torch.bfloat16


GOOD = neutral([(0, 0, 8, 8), (1, 2, 4, 5)], sigma=torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"flip": GOOD.flip[:1]}, ValueError, r"flip \[2\] on the CPU, got \[1\] on cpu"),
        ({"boxes": GOOD.boxes[:, :3]}, ValueError, r"boxes \[N, 4\], N a multiple of 1, got \[2, 3\]"),
        ({"boxes": GOOD.boxes.int()}, TypeError, "boxes int64 or floating point, got torch.int32"),
        ({"boxes": GOOD.boxes + 5}, ValueError, r"in \[9, 9\], got \[5, 5, 13, 13\]"),
        ({"boxes": GOOD.boxes * 0}, ValueError, r"in \[9, 9\], got \[0, 0, 0, 0\]"),
        ({"boxes": GOOD.boxes - 1}, ValueError, r"in \[9, 9\], got \[-1, -1, 7, 7\]"),
        ({"flip": GOOD.sigma}, TypeError, "flip torch.bool, got torch.float32"),
        ({"sigma": GOOD.sigma.double()}, TypeError, "sigma torch.float32, got torch.float64"),
        ({"sigma": GOOD.sigma.to("meta")}, ValueError, r"sigma \[2\] on the CPU, got \[2\] on meta"),
        ({"angle": GOOD.sigma.double()}, TypeError, "angle torch.float32, got torch.float64"),
        ({"factors": GOOD.factors[:, :3]}, ValueError, r"factors \[2, 4\] on the CPU, got \[2, 3\]"),
        ({"order": GOOD.order.clamp(max=2)}, ValueError, r"order of 0, 1, 2, 3, got \[0, 1, 2, 2\]"),
    ],
)
def test_wrong_parameters(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused(noise(1, 3, 9, 9), dataclasses.replace(GOOD, **changes), 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"images": torch.zeros(1, 3, 9, 9)}, TypeError, "uint8 images, got torch.float32"),
        ({"images": noise(1, 1, 9, 9)}, ValueError, "mean and std of channels=1, .*, got 3 and 3"),
        ({"images": noise(4, 3, 9, 9)}, ValueError, r"multiple of 4, got \[2, 4\]"),
        ({"size": 0}, ValueError, "size of at least 1, got 0"),
        ({"blur_kernel": 4}, ValueError, r"odd blur_kernel in 1..15, got 4"),
        ({"blur_kernel": 17}, ValueError, r"odd blur_kernel in 1..15, got 17"),
        ({"mean": (0.5,)}, ValueError, "mean and std of channels=3, .*, got 1 and 3"),
        ({"dtype": torch.float64}, TypeError, "got torch.float64"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fused(**({"images": noise(1, 3, 9, 9), "views": GOOD, "size": 8} | options))


def test_a_blur_kernel_that_nobody_uses_need_not_fit() -> None:
    sharp = dataclasses.replace(GOOD, sigma=torch.zeros(2))
    assert torch.equal(fused(noise(1, 3, 9, 9), sharp, 2), fused(noise(1, 3, 9, 9), sharp, 2, blur_kernel=1))


def test_backend() -> None:
    images = noise(1, 3, 9, 9)
    assert crops_backend(images).backend == "triton"
    with backend("reference"):
        assert crops_backend(images) == ("reference", "forced")
