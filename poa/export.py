"""Subnets out: ordinary networks in safetensors files, and the loader that reads them.

A file holds a static network: the prefix of every weight, the offset scale folded into it, the kept blocks
renumbered. Where timm has the architecture, names are timm's. Beside it lies a JSON file with the
architecture, the pre-processing, where it comes from and the SHA-256 of the weights, which is checked when
they are loaded. Every file is checked before it gets its name: its
forward must equal the elastic subnet's.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from elastic_kernels import eval_crop
from poa.backbones import CONFIGS, Backbone
from poa.checkpoint import Branch, RunFolder
from poa.data.crops import CropsConfig
from poa.data.decode import to_pixels
from poa.data.loader import place_on_canvases
from poa.data.sources import ImageSource
from poa.data.storage import Files
from poa.errors import InputError, as_input
from poa.files import make_folder, open_regular, read_json, sealed, unsealed, write_bytes, write_json
from poa.options import section_from_dict, to_dict
from poa.subnets import Subnet

Picture = Image.Image | str | Path
FORMAT = "poa-model-1"
TOLERANCE = 1e-5  # largest difference of a file's forward from the elastic subnet's, fp32, relative to 1


class ExportedModel(nn.Module):
    """A subnet read from a file: images in, features out.

    Attributes:
        backbone: the network, which also gives patch tokens: `model.backbone([images])[0].patches`.
        info: what the JSON file says.

    Example:
        >>> import poa
        >>> model = poa.load("runs/first")
        >>> images = model.preprocess(["photo.jpg", "photo.jpg"])
        >>> model.backbone([images])[0].patches.shape
        torch.Size([2, 9, 32])
    """

    def __init__(self, backbone: Backbone, info: dict[str, Any]):
        super().__init__()
        self.backbone = backbone
        self.info = info

    def forward(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Features as k-NN sees them.

        Args:
            images: normalised, float32 `[B, 3, H, W]` on the device of the model; or a file, a picture or
                several of them, of any sizes, which `preprocess` prepares.

        Returns:
            float32 `[B, width]` (of a Swin or ResNet as many channels as its last stage has).

        Raises:
            ImageError: a file is no image; the message names it.
        """
        crops = images if isinstance(images, Tensor) else self.preprocess(images)
        return self.backbone([crops])[0].cls

    def save(self, path: str | Path) -> None:
        """Write the model as it is now, so that `load` gives it again.

        Args:
            path: of the `.safetensors` file; its `.json` is written beside it, folders as needed.

        Raises:
            InputError: another ending, or no folder to write to.
            SaveError: the file system refused it.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"save: expected a name that ends in .safetensors, got {path}")
        make_folder(path.parent, "save")
        content = tensor_bytes(self.backbone.exported_state(), metadata={"format": "pt"})
        info = self.info | {"sha256": hashlib.sha256(content).hexdigest()}
        write_json(path.with_suffix(".json"), sealed(info))
        write_bytes(path, content)

    def preprocess(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Files or pictures of any size -> normalised centre crops `[B, 3, S, S]`, as in evaluation.

        A JPEG that comes as a picture and not as a file is shrunk by another filter.

        Raises:
            ImageError: a file is no image; the message names it.
        """
        pictures = [images] if isinstance(images, str | Path | Image.Image) else images
        wanted = self.info["preprocessing"]
        limit, bits = wanted.get("canvas", wanted["resize"]), wanted.get("bits")
        canvas, sizes = place_on_canvases([_pixels(picture, limit, bits) for picture in pictures])
        crops = eval_crop(
            canvas, sizes, wanted["size"], wanted["mean"], wanted["std"], resize=wanted["resize"]
        )
        return crops.to(next(self.backbone.parameters()).device)


def _pixels(picture: Picture, canvas: int, bits: int | None) -> np.ndarray:
    if isinstance(picture, Image.Image):
        return to_pixels(picture, canvas, bits)
    return ImageSource(Files(Path(), [str(picture)]), np.arange(1), None, (), bits).read(0, canvas)


def load(
    path: str | Path,
    subnet: Subnet | str | None = None,
    *,
    branch: Branch = "teacher",
    step: int | None = None,
) -> ExportedModel:
    """Read a subnet as a model of its own, on the CPU, in evaluation mode.

    Args:
        path: a run folder, a `.safetensors` file that `poa extract` or `save` wrote (its `.json` lies beside
            it), or a folder of such files.
        subnet: which; needed where there are several. Default of a run: the intact network.
        branch: of a run: whose weights.
        step: of a run: that of the checkpoint; default the newest.

    Raises:
        InputError: nothing of these is there, a file was changed, or a subnet is not among them.

    Example:
        >>> import poa
        >>> model = poa.load("runs/first", "16x1")
        >>> model("photo.jpg").shape
        torch.Size([1, 16])
    """
    path, wanted = Path(path), Subnet.parse(subnet) if isinstance(subnet, str) else subnet
    if (path / "config.json").exists():
        folder = RunFolder(path)
        network, checkpoint = folder.network(branch, step)
        config, backbone = folder.config(), network.backbone
        return static_model(
            backbone,
            wanted or backbone.space.intact,
            config.method.crops,
            canvas=config.method.canvas,
            bits=config.data.bits,
            source=f"{checkpoint.path} ({branch})",
        )
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    subnets = {file: _subnet(file) for file in files}
    chosen = [file for file in files if wanted in (None, subnets[file])]
    if len(chosen) != 1:
        which, names = wanted or "one subnet", ", ".join(map(str, subnets.values())) or "none"
        raise InputError(f"{path}: expected {which} of what lies there, got {len(chosen)} of: {names}")
    return _read_model(chosen[0])


