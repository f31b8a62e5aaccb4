"""Features of a data set for any number of subnets, decoding every image once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from poa.backbones import ElasticViT
from poa.config import CropsConfig
from poa.data.loader import evaluation_batches
from poa.data.resample import eval_crop
from poa.data.sources import ImageSource
from poa.subnets import Subnet


@torch.no_grad()
def subnet_features(
    backbone: ElasticViT,
    subnets: Sequence[Subnet],
    source: ImageSource,
    crops: CropsConfig,
    *,
    canvas: int,
    workers: int = 0,
) -> list[Tensor]:
    """Class-token features of every image for every subnet.

    Args:
        backbone: the shared weights; computed in their precision, on their device.
        subnets: which networks.
        source: the images.
        crops: gives the size of the centre crop and the normalisation.
        canvas: largest side of a decoded image, pixels.
        workers: decoding processes.

    Returns:
        float32 CPU tensors `[images, width]`, one per subnet.
    """
    functions = [lambda images, s=subnet: backbone([images], s)[0].cls.float() for subnet in subnets]
    device = backbone.cls_token.device
    return apply_to_images(functions, source, crops, device, canvas=canvas, workers=workers)


def pixel_features(source: ImageSource, crops: CropsConfig, *, canvas: int) -> Tensor:
    """The pixels of the centre crops themselves, `[images, 3 * size * size]`: a baseline without a model."""
    plain = torch.tensor(crops.std)[:, None, None], torch.tensor(crops.mean)[:, None, None]
    functions = [lambda images: (images * plain[0] + plain[1]).flatten(1)]
    return apply_to_images(functions, source, crops, torch.device("cpu"), canvas=canvas)[0]


def apply_to_images(
    functions: Sequence[Callable[[Tensor], Tensor]],
    source: ImageSource,
    crops: CropsConfig,
    device: torch.device,
    *,
    canvas: int,
    workers: int = 0,
) -> list[Tensor]:
    """Results of each function on the normalised centre crops of all images, on the CPU."""
    results: list[list[Tensor]] = [[] for _ in functions]
    for images, sizes in evaluation_batches(source, canvas, workers):
        batch = eval_crop(
            images.to(device, non_blocking=True),
            sizes,
            crops.global_size,
            crops.mean,
            crops.std,
            resize=crops.eval_resize(),
        )
        for collected, function in zip(results, functions, strict=True):
            collected.append(function(batch).cpu())
    return [torch.cat(collected) for collected in results]
