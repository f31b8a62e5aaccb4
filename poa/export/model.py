"""A subnet as a model of its own, whose features are checked against the elastic subnet's.

It has the prefix of every weight, the offset scale folded into it, and the kept blocks renumbered.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from poa.backbones import Backbone, BackboneConfig
from poa.classifier import Classifier
from poa.data.crops import CropsConfig
from poa.data.preprocessing import Picture, Preprocessing
from poa.errors import ExportError, InputError, optional_package
from poa.files import make_folder, read_json, sealed, write_bytes, write_json
from poa.options import to_dict
from poa.subnets import Subnet
from poa.weights import load_strictly

log = logging.getLogger("poa")
FORMAT = "poa-model-2"
WEIGHTS, CONFIG = "model.safetensors", "config.json"
MADE_OF_WEIGHTS = ("model*.onnx", "model*.pt2")  # files of other runtimes in a model's folder
HEAD = "head"  # name of classifiers of networks that timm has not
TOLERANCE = 1e-5  # largest difference of a model's forward from the elastic subnet's, fp32, relative to 1


class ExportedModel(nn.Module):
    """A subnet as an ordinary network: images in, features out.

    Attributes:
        head: the classifier of a fine-tuned subnet, from features to logits; None without one.
        backbone: the network, in plain PyTorch operations, which also gives patch tokens:
            `model.backbone([images])[0].patches`.
        config: its shape.
        preprocess: from files or pictures of any size to its normalised images, as in evaluation.
        info: subnet, parameters, pre-processing, where the weights come from.

    Example:
        >>> import poa
        >>> model = poa.load("runs/first")
        >>> images = model.preprocess(["photo.jpg", "photo.jpg"])
        >>> model.backbone([images])[0].patches.shape
        torch.Size([2, 9, 32])
    """

    def __init__(
        self, backbone: nn.Module, config: BackboneConfig, info: dict[str, Any], head: nn.Linear | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.config = config
        self.info = info
        self.preprocess = Preprocessing.from_dict(info["preprocessing"])

    @property
    def subnet(self) -> Subnet:
        """Which network of its run."""
        depth = self.info["depth"]
        return Subnet(self.info["width"], tuple(depth) if isinstance(depth, list) else depth)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of a fine-tuned subnet, in the order of its logits; none without a head."""
        return list(self.info.get("classes", ()))

    def classify(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Logits of the classes, float32 `[B, classes]`; the arguments are those of `forward`.

        Raises:
            InputError: the model is not of a fine-tuned run.
        """
        if self.head is None:
            raise InputError("classify: expected a model of a fine-tuned run, got one without a classifier")
        logits: Tensor = self.head(self(images))
        return logits

    def forward(self, images: Tensor | Picture | Sequence[Picture]) -> Tensor:
        """Features as k-NN sees them.

        Args:
            images: normalised, float32 `[B, C, H, W]` on the device of the model; or a file, a picture or
                several of them, of any sizes, which `preprocess` prepares.

        Returns:
            float32 `[B, width]` (of a Swin or ResNet as many channels as its last stage has).

        Raises:
            ImageError: a file is no image; the message names it.
            InputError: what is given is neither such a tensor nor a file or picture.
        """
        if not isinstance(images, Tensor):
            images = self.preprocess(images).to(next(self.backbone.parameters()))
        channels = self.preprocess.channels
        if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
            got = f"{images.dtype} {list(images.shape)}"
            raise InputError(f"images: expected normalised ones, float [B, {channels}, H, W], got {got}")
        features: Tensor = self.backbone([images])[0].cls
        return features

    def to_timm(self) -> nn.Module:
        """The same network as timm's, with the same weights, in evaluation mode.

        Raises:
            InputError: timm has no such network, or is not installed.
        """
        described = self.config.timm_model()
        if described is None:
            raise InputError(f"to_timm: timm has no such {self.config.kind}")
        timm = optional_package("timm", "timm")
        model: nn.Module = timm.create_model(
            described.architecture, num_classes=len(self.classes), **described.arguments
        )
        model.load_state_dict(self.exported_state())
        return model.eval()

    def exported_state(self) -> dict[str, Tensor]:
        """The weights as files hold them, under timm's names where timm has the network."""
        described, state = self.config.timm_model(), self.backbone.state_dict()
        if self.head is not None:
            name = described.classifier if described else HEAD
            state |= {f"{name}.{key}": value for key, value in self.head.state_dict().items()}
        return state

    def save(self, folder: str | Path) -> Path:
        """Write the model as it is now, so that `load` and timm give it again.

        Files of other runtimes there that were made of other weights are removed, with a warning.

        Args:
            folder: made as needed.

        Returns:
            The folder.

        Raises:
            InputError: a name that ends in .safetensors, or no folder can be made.
            SaveError: the file system refused it.
        """
        folder = Path(folder)
        if folder.suffix == ".safetensors":
            raise InputError(f"save: expected the name of a folder, got {folder}")
        make_folder(folder, "save")
        content = self._content()
        info = self.info | {"format": FORMAT, "sha256": hashlib.sha256(content).hexdigest()}
        _remove_outdated(folder, info["sha256"])
        write_json(folder / CONFIG, sealed(_for_timm(self) | {"poa": info}))
        write_bytes(folder / WEIGHTS, content)
        return folder

    def sha256(self) -> str:
        """Checksum of the weights as they are now, that of the file that `save` would write."""
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        return tensor_bytes(self.exported_state(), metadata={"format": "pt"})


def _remove_outdated(folder: Path, sha256: str) -> None:
    """Remove what was made of a model of other weights in its folder."""
    before = sha256
    with suppress(InputError, LookupError, TypeError):  # none, or damaged
        before = read_json(folder / CONFIG, "model")["poa"]["sha256"]
    for file in (file for pattern in MADE_OF_WEIGHTS if before != sha256 for file in folder.glob(pattern)):
        file.unlink()
        log.warning("%s: removed, it was made of other weights", file)


def _for_timm(model: ExportedModel) -> dict[str, Any]:
    """What timm reads; nothing where it has no such network."""
    described, pixels = model.config.timm_model(), model.preprocess
    if described is None:
        return {}
    return {
        "architecture": described.architecture,
        "num_classes": len(model.classes),
        **({"label_names": model.classes} if model.classes else {}),
        "num_features": model.config.feature_width(model.subnet),
        "model_args": described.arguments,
        "pretrained_cfg": {
            "input_size": [pixels.channels, pixels.size, pixels.size],
            "fixed_input_size": described.fixed_input_size,
            "interpolation": "bicubic",
            "crop_pct": pixels.size / pixels.resize,
            "crop_mode": "center",
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": len(model.classes),
            # timm would make another layer of one that does not have three channels.
            "first_conv": described.first_conv if pixels.channels == 3 else None,
            "classifier": described.classifier,
            "custom_load": False,
        },
    }


def static_model(
    backbone: Backbone,
    subnet: Subnet,
    crops: CropsConfig,
    *,
    canvas: int | None = None,
    bits: int | None = None,
    image_size: int | None = None,
    source: str = "",
    classifier: Classifier | None = None,
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
        classifier: of a fine-tuned run, whose backbone it is.

    Raises:
        InputError: a subnet outside the space, or an image size that the backbone cannot take.
    """
    static = backbone.to_static(backbone.space.require(subnet), image_size)
    config, network = static.config, static.config.plain().eval()
    load_strictly(network, static.exported_state(), "static")
    size = config.image_size
    scaled = round(canvas * size / backbone.config.image_size) if canvas else None
    info = {
        "format": FORMAT,
        "width": subnet.width,
        "depth": list(subnet.depth) if isinstance(subnet.depth, tuple) else subnet.depth,
        "params": backbone.config.parameters(subnet),
        "backbone": to_dict(config),
        "preprocessing": Preprocessing.of(crops, scaled, bits, size).to_dict(),
        "source": source,
        "largest_difference": _largest_difference(backbone, network, subnet, size),
    }
    head = None
    if classifier:
        info["classes"] = list(classifier.classes)
        head = classifier.plain_head(config.feature_width(subnet))
    return ExportedModel(network, config, info, head).eval()


@torch.no_grad()
def _largest_difference(elastic: Backbone, network: nn.Module, subnet: Subnet, size: int) -> float:
    """Compare both networks on random images of the model's size; raise where they are not equal."""
    weight = next(elastic.parameters())
    images = torch.randn(2, elastic.config.channels, size, size, generator=torch.Generator().manual_seed(0))
    whole = elastic if weight.dtype == torch.float32 else copy.deepcopy(elastic).float()
    (a,) = whole([images.to(weight.device)], subnet)
    (b,) = network([images])
    pairs = ((a.cls.cpu(), b.cls), (a.patches.cpu(), b.patches))
    worst = max(float((x - y).abs().max() / max(1.0, float(y.abs().max()))) for x, y in pairs)
    if not worst < TOLERANCE:  # also where it is NaN
        raise ExportError(
            f"extract: the static model differs from subnet {subnet} by {worst:.2e}, "
            f"expected less than {TOLERANCE:.0e}; nothing was written"
        )
    return worst