def _subnet(path: Path) -> Subnet:
    with as_input(f"{path}: expected an extracted subnet"):
        info = _read_info(path.with_suffix(".json"))
        depth = info["depth"]
        return Subnet(info["width"], tuple(depth) if isinstance(depth, list) else depth)


def _read_model(path: Path) -> ExportedModel:
    with as_input(f"{path}: expected an extracted subnet"):
        info = _read_info(path.with_suffix(".json"))
        with open_regular(path) as file:
            content = file.read()
        if (got := hashlib.sha256(content).hexdigest()) != info["sha256"]:
            raise InputError(
                f"{path}: expected the weights of its JSON file (sha256 {info['sha256']:.8}), got others "
                f"({got:.8}); extract them again"
            )
        backbone = section_from_dict(CONFIGS, info["backbone"], "backbone").build()
        backbone.load_exported_state(read_tensors(content), str(path))
    return ExportedModel(backbone, info).eval()


def _read_info(path: Path) -> dict[str, Any]:
    """What is beside the weights, as it was written."""
    info = read_json(path, f"{path}: expected the JSON file of an extracted subnet")
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        got = info.get("format") if isinstance(info, dict) else type(info).__name__
        raise InputError(f"{path}: expected format {FORMAT}, got {got}")
    if (content := unsealed(info)) is None:
        raise InputError(f"{path}: expected what extract wrote, got a changed file; extract it again")
    return content


def extract(
    backbone: Backbone,
    subnet: Subnet,
    folder: Path,
    crops: CropsConfig,
    *,
    canvas: int | None = None,
    bits: int | None = None,
    image_size: int | None = None,
    source: str = "",
) -> Path:
    """Write one subnet as a static model.

    Args:
        folder: where `{kind}-{subnet}.safetensors` and `.json` go; made if needed.
        backbone, subnet, crops, canvas, bits, image_size, source: as in `static_model`.

    Returns:
        The path of the safetensors file.

    Raises:
        InputError: as `static_model`.
    """
    model = static_model(
        backbone, subnet, crops, canvas=canvas, bits=bits, image_size=image_size, source=source
    )
    config = model.backbone.config
    suffix = f"-{config.image_size}px" if config.image_size != backbone.config.image_size else ""
    path = folder / f"{config.kind}-{subnet}{suffix}.safetensors"
    model.save(path)
    return path


def static_model(
    backbone: Backbone,
    subnet: Subnet,
    crops: CropsConfig,
    *,
    canvas: int | None = None,
    bits: int | None = None,
    image_size: int | None = None,
    source: str = "",
) -> ExportedModel:
    """A subnet as a model of its own, in evaluation mode, after a check that its features are the same.

    Args:
        backbone: the shared weights.
        subnet: which network.
        crops: gives the pre-processing.
        canvas: side in pixels of the square that images are shrunk to fit, at the image size of training;
            default: as many as the shorter side has before the crop.
        bits: of pixels that have more than 8; default: as many as each image needs.
        image_size: pixels of its images; a position embedding is interpolated to it. Default: as trained.
        source: where the weights come from, kept in the JSON file.

    Raises:
        InputError: a subnet outside the space, or an image size that the backbone cannot take.
    """
    static = backbone.to_static(backbone.space.require(subnet), image_size)
    worst = _largest_difference(backbone, static, subnet)
    config, size = static.config, static.config.image_size
    info = {
        "format": FORMAT,
        "width": subnet.width,
        "depth": subnet.depth,
        "params": backbone.config.parameters(subnet),
        "backbone": to_dict(config),
        "timm": config.timm_arguments(),
        "preprocessing": {
            "size": size,
            "canvas": round(canvas * size / backbone.config.image_size)
            if canvas
            else crops.eval_resize(size),
            "bits": bits,
            "resize": crops.eval_resize(size),
            "interpolation": "bicubic",
            "mean": list(crops.mean),
            "std": list(crops.std),
        },
        "source": source,
        "largest_difference": worst,
    }
    return ExportedModel(static, info).eval()


@torch.no_grad()
def _largest_difference(elastic: Backbone, static: Backbone, subnet: Subnet) -> float:
    """Compare both networks on random images of the static one's size; raise where they are not equal."""
    size, weight = static.config.image_size, next(elastic.parameters())
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole = elastic if weight.dtype == torch.float32 else copy.deepcopy(elastic).float()
    (a,) = whole([images.to(weight.device)], subnet)
    (b,) = static([images])
    pairs = ((a.cls.cpu(), b.cls), (a.patches.cpu(), b.patches))
    worst = max(float((x - y).abs().max() / max(1.0, float(y.abs().max()))) for x, y in pairs)
    if not worst < TOLERANCE:  # also where it is NaN
        raise RuntimeError(
            f"extract: the static model differs from subnet {subnet} by {worst:.2e}, "
            f"expected less than {TOLERANCE:.0e}; nothing was written"
        )
    return worst
