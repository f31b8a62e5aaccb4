"""Augmentation against Pillow, colorsys and direct computation."""

from __future__ import annotations

import colorsys
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from poa.data.augment import Views, augment, draw_views, render
from poa.data.crops import CropsConfig
from poa.data.resample import eval_crop, resample, resample_on_device, touched_pixels

# Pixels come out as levels 0..255, and nothing but the crop happens.
LEVELS: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
OFF: dict[str, Any] = {
    "jitter": 0.0,
    "grayscale": 0.0,
    "blur": (0.0, 0.0, 0.0),
    "solarize": (0.0, 0.0, 0.0),
}
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(seed))


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def whole(count: int, size: int, **changes: Tensor) -> Views:
    """Parameters that leave images of `size` pixels as they are, but for `changes`."""
    off = torch.zeros(count, dtype=torch.bool)
    neutral = Views(
        boxes=torch.tensor([[0, 0, size, size]] * count),
        flip=off,
        angle=torch.zeros(count),
        jitter=off,
        factors=torch.tensor([[1.0, 1.0, 1.0, 0.0]] * count),
        order=torch.arange(4).repeat(count, 1),
        grayscale=off,
        sigma=torch.zeros(count),
        solarize=off,
    )
    return dataclasses.replace(neutral, **changes)


