"""Another, frozen teacher: pretrained weights of any shape, which feature distillation follows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poa.backbones import BackboneConfig
from poa.checkpoint import RunFolder
from poa.config import MethodConfig
from poa.data.crops import CropsConfig
from poa.errors import InputError
from poa.initialization.source import Source, is_run, read_source

DIGITS = 16  # of a digest


class FrozenTeacher(nn.Module):
    """Pretrained weights that no step changes.

    Args:
        source: they.
        size: pixels of a side of the images that they see; 0: as many as the source's.
        crops: what the global crops were normalised by.

    Attributes:
        digest: of the weights, so that a resumed run knows them again.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, source: Source, size: int, crops: CropsConfig):
        super().__init__()
        config, channels = source.backbone.config, len(crops.mean)
        if config.channels != channels:
            raise InputError(
                f"{source.name}: expected a teacher for images of {channels} channels, got one for "
                f"{config.channels}"
            )
        self.size, self.source, self.backbone = size or config.image_size, source, source.backbone
        if self.size != config.image_size:
            try:
                self.backbone = config.changed(image_size=self.size).build()
            except InputError as error:
                raise InputError(f"method.teacher.frozen_size: {error}") from None
            source.place_into(self.backbone)
        self.backbone.requires_grad_(False).eval()
        self.digest = _digest(self.backbone)
        ours = crops.mean, crops.std
        mean, std, to_mean, to_std = map(torch.tensor, (*ours, *(source.normalisation or ours)))
        self.register_buffer("scale", (std / to_std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", ((mean - to_mean) / to_std).view(-1, 1, 1), persistent=False)

    def __str__(self) -> str:
        return f"{self.source}; frozen, on crops of {self.size} pixels"

    @property
    def flops(self) -> int:
        """FLOPs of the forward of a crop."""
        return self.backbone.config.flops(self.backbone.config.space.intact)

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """Class tokens `[crops, w]` of global crops `[crops, C, S, S]`, whatever their size."""
        images = crops.float()
        if images.shape[-1] != self.size:
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        none = torch.empty(0, dtype=torch.int64, device=crops.device)
        return self.backbone.gather_tokens([images * self.scale + self.shift], none)


def frozen_teacher(method: MethodConfig) -> FrozenTeacher | None:
    """That of `method.teacher.frozen`, on the CPU; None where none is named.

    Raises:
        InputError: it cannot be read, or takes other images.
    """
    name = method.teacher.frozen
    if not name:
        return None
    return FrozenTeacher(_source(name, method.backbone), method.teacher.frozen_size, method.crops)


def _source(name: str, hints: BackboneConfig) -> Source:
    """As `read_source`, and of the teacher of a run."""
    if not is_run(name):
        return read_source(name, hints)
    folder = RunFolder(Path(name))
    network, checkpoint = folder.network()
    crops = folder.config().method.crops
    where = f"step {checkpoint.step:,} of {name}"
    return Source(where, network.backbone, elastic=True, normalisation=(crops.mean, crops.std))


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:DIGITS]
