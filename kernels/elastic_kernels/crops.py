"""Random multi-crop augmentation of uint8 canvases, in a handful of launches.

    crop -> resize (antialiased bicubic) -> flip -> [rotate] -> jitter colours -> grayscale -> blur
    -> solarise -> normalise

for every crop with parameters of its own, drawn beforehand on the CPU. Nothing is rounded to integers in
between.

The Triton kernels are in `triton_ops/crops.py`. The plain definition is the augmentation of the trainer, not
part of this package; who calls this operator asks `crops_backend` first.

Source: DINO (Caron et al., 2021) and DINOv2 (Oquab et al., 2023) for the views; the operations follow
torchvision's transforms, and the resampling Pillow's bicubic filter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic_kernels import dispatch
from elastic_kernels.transfer import upload

NEUTRAL_CROP = (1.0, 1.0, 1.0, 0.0)  # factors that change nothing


@dataclass(frozen=True)
class CropParameters:
    """Parameters of `N = views * batch` crops, CPU tensors: all samples of the first view, then the next.

    Attributes:
        boxes: int64 or floating point `[N, 4]`, (top, left, height, width) in pixels. Of fractional edges,
            the pixels they touch are used.
        flip: bool `[N]`, mirrored left to right.
        jitter: bool `[N]`, whether the colours are jittered.
        factors: float32 `[N, 4]` of brightness, contrast, saturation (1: unchanged), hue (turns; 0:
            unchanged). An operation that changes nothing costs nothing.
        order: int64 `[N, 4]`, the operations (columns of `factors`) in the order of application.
        grayscale: bool `[N]`.
        sigma: float32 `[N]`, of the Gaussian blur in pixels; 0: no blur.
        solarize: bool `[N]`.

    Example:
        >>> import torch
        >>> from elastic_kernels import NEUTRAL_CROP, CropParameters
        >>> boxes, no = torch.tensor([[0, 0, 32, 32]] * 4), torch.zeros(4, dtype=torch.bool)
        >>> factors, order = torch.tensor([NEUTRAL_CROP] * 4), torch.arange(4).repeat(4, 1)
        >>> CropParameters(boxes, no, no, factors, order, no, torch.zeros(4), no).boxes.shape
        torch.Size([4, 4])
    """

    boxes: Tensor
    flip: Tensor
    jitter: Tensor
    factors: Tensor
    order: Tensor
    grayscale: Tensor
    sigma: Tensor
    solarize: Tensor


@torch.no_grad()
def render_crops(
    images: Tensor,
    parameters: CropParameters,
    size: int,
    *,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    rotate: Callable[[Tensor], Tensor] | None = None,
    intermediate: torch.dtype | None = None,
) -> Tensor:
    """Cut boxes out of canvases, resize, flip, recolour, blur, solarise and normalise them.

    Args:
        images: uint8 `[B, 3, H, W]`, read in place if its rows are contiguous; crop n is of image `n % B`,
            and no pixel outside of its box reaches it.
        parameters: of the `N` crops, a multiple of `B`.
        size: side of the crops in pixels, S.
        blur_kernel: taps of the blur, odd and below 2 * S.
        mean, std: of each channel, in 0..1.
        dtype: of the result: float32, float16 or bfloat16.
        rotate: makes float32 `[N, 3, S, S]` in 0..255 on the device of `images` of the same, between the
            resampling and the colours.
        intermediate: dtype between kernels, float32 or float16; default float16 on a GPU, which holds a
            level of 0..255 to 1/16.

    Returns:
        Contiguous `[N, 3, S, S]` of `dtype` on the device of `images`.

    Raises:
        TypeError: tensors of other dtypes.
        ValueError: other shapes, parameters off the CPU, boxes that are empty or leave the canvas, an order
            that does not name each operation once, or a blur kernel that does not fit.
        RuntimeError: Triton cannot run here, or is not chosen (see `crops_backend`).

    Numerics: products and sums in fp32. Results repeat bitwise. Never waits for the device: the parameters
    go there in one transfer.

    Example:
        >>> import torch
        >>> from elastic_kernels import NEUTRAL_CROP, CropParameters, absent_gpu, render_crops
        >>> boxes, no = torch.tensor([[0, 0, 32, 32]] * 4), torch.zeros(4, dtype=torch.bool)
        >>> factors, order = torch.tensor([NEUTRAL_CROP] * 4), torch.arange(4).repeat(4, 1)
        >>> parameters = CropParameters(boxes, no, no, factors, order, no, torch.zeros(4), no)
        >>> images = torch.empty(2, 3, 64, 64, dtype=torch.uint8, device="meta")
        >>> with absent_gpu("sm_90"):  # leave it out where there is a GPU
        ...     render_crops(images, parameters, 16, blur_kernel=9, mean=[0.5] * 3, std=[0.2] * 3).shape
        torch.Size([4, 3, 16, 16])
    """
    if intermediate is None:
        intermediate = torch.float32 if images.device.type == "cpu" else torch.float16
    _check_images(images)
    _check_parameters(parameters, images)
    _check_options(parameters, size, blur_kernel, mean, std, dtype, intermediate)
    choice = crops_backend(images)
    if choice.backend != "triton":
        raise RuntimeError(
            f"render_crops: expected the backend triton, got {choice.backend}: {choice.reason}"
        )
    from elastic_kernels.triton_ops.crops import crop_table

    operators = torch.ops.elastic_kernels
    boxes, flip, sigma, solarize = (
        parameters.boxes.float(), parameters.flip, parameters.sigma, parameters.solarize,
    )  # fmt: skip
    rows = ((boxes[:, 0] + boxes[:, 2]).ceil() - boxes[:, 0].floor()).long()  # that each box touches
    operations, amounts = _colour_turns(parameters)
    gain, shift = _normalisation(mean, std)
    table = crop_table(boxes, flip, rows, operations, amounts, sigma, solarize, gain, shift)
    table = upload(table, images.device)
    most_rows, all_rows = (int(rows.max()), int(rows.sum())) if len(rows) else (0, 0)
    crops = operators.crops_resample(images, table, size, most_rows, all_rows, intermediate)
    if rotate is not None:
        crops = rotate(crops.float()).contiguous()
    if (operations >= 0).any():
        operators.crops_colour_(crops, table)
    taps = blur_kernel if (sigma > 0).any() else 0
    return operators.crops_finish(crops, table, taps, dtype)


def crops_backend(images: Tensor) -> dispatch.Choice:
    """The backend for such canvases, and why; `render_crops` itself only runs on triton."""
    return dispatch.choose("render_crops", images, dtype=torch.float32)


def _colour_turns(parameters: CropParameters) -> tuple[Tensor, Tensor]:
    """Operations and amounts `[N, TURNS]` in order; what changes nothing is skipped."""
    from elastic_kernels.triton_ops.crops import SATURATION, SKIPPED

    order, factors = parameters.order, parameters.factors
    changes = parameters.jitter[:, None] & (factors != torch.tensor(NEUTRAL_CROP))
    jitter = order.masked_fill(~changes.gather(1, order), SKIPPED)
    # The gray image is what a saturation of 0 leaves.
    gray = torch.where(parameters.grayscale, SATURATION.value, SKIPPED)
    amounts = torch.cat([factors.gather(1, order), torch.zeros(len(order), 1)], 1)
    return torch.cat([jitter, gray[:, None]], 1), amounts


def _normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Gain and shift `[3]` with `(x / 255 - mean) / std = x * gain - shift`."""
    center, deviation = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    return 1 / (255 * deviation), center / deviation


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise TypeError(f"render_crops: expected uint8 images, got {images.dtype}")
    if images.dim() != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(
            f"render_crops: expected images [B, 3, H, W], none of it 0, got {list(images.shape)}"
        )