def pillow_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic resize to (height, width).

    From version 13 on, Pillow chooses the order of the two passes by the shape; which comes first
    matters where the intermediate image is clipped. Here the horizontal one does, as always before.
    """
    wide = image.resize((size[1], image.height), Image.Resampling.BICUBIC)
    return wide.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def select(views: Views, rows: slice) -> Views:
    return Views(**{f.name: getattr(views, f.name)[rows] for f in dataclasses.fields(views)})


def assert_like_pillow(ours: Tensor, theirs: Tensor) -> None:
    """Pillow rounds to 8 bits after each of two passes."""
    difference = (ours - theirs).abs()
    assert difference.max() <= 2
    assert difference.mean() < 0.6


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    ("box", "size"),
    [
        ((0, 0, 40, 50), (40, 50)),
        ((3, 7, 30, 41), (12, 9)),
        ((5, 2, 9, 13), (32, 32)),
        ((0, 10, 40, 6), (16, 16)),
        ((39, 49, 1, 1), (4, 4)),
        ((1, 0, 2, 50), (5, 3)),
    ],
    ids=["same", "down", "up", "down and up", "one pixel", "thin"],
)
def test_resample_equals_pillow_crop_then_resize(
    box: tuple[int, int, int, int], size: tuple[int, int], flip: bool
) -> None:
    images = noise(2, 3, 40, 50)
    top, left, height, width = box
    ours = resample(images, torch.tensor([box] * 2), size, torch.tensor([flip, not flip]))
    assert ours.dtype == torch.float32 and ours.shape == (2, 3, *size)
    for image, crop, mirrored in zip(images, ours, (flip, not flip), strict=True):
        pil = to_pil(image).crop((left, top, left + width, top + height))
        theirs = from_pil(pillow_resize(pil, size))
        assert_like_pillow(crop, theirs.flip(-1) if mirrored else theirs)


def test_resample_reads_nothing_outside_of_the_box() -> None:
    images = noise(1, 3, 30, 30)
    poisoned = torch.full_like(images, 255)
    poisoned[..., 4:19, 8:20] = images[..., 4:19, 8:20]
    box = torch.tensor([[4, 8, 15, 12]])
    assert torch.equal(resample(images, box, (9, 16)), resample(poisoned, box, (9, 16)))


def test_resample_keeps_a_constant_and_stays_in_range() -> None:
    box = torch.tensor([[0.3, 1.7, 5.5, 9.9]])
    flat = resample(torch.full((1, 3, 12, 12), 77, dtype=torch.uint8), box, (7, 20))
    torch.testing.assert_close(flat, torch.full_like(flat, 77))
    edges = resample((noise(1, 3, 12, 12) > 127).to(torch.uint8) * 255, box, (7, 20))
    assert edges.min() == 0 and edges.max() == 255


def test_resample_of_several_views_is_view_major() -> None:
    images = noise(2, 3, 16, 16)
    boxes = torch.tensor([[0, 0, 8, 8], [1, 2, 7, 9], [4, 4, 12, 12], [0, 3, 16, 10]])
    flip = torch.tensor([True, False, False, True])
    together = resample(images, boxes, (6, 5), flip)
    apart = [resample(images, boxes[i : i + 2], (6, 5), flip[i : i + 2]) for i in (0, 2)]
    torch.testing.assert_close(together, torch.cat(apart))
    assert resample(images, boxes[:0], (6, 5)).shape == (0, 3, 6, 5)


def test_half_precision_is_good_for_pixels() -> None:
    """GPUs resample in half precision, whose numbers a CPU has as well."""
    images = (noise(2, 3, 64, 64) > 127).to(torch.uint8) * 255
    boxes = torch.tensor([[3.0, 5.0, 60.0, 40.0], [20.0, 0.0, 9.0, 11.0]])
    limits = touched_pixels(boxes)
    full, half = (
        resample_on_device(images.to(dtype), boxes, limits, (24, 24), None, (64, 64))
        for dtype in (torch.float32, torch.float16)
    )
    assert (full - half).abs().max() < 0.5
    assert (full - half).abs().mean() < 0.1


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
    assert global_crops.shape == (4, 3, 16, 16) and local_crops.shape == (
        2 * local_count,
        3,
        10,
        10,
    )
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


def test_normalisation() -> None:
    config = CropsConfig(**OFF)
    image = noise(1, 3, 8, 8)
    expected = (image / 255 - torch.tensor(config.mean).view(3, 1, 1)) / torch.tensor(config.std).view(
        3, 1, 1
    )
    torch.testing.assert_close(render(image, whole(1, 8), 8, config), expected)
    evaluated = eval_crop(image, torch.tensor([[8, 8]]), 8, config.mean, config.std, resize=8)
    torch.testing.assert_close(evaluated, expected)


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
            quantiles,
            torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64),
            atol=0.04,
            rtol=0,
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


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("column", "name", "enhance"),
    [
        (BRIGHTNESS, "brightness", ImageEnhance.Brightness),
        (CONTRAST, "contrast", ImageEnhance.Contrast),
        (SATURATION, "saturation", ImageEnhance.Color),
    ],
)
def test_jitter_equals_pillow(
    column: int, name: str, enhance: Callable[[Image.Image], Any], factor: float
) -> None:
    image = noise(1, 3, 16, 16)
    # A strength of 0 switches an operation off, whatever its factor.
    factors = torch.tensor([[0.3, 0.3, 0.3, 0.3]])
    factors[0, column] = factor
    names = ("brightness", "contrast", "saturation", "hue")
    strengths: dict[str, Any] = {n: 0.5 if n == name else 0.0 for n in names}
    config = CropsConfig(**LEVELS, **strengths)
    views = whole(1, 16, jitter=torch.tensor([True]), factors=factors)
    theirs = from_pil(enhance(to_pil(image[0])).enhance(factor))
    # Pillow rounds the gray level it blends with, and the result (down).
    assert (render(image, views, 16, config)[0] - theirs).abs().max() <= 1.51


def colours() -> Tensor:
    """An image `[1, 3, 32, 32]` of random colours, with grays, primaries and ties among them."""
    image = noise(1, 3, 32, 32)
    levels = torch.tensor([0, 128, 255], dtype=torch.uint8)
    image[0, :, 0, :27] = torch.cartesian_prod(levels, levels, levels).T
    image[0, 1, 1] = image[0, 0, 1]
    image[0, 2, 2] = image[0, 0, 2]
    image[0, 2, 3] = image[0, 1, 3]
    return image


def turn_hue(levels: np.ndarray, shift: float) -> np.ndarray:
    """The hue of colours `[..., 3]` turned by `shift` turns, one by one."""
    out = np.empty_like(levels)
    for position in np.ndindex(levels.shape[:-1]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(levels[position] / 255))
        out[position] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
    return out * 255


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.03, 0.5])
def test_hue_equals_colorsys(shift: float) -> None:
    image = colours()
    views = whole(1, 32, jitter=torch.tensor([True]), factors=torch.tensor([[1.0, 1.0, 1.0, shift]]))
    expected = turn_hue(image[0].permute(1, 2, 0).double().numpy(), shift)
    ours = render(image, views, 32, CropsConfig(**LEVELS))[0].permute(1, 2, 0)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-3)


def test_jitter_follows_the_order_of_each_sample() -> None:
    order = torch.cartesian_prod(*[torch.arange(4)] * 4)
    order = order[order.sort(1).values.eq(torch.arange(4)).all(1)][::3]
    count = len(order)
    factors = torch.rand(count, 4, generator=seeded()) * torch.tensor([0.8, 0.8, 0.4, 0.2])
    factors += torch.tensor([0.6, 0.6, 0.8, -0.1])
    jitter = torch.arange(count) != 2
    images = noise(count, 3, 8, 8)
    views = whole(count, 8, jitter=jitter, factors=factors, order=order)
    ours = render(images, views, 8, CropsConfig(**LEVELS))
    gray = np.array([0.299, 0.587, 0.114])
    operations: list[Callable[[np.ndarray, float], np.ndarray]] = [
        lambda x, f: np.clip(f * x, 0, 255),
        lambda x, f: np.clip(f * x + (1 - f) * (x @ gray).mean(), 0, 255),
        lambda x, f: np.clip(f * x + (1 - f) * (x @ gray)[..., None], 0, 255),
        turn_hue,
    ]
    for b in range(count):
        expected = images[b].permute(1, 2, 0).double().numpy()
        for column in order[b].tolist() if jitter[b] else []:
            expected = operations[column](expected, factors[b, column].item())
        np.testing.assert_allclose(ours[b].permute(1, 2, 0).numpy(), expected, atol=5e-3)


def test_grayscale_equals_pillow_and_leaves_other_samples() -> None:
    images = noise(2, 3, 16, 16)
    views = whole(2, 16, grayscale=torch.tensor([False, True]))
    colour, gray = render(images, views, 16, CropsConfig(**LEVELS))
    torch.testing.assert_close(colour, images[0].float())
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    theirs = torch.from_numpy(np.array(to_pil(images[1]).convert("L"))).float()
    assert (gray[0] - theirs).abs().max() <= 0.51


def test_solarize_inverts_from_128_and_leaves_other_samples() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    views = whole(2, 16, solarize=torch.tensor([True, False]))
    ours = render(images, views, 16, CropsConfig(**LEVELS)).round()
    level = torch.arange(256.0).view(16, 16)
    assert torch.equal(ours[0, 0], torch.where(level >= 128, 255 - level, level))
    assert torch.equal(ours[1, 0], level)


@pytest.mark.parametrize(("size", "kernel"), [(16, 9), (5, 9), (12, 5), (8, 1)])
def test_blur_equals_direct_convolution(size: int, kernel: int) -> None:
    images = noise(3, 3, size, size)
    sigma = torch.tensor([0.1, 0.0, 1.7])
    config = CropsConfig(**LEVELS, blur_kernel=kernel)
    ours = render(images, whole(3, size, sigma=sigma), size, config)
    reach = kernel // 2
    offset = np.arange(-reach, reach + 1)
    for b in range(3):
        expected = images[b].double().numpy()
        if sigma[b] > 0:
            weight = np.exp(-0.5 * (offset / sigma[b].item()) ** 2)
            weight = np.outer(weight, weight) / weight.sum() ** 2
            border = [(0, 0), (reach, reach), (reach, reach)]
            windows = np.lib.stride_tricks.sliding_window_view(
                np.pad(expected, border, mode="reflect"), (kernel, kernel), axis=(1, 2)
            )
            expected = (windows * weight).sum((-2, -1))
        np.testing.assert_allclose(ours[b].numpy(), expected, atol=1e-3)


def test_operations_come_in_the_official_order() -> None:
    """Jitter, gray, blur, solarisation: no two of these commute on this image."""
    image = noise(1, 3, 16, 16)
    one = torch.tensor([True])
    steps: list[dict[str, Tensor]] = [
        {"jitter": one, "factors": torch.tensor([[1.4, 1.3, 1.2, 0.1]])},
        {"grayscale": one},
        {"sigma": torch.tensor([1.0])},
        {"solarize": one},
    ]
    config = CropsConfig(**LEVELS)
    everything = {name: value for step in steps for name, value in step.items()}
    together = render(image, whole(1, 16, **everything), 16, config)
    apart = image
    for step in steps:
        apart = render(apart, whole(1, 16, **step), 16, config).round().to(torch.uint8)
    assert (together - apart).abs().max() < 2.5  # of rounding between the steps


def test_rotation_by_a_right_angle() -> None:
    images = noise(3, 3, 9, 9)
    views = whole(3, 9, angle=torch.tensor([90.0, 0.0, -90.0]))
    ours = render(images, views, 9, CropsConfig(**LEVELS, rotation=90.0))
    for crop, image, turns in zip(ours, images, (1, 0, -1), strict=True):
        torch.testing.assert_close(crop, image.rot90(turns, (1, 2)).float(), atol=0.01, rtol=0)
    flat = torch.full((1, 3, 9, 9), 200, dtype=torch.uint8)  # reflection leaves no empty corners
    turned = render(flat, whole(1, 9, angle=torch.tensor([45.0])), 9, CropsConfig(**LEVELS, rotation=90.0))
    torch.testing.assert_close(turned, flat.float())
    still = render(images, views, 9, CropsConfig(**LEVELS, rotation=0.0))
    torch.testing.assert_close(still, images.float())


@pytest.mark.parametrize("resize", [None, 16, 18], ids=["default", "largest square", "other"])
@pytest.mark.parametrize("shape", [(40, 57), (61, 23), (16, 16), (7, 11)])
def test_eval_crop_equals_pillow_resize_then_crop(shape: tuple[int, int], resize: int | None) -> None:
    size, short = 16, resize or 18  # 16 * 256 / 224 = 18.3
    canvas = torch.full((1, 3, 64, 64), 255, dtype=torch.uint8)
    image = noise(3, *shape)
    canvas[0, :, : shape[0], : shape[1]] = image
    ours = eval_crop(canvas, torch.tensor([shape]), size, **LEVELS, resize=resize)
    assert ours.shape == (1, 3, size, size) and ours.dtype == torch.float32
    height, width = (short * side // min(shape) for side in shape)
    resized = pillow_resize(to_pil(image), (height, width))
    top, left = round((height - size) / 2), round((width - size) / 2)
    theirs = from_pil(resized.crop((left, top, left + size, top + size)))
    assert_like_pillow(ours[0].clamp(0, 255), theirs)


def test_eval_crop_of_different_sizes_in_a_batch() -> None:
    images, sizes = noise(3, 3, 30, 30), torch.tensor([[30, 20], [9, 30], [16, 16]])
    together = eval_crop(images, sizes, 12, **LEVELS)
    alone = [eval_crop(images[b : b + 1], sizes[b : b + 1], 12, **LEVELS) for b in range(3)]
    torch.testing.assert_close(together, torch.cat(alone))


GOOD = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
FITTING = torch.tensor([[16, 16], [3, 5]])


@pytest.mark.parametrize(
    ("images", "sizes", "error", "message"),
    [
        (GOOD.float(), FITTING, TypeError, "expected uint8 images, got torch.float32"),
        (GOOD, FITTING.int(), TypeError, "expected int64 sizes, got torch.int32"),
        (GOOD[0], FITTING, ValueError, r"expected images \[B, 3, H, W\].*got \[3, 16, 16\]"),
        (GOOD[:, :1], FITTING, ValueError, r"got \[2, 1, 16, 16\]"),
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


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[0, 0, 4, 4]] * 3, "N a multiple of 2, got"),
        ([[0, 0, 4]] * 2, r"boxes \[N, 4\]"),
        ([[0, 0, 4, 4], [10, 0, 7, 4]], r"in \[16, 16\], got \[10, 0, 7, 4\]"),
        ([[0, -1, 4, 4]] * 2, r"got \[0, -1, 4, 4\]"),
        ([[0, 0, 0, 4]] * 2, r"got \[0, 0, 0, 4\]"),
    ],
)
def test_wrong_boxes(boxes: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resample(GOOD, torch.tensor(boxes), (4, 4))


def test_other_wrong_arguments() -> None:
    boxes = torch.tensor([[0, 0, 4, 4]] * 2)
    with pytest.raises(ValueError, match=r"expected flip \[2\], got \[1\]"):
        resample(GOOD, boxes, (4, 4), torch.tensor([True]))
    with pytest.raises(ValueError, match=r"got \(4, 0\)"):
        resample(GOOD, boxes, (4, 0))
    with pytest.raises(ValueError, match="got size 8 and resize 7"):
        eval_crop(GOOD, FITTING, 8, **LEVELS, resize=7)
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
