"""The definitions of crops and of resampling against Pillow, colorsys and direct computation."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from elastic_kernels import NEUTRAL_CROP, CropParameters, eval_crop, render_crops
from elastic_kernels.resample import filter_taps, resample_boxes, touched_pixels
from helpers.crops import BRIGHTNESS, CONTRAST, LEVELS, SATURATION, neutral, noise, seeded


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def whole(count: int, size: int, **changes: Tensor) -> CropParameters:
    """Parameters that leave images of `size` pixels as they are, but for `changes`."""
    return neutral([(0, 0, size, size)] * count, **changes)


def render(images: Tensor, views: CropParameters, size: int, **options: Any) -> Tensor:
    return render_crops(images, views, size, **({"blur_kernel": 9, **LEVELS} | options))


def resample(images: Tensor, boxes: Tensor, size: tuple[int, int], flip: Tensor | None = None) -> Tensor:
    boxes = boxes.float()
    taps = filter_taps([boxes[:, 2].max().item() / size[0], boxes[:, 3].max().item() / size[1]])
    return resample_boxes(images.float(), boxes, touched_pixels(boxes), size, flip, taps)


def pillow_resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic resize to (height, width).

    From version 13 on, Pillow chooses the order of the two passes by the shape; which comes first
    matters where the intermediate image is clipped. Here the horizontal one does, as always before.
    """
    wide = image.resize((size[1], image.height), Image.Resampling.BICUBIC)
    return wide.resize((size[1], size[0]), Image.Resampling.BICUBIC)


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


def test_half_precision_is_good_for_pixels() -> None:
    """GPUs resample in half precision, whose numbers a CPU has as well."""
    images = (noise(2, 3, 64, 64) > 127).to(torch.uint8) * 255
    boxes = torch.tensor([[3.0, 5.0, 60.0, 40.0], [20.0, 0.0, 9.0, 11.0]])
    limits = touched_pixels(boxes)
    full, half = (
        resample_boxes(images.to(dtype), boxes, limits, (24, 24), None, (64, 64))
        for dtype in (torch.float32, torch.float16)
    )
    assert (full - half).abs().max() < 0.5
    assert (full - half).abs().mean() < 0.1


def test_normalisation() -> None:
    image, mean, std = noise(1, 3, 8, 8), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = (image / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(render(image, whole(1, 8), 8, mean=mean, std=std), expected)
    evaluated = eval_crop(image, torch.tensor([[8, 8]]), 8, mean, std, resize=8)
    torch.testing.assert_close(evaluated, expected)
    assert render(image, whole(0, 8), 8, dtype=torch.float16).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(
    ("column", "enhance"),
    [
        (BRIGHTNESS, ImageEnhance.Brightness),
        (CONTRAST, ImageEnhance.Contrast),
        (SATURATION, ImageEnhance.Color),
    ],
)
def test_jitter_equals_pillow(column: int, enhance: Callable[[Image.Image], Any], factor: float) -> None:
    image, factors = noise(1, 3, 16, 16), torch.tensor([NEUTRAL_CROP])
    factors[0, column] = factor
    views = whole(1, 16, jitter=torch.tensor([True]), factors=factors)
    theirs = from_pil(enhance(to_pil(image[0])).enhance(factor))
    # Pillow rounds the gray level it blends with, and the result (down).
    assert (render(image, views, 16)[0] - theirs).abs().max() <= 1.51


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
    ours = render(image, views, 32)[0].permute(1, 2, 0)
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
    ours = render(images, views, 8)
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
    colour, gray = render(images, views, 16)
    torch.testing.assert_close(colour, images[0].float())
    assert torch.equal(gray[0], gray[1]) and torch.equal(gray[0], gray[2])
    theirs = torch.from_numpy(np.array(to_pil(images[1]).convert("L"))).float()
    assert (gray[0] - theirs).abs().max() <= 0.51


def test_solarize_inverts_from_128_and_leaves_other_samples() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    views = whole(2, 16, solarize=torch.tensor([True, False]))
    ours = render(images, views, 16).round()
    level = torch.arange(256.0).view(16, 16)
    assert torch.equal(ours[0, 0], torch.where(level >= 128, 255 - level, level))
    assert torch.equal(ours[1, 0], level)


@pytest.mark.parametrize(("size", "kernel"), [(16, 9), (5, 9), (12, 5), (8, 1)])
def test_blur_equals_direct_convolution(size: int, kernel: int) -> None:
    images = noise(3, 3, size, size)
    sigma = torch.tensor([0.1, 0.0, 1.7])
    ours = render(images, whole(3, size, sigma=sigma), size, blur_kernel=kernel)
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
    everything = {name: value for step in steps for name, value in step.items()}
    together = render(image, whole(1, 16, **everything), 16)
    apart = image
    for step in steps:
        apart = render(apart, whole(1, 16, **step), 16).round().to(torch.uint8)
    assert (together - apart).abs().max() < 2.5  # of rounding between the steps


def test_rotation_by_a_right_angle() -> None:
    images = noise(3, 3, 9, 9)
    views = whole(3, 9, angle=torch.tensor([90.0, 0.0, -90.0]))
    ours = render(images, views, 9)
    for crop, image, turns in zip(ours, images, (1, 0, -1), strict=True):
        torch.testing.assert_close(crop, image.rot90(turns, (1, 2)).float(), atol=0.01, rtol=0)
    flat = torch.full((1, 3, 9, 9), 200, dtype=torch.uint8)  # reflection leaves no empty corners
    turned = render(flat, whole(1, 9, angle=torch.tensor([45.0])), 9)
    torch.testing.assert_close(turned, flat.float())


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


def test_wrong_boxes() -> None:
    """The other errors are tried with the kernels, as the checks are the same."""
    for boxes, message in (([0, -1, 4, 4], r"in \[16, 16\], got \[0, -1, 4, 4\]"), ([0, 0, 0, 4], "got")):
        with pytest.raises(ValueError, match=message):
            render(noise(1, 3, 16, 16), dataclasses.replace(whole(1, 16), boxes=torch.tensor([boxes])), 4)
    with pytest.raises(ValueError, match="got size 8 and resize 7"):
        eval_crop(noise(1, 3, 16, 16), torch.tensor([[16, 16]]), 8, **LEVELS, resize=7)