def _check_parameters(parameters: CropParameters, images: Tensor) -> None:
    boxes = parameters.boxes
    if boxes.dtype != torch.int64 and not boxes.is_floating_point():
        raise TypeError(f"render_crops: expected boxes int64 or floating point, got {boxes.dtype}")
    if boxes.dim() != 2 or boxes.shape[1] != 4 or len(boxes) % len(images):
        raise ValueError(
            f"render_crops: expected boxes [N, 4], N a multiple of {len(images)}, got {list(boxes.shape)}"
        )
    bools = dict.fromkeys(("flip", "jitter", "grayscale", "solarize"), torch.bool)
    dtypes = {"boxes": boxes.dtype, "factors": torch.float32, "order": torch.int64, "sigma": torch.float32}
    for name, dtype in (dtypes | bools).items():
        tensor: Tensor = getattr(parameters, name)
        shape = [len(boxes), 4] if name in ("boxes", "factors", "order") else [len(boxes)]
        if tensor.dtype != dtype:
            raise TypeError(f"render_crops: expected {name} {dtype}, got {tensor.dtype}")
        if list(tensor.shape) != shape or tensor.device.type != "cpu":
            got = f"{list(tensor.shape)} on {tensor.device}"
            raise ValueError(f"render_crops: expected {name} {shape} on the CPU, got {got}")
    _check_boxes(boxes, list(images.shape[2:]))
    wrong = (parameters.order.sort(1).values != torch.arange(4)).any(1)
    if wrong.any():
        first = parameters.order[wrong][0].tolist()
        raise ValueError(f"render_crops: expected an order of 0, 1, 2, 3, got {first}")


def _check_boxes(boxes: Tensor, canvas: list[int]) -> None:
    """In float32, as the kernels see them."""
    start = boxes[:, :2].float()
    end = start + boxes[:, 2:].float()
    inside = (start >= 0) & (start < end) & (end <= torch.tensor(canvas))
    wrong = ~inside.all(1)
    if wrong.any():
        got = boxes[wrong][0].tolist()
        raise ValueError(f"render_crops: expected boxes (top, left, height, width) in {canvas}, got {got}")


def _check_options(
    parameters: CropParameters,
    size: int,
    blur_kernel: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    intermediate: torch.dtype,
) -> None:
    if size < 1:
        raise ValueError(f"render_crops: expected a size of at least 1, got {size}")
    fits = blur_kernel % 2 == 1 and 1 <= blur_kernel < 2 * size
    if not fits and (parameters.sigma > 0).any():
        raise ValueError(f"render_crops: expected an odd blur_kernel in 1..{2 * size - 1}, got {blur_kernel}")
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"render_crops: expected mean and std of 3 channels, got {len(mean)} and {len(std)}")
    if dtype not in dispatch.TRITON_DTYPES:
        allowed = ", ".join(map(str, dispatch.TRITON_DTYPES))
        raise TypeError(f"render_crops: expected a dtype of {allowed}, got {dtype}")
    if intermediate not in (torch.float32, torch.float16):
        raise TypeError(f"render_crops: expected intermediates in float32 or float16, got {intermediate}")
