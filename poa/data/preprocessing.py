"""From images to the pixels that a network sees: one way for evaluation, extracted models and exports."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from elastic_kernels import eval_crop
from poa.data.crops import CropsConfig
from poa.data.decode import to_pixels
from poa.data.loader import place_on_canvases
from poa.data.sources import ImageSource
from poa.data.storage import Files
from poa.errors import InputError, as_input

Picture = Image.Image | str | Path


@dataclass(frozen=True)
class Preprocessing:
    """Normalised centre crops of images of any size.

    Attributes:
        size: pixels of a side of the crop.
        resize: pixels of the shorter side of an image before the crop.
        canvas: side in pixels of the square that a decoded image is shrunk to fit.
        mean, std: of each channel, of pixels in 0..1.
        bits: of pixels that have more than 8; None: as many as each image needs.

    Example:
        >>> from PIL import Image
        >>> from poa import Preprocessing
        >>> pixels = Preprocessing(24, 27, 32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
        >>> pixels([Image.new("L", (40, 30)), "photo.jpg"]).shape
        torch.Size([2, 3, 24, 24])
    """

    size: int
    resize: int
    canvas: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bits: int | None = None

    @property
    def channels(self) -> int:
        """Of the images."""
        return len(self.mean)

    @classmethod
    def of(
        cls, crops: CropsConfig, canvas: int | None = None, bits: int | None = None, size: int | None = None
    ) -> Preprocessing:
        """That of evaluation, for crops of `size` pixels (default: as in training).

        By default the canvas is as many pixels as the shorter side has before the crop.
        """
        resize = crops.eval_resize(size)
        return cls(size or crops.global_size, resize, canvas or resize, crops.mean, crops.std, bits)

    @classmethod
    def from_dict(cls, wanted: Mapping[str, Any] | str) -> Preprocessing:
        """Read what `to_dict` gave, also as the JSON that lies in the metadata of an ONNX file.

        Raises:
            InputError: it is something else.
        """
        with as_input("preprocessing: expected that of an extracted model"):
            wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
            mean, std = (tuple(float(x) for x in wanted[name]) for name in ("mean", "std"))
            size, resize = int(wanted["size"]), int(wanted["resize"])
            return cls(size, resize, int(wanted.get("canvas", resize)), mean, std, wanted.get("bits"))

    def to_dict(self) -> dict[str, Any]:
        """Its values for a JSON file."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std), "interpolation": "bicubic"}

    def crop(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalised centre crops, float32 `[B, C, size, size]`, of decoded images on canvases.

        Args:
            images: uint8 `[B, C, H, W]`, each in the top-left corner.
            sizes: int64 `[B, 2]`, their (height, width).
        """
        return eval_crop(images, sizes, self.size, self.mean, self.std, resize=self.resize)

    def __call__(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Files or pictures to float32 `[B, C, size, size]` on the CPU.

        A JPEG that comes as a picture and not as a file is shrunk by another filter.

        Raises:
            ImageError: a file is no image; the message names it.
            InputError: something is neither a file nor a picture.
        """
        pictures = images if isinstance(images, Iterable) and not isinstance(images, str) else [images]
        return self.crop(*place_on_canvases([self._decoded(picture) for picture in pictures]))

    def _decoded(self, picture: Picture) -> np.ndarray:
        if isinstance(picture, Image.Image):
            return to_pixels(picture, self.canvas, self.bits, self.channels)
        if not isinstance(picture, str | Path):
            raise InputError(f"images: expected files or pictures of Pillow, got {type(picture).__name__}")
        files = Files(Path(), [str(picture)])
        source = ImageSource(files, np.arange(1), None, (), self.bits, self.channels)
        return source.read(0, self.canvas)
