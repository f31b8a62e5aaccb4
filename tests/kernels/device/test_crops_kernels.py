"""The fused augmentation on a device, against its definition on the CPU."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from elastic_kernels import backend
from elastic_kernels.crops import CropParameters, crops_backend, render_crops
from helpers.kernels.sizes import RUNS, gpu_only, on_host, sized
from poa.data.augment import draw_views, render
from poa.data.crops import CropsConfig

pytestmark = pytest.mark.cuda

CONFIG = CropsConfig(
    local_count=sized(3, 1), solarize=(0.3, 0.3, 0.3), **sized({}, {"global_size": 49, "local_size": 20})
)
SIZES = (CONFIG.global_size, CONFIG.local_size)
LEVEL = 1 / (255 * min(CONFIG.std))  # of 0..255, in normalised units at most
LARGEST = {torch.float32: 0.02, torch.float16: 0.75}  # difference in levels, by the dtype between kernels


def problem(channels: int = 3) -> tuple[Tensor, tuple[CropParameters, CropParameters]]:
    generator = torch.Generator().manual_seed(0)
    sizes = sized(
        torch.tensor([[320, 400], [320, 211], [97, 400], [300, 300]]),
        torch.tensor([[70, 41], [13, 55], [50, 50]]),
    )
    canvas = sizes.amax(0).tolist()
    images = torch.randint(0, 256, (len(sizes), channels, *canvas), dtype=torch.uint8, generator=generator)
    images[2:] = (images[2:] > 127).to(torch.uint8) * 255
    return images, draw_views(CONFIG, sizes, generator)


def hosted(views: CropParameters) -> CropParameters:
    return CropParameters(**{name: None if x is None else on_host(x) for name, x in vars(views).items()})


def fused(images: Tensor, views: CropParameters, size: int, **options: Any) -> Tensor:
    options = {"blur_kernel": CONFIG.blur_kernel, "mean": CONFIG.mean, "std": CONFIG.std} | options
    return render_crops(images, hosted(views), size, **options)


def plain(images: Tensor, views: CropParameters, size: int, config: CropsConfig = CONFIG) -> Tensor:
    with backend("reference"):
        return render(on_host(images), hosted(views), size, config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("intermediate", LARGEST, ids=str)
def test_like_the_plain_augmentation(intermediate: torch.dtype, dtype: torch.dtype) -> None:
    images, both = problem()
    on_device = images.cuda()
    assert crops_backend(on_device).backend == "triton"
    rounding = torch.finfo(dtype).eps / 2
    for views, size in zip(both, SIZES, strict=True):
        expected = plain(images, views, size)
        with patch("elastic_kernels.crops.between_kernels", return_value=intermediate):
            ours, *again = (fused(on_device, views, size, dtype=dtype) for _ in range(RUNS))
        assert ours.dtype == dtype and all(torch.equal(ours, other) for other in again)
        difference = (ours.cpu().float() - expected).abs()
        assert (difference <= LARGEST[intermediate] * LEVEL + rounding * (expected.abs() + 0.1)).all()
        assert difference.mean() < 0.05 * LEVEL + rounding


def test_sizes_that_nothing_divides() -> None:
    images, (views, _) = problem()
    for size in sized((37, 225), (37, 65)):
        difference = fused(images.cuda(), views, size).cpu() - plain(images, views, size)
        assert difference.abs().max() <= LARGEST[torch.float16] * LEVEL


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_than_three_channels(channels: int) -> None:
    levels = {"mean": CONFIG.mean[:1] * channels, "std": CONFIG.std[:1] * channels}
    images, (_, views) = problem(channels)
    ours = fused(images.cuda(), views, CONFIG.local_size, **levels).cpu()
    difference = ours - plain(images, views, CONFIG.local_size, dataclasses.replace(CONFIG, **levels))
    assert difference.abs().max() <= LARGEST[torch.float16] * LEVEL


def test_one_pixel_crops() -> None:
    images, (views, _) = problem()
    sharp = dataclasses.replace(views, sigma=torch.zeros_like(views.sigma))
    difference = fused(images.cuda(), sharp, 1).cpu() - plain(images, sharp, 1)
    assert difference.abs().max() <= LARGEST[torch.float16] * LEVEL


@gpu_only
def test_nothing_waits_for_the_device() -> None:
    images, both = problem()
    on_device = images.cuda()
    problems = list(zip(both, SIZES, strict=True))
    expected = [fused(on_device, views, size, dtype=torch.bfloat16) for views, size in problems]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops = [fused(on_device, views, size, dtype=torch.bfloat16) for views, size in problems]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(crops, expected, strict=True))
