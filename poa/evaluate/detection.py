"""Detection and instance segmentation: torchvision's Mask R-CNN on a pyramid of a subnet, AP by COCO's rules.

The subnet is frozen, or fine-tuned with the detector by layer-wise learning-rate decay. Images are resized so
that the longer side has `size` pixels, and padded to a square. Without masks in the annotations it is a
Faster R-CNN. Source: ViTDet (Li et al., ECCV 2022); iBOT and POA use a Cascade Mask R-CNN.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from poa.backbones import Backbone
from poa.checkpoint import log
from poa.data.crops import CropsConfig
from poa.data.summary import LeftOut
from poa.errors import DivergenceError, InputError, optional_package
from poa.evaluate.coco import EXTRA, CocoImages, Example, average_precisions, read_coco
from poa.evaluate.protocol import OfFolder, folder_protocol
from poa.evaluate.pyramids import SubnetPyramid, anchor_sizes, layer_rates
from poa.optim import cosine_schedule
from poa.options import Options, option
from poa.random import stream_seed, torch_stream
from poa.subnets import Subnet


@dataclass(frozen=True)
class DetectionConfig(Options, at="detection"):
    """How a detector is trained: AdamW with a linear warm-up and a cosine schedule."""

    epochs: float = option(12.0, "length in epochs", "(0, 1e4]")
    batch_size: int = option(16, "images per step", "[1, 4096]")
    lr: float = option(1e-4, "peak learning rate", "(0, 1]")
    weight_decay: float = option(0.05, "weight decay", "[0, 1]")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises", "[0, 1)")
    frozen: bool = option(True, "false: fine-tune the subnet, too")
    layer_decay: float = option(
        0.7, "fine-tuned: factor of the learning rate from each block to the one before", "(0, 1]"
    )
    clip: float = option(1.0, "largest gradient norm", "(0, 1e6]")
    flip: float = option(0.5, "probability of a horizontal flip", "[0, 1]")
    size: int = option(1024, "pixels of the longer side of an image", "[16, 4096]")
    window: int = option(
        14,
        "patches along a side of the windows of a ViT, of which four blocks see the whole map; 0: all",
        "[0, 4096]",
    )
    channels: int = option(256, "channels of the pyramid and of the heads", "[8, 4096]")
    regions: int = option(512, "proposals per image that train the heads", "[8, 4096]")
    workers: int = option(0, "processes that read images; 0: none", "[0, 256]")


class Opened(NamedTuple):
    """Images of both parts, and how they are learned."""

    train: CocoImages
    val: CocoImages
    options: DetectionConfig
    crops: CropsConfig

    def counts(self) -> dict[str, int]:
        return {"train_images": len(self.train), "val_images": len(self.val)}


def build_detector(backbone: Backbone, subnet: Subnet, opened: Opened) -> nn.Module:
    """Mask R-CNN, or Faster R-CNN where there are no masks, on the device of the backbone.

    Raises:
        InputError: no torchvision, or a size that does not fit the subnet's strides.
    """
    models = optional_package("torchvision.models.detection", EXTRA)
    ops = optional_package("torchvision.ops", EXTRA)
    options, classes = opened.options, len(opened.train.categories) + 1
    pyramid = _pyramid(backbone, subnet, options)
    sizes, width = anchor_sizes(pyramid.strides), options.channels
    names = [str(level) for level in range(len(sizes) - 1)]
    arguments: dict[str, Any] = {
        "min_size": options.size,
        "max_size": options.size,
        "size_divisible": options.size,
        "image_mean": list(opened.crops.mean),
        "image_std": list(opened.crops.std),
        "rpn_anchor_generator": models.rpn.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes)),
        "box_roi_pool": ops.MultiScaleRoIAlign(names, 7, 2),
        "box_head": models.faster_rcnn.TwoMLPHead(width * 49, 4 * width),
        "box_predictor": models.faster_rcnn.FastRCNNPredictor(4 * width, classes),
        "box_batch_size_per_image": options.regions,
    }
    if not opened.train.has_masks:
        return models.FasterRCNN(pyramid, **arguments).to(next(backbone.parameters()).device)
    masks = {
        "mask_roi_pool": ops.MultiScaleRoIAlign(names, 14, 2),
        "mask_head": models.mask_rcnn.MaskRCNNHeads(width, (width,) * 4, 1),
        "mask_predictor": models.mask_rcnn.MaskRCNNPredictor(width, width, classes),
    }
    return models.MaskRCNN(pyramid, **arguments, **masks).to(next(backbone.parameters()).device)


def _pyramid(backbone: Backbone, subnet: Subnet, options: DetectionConfig) -> SubnetPyramid:
    pyramid = SubnetPyramid(backbone, subnet, options.channels, options.frozen, options.window)
    pyramid.require_size(options.size)
    return pyramid


def _check(backbone: Backbone, subnet: Subnet, opened: Opened) -> None:
    with torch.random.fork_rng([]):
        _pyramid(backbone, subnet, opened.options)


def flipped(example: Example) -> Example:
    """The mirror image with its instances."""
    image, target = example.image.flip(-1), dict(example.target)
    left, top, right, bottom = target["boxes"].unbind(1)
    target["boxes"] = torch.stack([image.shape[-1] - right, top, image.shape[-1] - left, bottom], 1)
    if "masks" in target:
        target["masks"] = target["masks"].flip(-1)
    return Example(image, target)


class Reader:
    """Reads images in batches, and counts those that it read and, once each, those that it cannot read."""

    def __init__(self, images: CocoImages, options: DetectionConfig):
        self.images, self.options = images, options
        self.unread: set[str] = set()
        self.read = 0

    def batches(self, positions: Sequence[int]) -> Iterator[list[tuple[int, Example]]]:
        """Position and content of the images at these positions, in order; without those that fail."""
        batch, workers = self.options.batch_size, self.options.workers
        loader = DataLoader(Subset(self.images, positions), batch, collate_fn=list, num_workers=workers)
        starts = range(0, len(positions), batch)
        for start, examples in zip(starts, loader, strict=True):
            pairs = list(zip(positions[start : start + batch], examples, strict=True))
            self.unread |= {example for _, example in pairs if isinstance(example, str)}
            examples_read = [(place, example) for place, example in pairs if not isinstance(example, str)]
            self.read += len(examples_read)
            yield examples_read

    def tell(self, kind: str) -> None:
        """Log how many images could not be read. Raises InputError: none of these `kind` images could."""
        left_out = LeftOut()
        for text in sorted(self.unread):
            left_out.add("images that cannot be read", text)
        if left_out:
            log.warning("detection: left out: %s", left_out)
        if not self.read:
            raise InputError(f"--detection: expected {kind} images that can be read, got none")


def train_detector(model: nn.Module, reader: Reader, options: DetectionConfig, seed: int) -> None:
    """Train a detector on the images with instances; a function of the seed.

    Raises:
        DivergenceError: the loss is not finite.
    """
    device = next(model.parameters()).device
    chosen, draw = torch.tensor(reader.images.with_instances()), torch_stream(seed, "detection order")
    steps = max(round(options.epochs * len(chosen) / options.batch_size), 1)
    epochs = -(-steps * options.batch_size // len(chosen))
    order = torch.cat([chosen[torch.randperm(len(chosen), generator=draw)] for _ in range(epochs)])
    optimizer = _optimizer(model, options)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = cosine_schedule(1.0, 0.0, steps, warmup=round(options.warmup * steps))
    positions = order[: steps * options.batch_size].tolist()
    model.train()
    forked = [device] if device.type == "cuda" else []
    bar = tqdm(reader.batches(positions), "detector", steps, leave=False, disable=None)
    for step, batch in enumerate(bar):
        if not batch:
            continue
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * schedule[step]
        mirrored = torch.rand(len(batch), generator=draw) < options.flip
        examples = [flipped(e) if flip else e for (_, e), flip in zip(batch, mirrored, strict=True)]
        images, targets = zip(*(_on_device(example, device) for example in examples), strict=True)
        with torch.enable_grad(), torch.random.fork_rng(forked):
            torch.manual_seed(stream_seed(seed, "detection", step))  # of torchvision's sampling
            loss = torch.stack([*model(list(images), list(targets)).values()]).sum()
            optimizer.zero_grad()
            loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        if not norm.isfinite():
            raise DivergenceError(
                f"detection: loss {float(loss):g} of step {step + 1} has no finite gradient"
            )
        optimizer.step()


def _optimizer(model: nn.Module, options: DetectionConfig) -> torch.optim.Optimizer:
    """AdamW; parameters with one dimension do not decay."""
    pyramid: Any = model.get_submodule("backbone")
    groups = layer_rates(pyramid, options.lr, options.layer_decay)
    known = {id(parameter) for group in groups for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    split = [
        {"params": [p for p in group["params"] if (p.dim() > 1) == decays], "lr": group["lr"],
         "weight_decay": options.weight_decay if decays else 0.0}
        for group in [*groups, {"params": rest, "lr": options.lr}] for decays in (True, False)
    ]  # fmt: skip
    return torch.optim.AdamW([group for group in split if group["params"]])


def _on_device(example: Example, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    return example.image.to(device), {name: value.to(device) for name, value in example.target.items()}


@torch.no_grad()
def detect(model: nn.Module, reader: Reader) -> tuple[list[int], list[dict[str, Any]]]:
    """Ids of the images that could be read, and the predictions on them, as COCO's evaluators take them.

    A prediction has `bbox` `[x, y, width, height]` in pixels and, of Mask R-CNN, `segmentation`.
    """
    api = optional_package("faster_coco_eval", EXTRA)
    images, ids, predictions = reader.images, list[int](), list[dict[str, Any]]()
    device = next(model.parameters()).device
    model.eval()
    for batch in reader.batches(range(len(images))):
        outputs = model([example.image.to(device) for _, example in batch]) if batch else []
        for (position, _), output in zip(batch, outputs, strict=True):
            ids.append(images.ids[position])
            predictions += _predictions(output, images, position, api)
    return ids, predictions


def _predictions(
    output: dict[str, Tensor], images: CocoImages, position: int, api: Any
) -> Iterator[dict[str, Any]]:
    """Those of an image."""
    corners = output["boxes"].cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
    runs: list[Any] = []
    if "masks" in output:
        masks = (output["masks"][:, 0] > 0.5).byte().permute(1, 2, 0).cpu().numpy()
        runs = api.mask.encode(masks.copy(order="F"))
    scores, labels = output["scores"].tolist(), output["labels"].tolist()
    for number, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        masked = {"segmentation": runs[number]} if runs else {}
        about = {"image_id": images.ids[position], "category_id": images.categories[label - 1]}
        yield {**about, "score": score, "bbox": box, **masked}


def detection(
    backbone: Backbone, subnet: Subnet, opened: Opened, device: torch.device, seed: int
) -> dict[str, dict[str, float]]:
    """AP `{"bbox": {"AP": 0..1, ...}, "segm": ...}` of a detector that is trained on a subnet.

    Raises:
        InputError: of `build_detector`.
        DivergenceError: of `train_detector`.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(seed, "detector"))
        model = build_detector(backbone, subnet, opened)
    reader, asked = Reader(opened.train, opened.options), Reader(opened.val, opened.options)
    train_detector(model, reader, opened.options, seed)
    reader.tell("training")
    ids, predictions = detect(model, asked)
    asked.tell("validation")
    kinds = {"bbox": "segmentation"} | ({"segm": "bbox"} if opened.train.has_masks else {})
    return {
        kind: average_precisions(
            opened.val.truth,
            [{name: value for name, value in p.items() if name != other} for p in predictions],
            kind,
            ids,
        )
        for kind, other in kinds.items()
    }


def _open(folder: Path, crops: CropsConfig, options: Options, left_out: LeftOut) -> Opened:
    assert isinstance(options, DetectionConfig)
    optional_package("torchvision.models.detection", EXTRA)
    train, val = read_coco(folder, len(crops.mean), left_out)
    return Opened(train, val, options, crops)


def _columns(score: dict[str, dict[str, float]]) -> dict[str, float]:
    named = {"bbox": "box", "segm": "mask"}
    return {f"{named[kind]} {title}": value for kind, part in score.items() for title, value in part.items()}


DETECTION = folder_protocol(
    "detection",
    "also train detectors on this folder in COCO's layout, with options such as epochs=1: AP of boxes, masks",
    OfFolder(DetectionConfig(), _open, detection, _check),
    _columns,
    "box AP",
    {"protocol": "Mask R-CNN of torchvision on a feature pyramid of the subnet, AP by COCO's rules"},
    baselines=(),
)
