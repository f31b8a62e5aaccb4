"""What augmentation draws, and that a crop depends on its own image and the seed alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kernels import NEUTRAL_CROP, CropParameters, eval_crop
from helpers.crops import LEVELS, noise, seeded
from poa.data.augment import augment, draw_views, render
from poa.data.crops import CropsConfig

OFF: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0, "blur": (0.0, 0.0, 0.0), "solarize": (0.0, 0.0, 0.0)}


def select(views: CropParameters, rows: slice) -> CropParameters:
    return CropParameters(**{name: x[rows] for name, x in vars(views).items() if x is not None})


def test_padding_of_the_canvas_does_not_matter() -> None:
    config = CropsConfig(global_size=20, local_size=12, local_count=3, rotation=20.0)
    sizes = torch.tensor([[30, 40], [17, 9], [40, 40], [1, 1]])
    outside = torch.ones(4, 3, 40, 40, dtype=torch.bool)
    for b, (height, width) in enumerate(sizes.tolist()):
        outside[b, :, :height, :width] = False
    images = noise(4, 3, 40, 40).masked_fill(outside, 0)
    expected = augment(images, sizes, config, seeded())
    evaluated = eval_crop(images, sizes, 16, config.mean, config.std)
    garbage = noise(4, 3, 40, 40, seed=1)
    for poison in (torch.full_like(images, 255), garbage):
        poisoned = torch.where(outside, poison, images)
        for crops, same in zip(augment(poisoned, sizes, config, seeded()), expected, strict=True):
            assert torch.equal(crops, same)
        assert torch.equal(eval_crop(poisoned, sizes, 16, config.mean, config.std), evaluated)


def test_augment_depends_on_the_seed_only() -> None:
    config = CropsConfig(global_size=16, local_size=10, local_count=2)
    images, sizes = noise(3, 3, 24, 24), torch.tensor([[24, 20]] * 3)
    first, second, other = (augment(images, sizes, config, seeded(s)) for s in (5, 5, 6))
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.isclose(a, c).flatten(1).all(1).any()
    assert not torch.isclose(first[0][:3], first[0][3:]).flatten(1).all(1).any()


@pytest.mark.parametrize("local_count", [0, 3])
def test_augment_shapes(local_count: int) -> None:
    config = CropsConfig(global_size=16, local_size=10, local_count=local_count)
    global_crops, local_crops = augment(noise(2, 3, 24, 24), torch.tensor([[24, 24]] * 2), config, seeded())
    assert global_crops.shape == (4, 3, 16, 16) and local_crops.shape == (2 * local_count, 3, 10, 10)
    assert global_crops.dtype == local_crops.dtype == torch.float32


def test_samples_do_not_influence_each_other() -> None:
    config = CropsConfig(global_size=16, local_size=10, local_count=4, rotation=10.0)
    images = noise(5, 3, 24, 24)
    sizes = torch.tensor([[24, 24], [10, 24], [24, 8], [5, 5], [20, 21]])
    together = augment(images, sizes, config, seeded())
    for views, crops in zip(draw_views(config, sizes, seeded()), together, strict=True):
        for b in range(5):
            alone = render(images[b : b + 1], select(views, slice(b, None, 5)), len(crops[0, 0]), config)
            torch.testing.assert_close(alone, crops[b::5], atol=1e-4, rtol=0)


def test_probabilities() -> None:
    config = CropsConfig(blur=(0.1, 0.9, 0.5), solarize=(0.0, 0.2, 0.6), local_count=3)
    batch = 4000
    global_views, local_views = draw_views(config, torch.full((batch, 2), 32), seeded())
    rates = [
        (global_views.flip, config.flip),
        (local_views.flip, config.flip),
        (global_views.jitter, config.jitter),
        (local_views.jitter, config.jitter),
        (global_views.grayscale, config.grayscale),
        (local_views.grayscale, config.grayscale),
        (global_views.sigma[:batch] > 0, config.blur[0]),
        (global_views.sigma[batch:] > 0, config.blur[1]),
        (local_views.sigma > 0, config.blur[2]),
        (global_views.solarize[:batch], config.solarize[0]),
        (global_views.solarize[batch:], config.solarize[1]),
        (local_views.solarize, config.solarize[2]),
    ]
    for drawn, probability in rates:
        deviation = math.sqrt(probability * (1 - probability) / len(drawn))
        assert abs(drawn.double().mean() - probability) <= 4.5 * deviation
    # Every order of the four operations is as likely as any other.
    _, counts = local_views.order.unique(dim=0, return_counts=True)
    assert len(counts) == 24
    assert (counts / len(local_views.order) - 1 / 24).abs().max() < 4.5 * math.sqrt(
        1 / 24 / len(local_views.order)
    )


def test_ranges_of_the_factors() -> None:
    config = CropsConfig(brightness=1.5, rotation=30.0, local_count=0, blur=(1.0, 1.0, 0.0))
    views, _ = draw_views(config, torch.full((2000, 2), 32), seeded())
    ranges = [(0.0, 2.5), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1), config.blur_sigma, (-30.0, 30.0)]
    assert views.angle is not None
    drawn = torch.cat([views.factors, views.sigma[:, None], views.angle[:, None]], 1)
    for values, (low, high) in zip(drawn.T, ranges, strict=True):
        margin = 0.01 * (high - low)
        assert low - 1e-6 <= values.min() < low + margin
        assert high - margin < values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 4.5 * (high - low) / math.sqrt(12 * 4000)


def test_switching_an_operation_off_leaves_the_other_draws() -> None:
    sizes = torch.full((20, 2), 32)
    full = draw_views(CropsConfig(rotation=30.0), sizes, seeded())
    less = draw_views(CropsConfig(**OFF, hue=0.0, flip=0.0), sizes, seeded())
    for a, b in zip(full, less, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.order, b.order)
        assert torch.equal(a.factors[:, :3], b.factors[:, :3])
        assert a.angle is not None and b.angle is None
    still, _ = draw_views(CropsConfig(brightness=0, contrast=0, saturation=0, hue=0), sizes, seeded())
    assert (still.factors == torch.tensor(NEUTRAL_CROP)).all() and still.jitter.any()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 48), (500, 375), (1, 1), (3, 2)])
def test_boxes_have_the_configured_area_and_stay_inside(height: int, width: int) -> None:
    config = CropsConfig(local_count=2)
    sizes = torch.tensor([[height, width]] * 2000)
    scales = (config.global_scale, config.local_scale)
    for views, (low, high) in zip(draw_views(config, sizes, seeded()), scales, strict=True):
        top, left, h, w = views.boxes.T
        assert views.boxes.dtype == torch.int64
        assert (h > 0).all() and (w > 0).all() and (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()
        # Each side is rounded to whole pixels, by half a pixel at most.
        area = height * width
        assert ((h + 0.5) * (w + 0.5) >= low * area).all()
        if height > 3:  # where not every try may fail, and the fallback be larger
            assert ((h - 0.5) * (w - 0.5) <= high * area).all()
        assert ((w + 0.5) / (h - 0.5) >= config.aspect[0] - 1e-9).all()
        assert ((w - 0.5) / (h + 0.5) <= config.aspect[1] + 1e-9).all()


def test_aspect_ratio_is_width_over_height() -> None:
    config = CropsConfig(aspect=(2.0, 3.0))
    _, views = draw_views(config, torch.tensor([[400, 400]] * 200), seeded())
    _, _, h, w = views.boxes.T
    assert ((w + 0.5) / (h - 0.5) >= 2).all() and ((w - 0.5) / (h + 0.5) <= 3).all()


def test_boxes_are_spread_evenly() -> None:
    """Area and log aspect ratio are uniform, and the corner is uniform where the box fits."""
    config = CropsConfig(local_count=1)
    sizes = torch.tensor([[1000, 1000]] * 4000)
    top, left, h, w = draw_views(config, sizes, seeded())[1].boxes.double().T
    low, high = config.local_scale
    unit = [
        (h * w / 1e6 - low) / (high - low),
        (w / h).log() / math.log(16 / 9) + 0.5,
        top / (1000 - h),
        left / (1000 - w),
    ]
    assert (top + h).max() == (left + w).max() == 1000  # some box in thousands touches the far edge
    for values in unit:
        quantiles = values.quantile(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64))
        torch.testing.assert_close(
            quantiles, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64), atol=0.04, rtol=0
        )


@pytest.mark.parametrize(
    ("size", "box"), [((8, 200), [0, 94, 8, 11]), ((200, 8), [94, 0, 11, 8])], ids=["wide", "tall"]
)
def test_box_that_never_fits_falls_back_to_the_centre(size: tuple[int, int], box: list[int]) -> None:
    views, _ = draw_views(CropsConfig(), torch.tensor([size] * 50), seeded())
    assert (views.boxes == torch.tensor(box)).all()


def test_box_of_the_whole_image_where_only_that_fits() -> None:
    config = CropsConfig(global_scale=(1.0, 1.0), aspect=(1.0, 1.0))
    views, _ = draw_views(config, torch.tensor([[7, 7]] * 3), seeded())
    assert (views.boxes == torch.tensor([0, 0, 7, 7])).all()


GOOD = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
FITTING = torch.tensor([[16, 16], [3, 5]])


@pytest.mark.parametrize(
    ("images", "sizes", "error", "message"),
    [
        (GOOD.float(), FITTING, TypeError, "expected uint8 images, got torch.float32"),
        (GOOD, FITTING.int(), TypeError, "expected int64 sizes, got torch.int32"),
        (GOOD[0], FITTING, ValueError, r"expected images \[B, C, H, W\], C up to 16.*got \[3, 16, 16\]"),
        (GOOD[:, :1], FITTING, ValueError, "expected mean and std of channels=1, .*, got 3 and 3"),
        (GOOD[:0], FITTING[:0], ValueError, r"got \[0, 3, 16, 16\]"),
        (GOOD, FITTING[:1], ValueError, r"expected sizes \[2, 2\] on the CPU, got \[1, 2\]"),
        (GOOD, FITTING + 1, ValueError, r"\[1, 1\] to \[16, 16\], got \[4, 6\] to \[17, 17\]"),
        (GOOD, FITTING - 3, ValueError, r"got \[0, 2\]"),
    ],
)
def test_wrong_batches(images: Tensor, sizes: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        augment(images, sizes, CropsConfig(global_size=16, local_size=10), seeded())
    with pytest.raises(error, match=message):
        eval_crop(images, sizes, 8, **LEVELS)


def test_wrong_blurs() -> None:
    for kernel, size in ((9, 4), (4, 16)):
        with pytest.raises(ValueError, match=f"blur_kernel: expected an odd number below .* got {kernel}"):
            CropsConfig(global_size=size, local_count=0, blur_kernel=kernel)


@pytest.mark.cuda
def test_cuda_agrees_with_the_cpu_and_does_not_wait() -> None:
    config = CropsConfig(**LEVELS, global_size=32, local_size=16, local_count=4, rotation=10.0)
    images, sizes = noise(8, 3, 40, 40), torch.tensor([[40, 33]] * 8)
    expected = augment(images, sizes, config, seeded())
    on_device = images.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        crops = augment(on_device, sizes, config, seeded())
        evaluated = eval_crop(on_device, sizes, 16, **LEVELS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(crops, expected, strict=True):
        difference = (a.cpu() - b).abs()
        assert difference.mean() < 0.2
        assert difference.quantile(0.999) < 2  # hue is sensitive where a pixel is nearly gray
    assert (evaluated.cpu() - eval_crop(images, sizes, 16, **LEVELS)).abs().max() < 0.5
