"""Scores of models beside those of runs: extracted ones, and those of timm as peers."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from poa.backbones.base import Backbone, BackboneConfig, Features
from poa.config import Config, with_data
from poa.data.crops import CropsConfig
from poa.data.preprocessing import Preprocessing
from poa.distributed import World, init_distributed
from poa.errors import InputError, as_input, optional_package
from poa.evaluate.plots import plot_reports
from poa.evaluate.protocol import Protocol
from poa.evaluate.runs import require_outputs
from poa.evaluate.scores import Report, write_models
from poa.evaluate.suite import Folders
from poa.evaluate.sweep import Origin, evaluate_subnets
from poa.evaluate.top1 import TOP1, require_classes
from poa.export import ExportedModel, load
from poa.images import open_on_ranks
from poa.initialization.source import TIMM, read_source
from poa.options import option
from poa.subnets import SearchSpace, Subnet
from poa.version import VERSION

BRANCH = "model"  # in settings, as models have none
FINEST = 4  # pixels of the stride of the finest map that a detector gets


@dataclass(frozen=True)
class PeerConfig(BackboneConfig):
    """The size of a network of timm."""

    kind: Literal["timm"] = option("timm", "a network of timm")
    image_size: int = option(224, "pixels of a side of an image", "[1, 4096]")
    channels: int = option(3, "channels of the images", "[1, 16]")
    width: int = option(384, "channels of its features", "[1, 65536]")
    depth: int = option(12, "its blocks", "[1, 4096]")
    count: int = option(0, "its parameters", "[0, inf)")
    cost: int = option(0, "FLOPs of a forward", "[0, inf)")
    patches: int = option(14, "patches along a side", "[1, 4096]")

    @classmethod
    def of_weights(cls, state: Mapping[str, Tensor], head_dim: int, norm_groups: int) -> BackboneConfig:
        raise NotImplementedError

    @property
    def space(self) -> SearchSpace:
        return SearchSpace((self.width,), (self.depth,))

    def _half_depth(self) -> dict[str, Any]:
        raise NotImplementedError

    @property
    def stride(self) -> int:
        return self.image_size // self.patches

    def feature_width(self, subnet: Subnet) -> int:
        return self.width

    def grid(self, image_size: int) -> int:
        return image_size // self.stride

    def parameters(self, subnet: Subnet) -> int:
        return self.count

    def flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        return self.cost

    def embedding_flops(self, subnet: Subnet, image_size: int | None = None) -> int:
        raise NotImplementedError

    def build(self, generator: torch.Generator | None = None) -> Backbone:
        raise NotImplementedError


class PeerNetwork(nn.Module):
    """A network of timm, asked as a `Backbone` is; of its blocks only the last gives features."""

    def __init__(self, model: Any, config: PeerConfig):
        super().__init__()
        self.model, self.config, self.space = model, config, config.space
        self.resized = dict[int, Any]()  # copies for images of other sizes, by the side of these

    def forward(self, crops: Sequence[Tensor], subnet: Subnet | None = None) -> list[Features]:
        return [_features(self._taking(images.shape[-1]), images) for images in crops]

    def last_blocks(self, images: Tensor, subnet: Subnet, count: int) -> list[Features]:
        """Raises InputError: pooled features have another width than patches."""
        (features,) = self([images])
        if (pooled := features.cls.shape[1]) != (width := features.patches.shape[2]):
            raise InputError(f"--linear: expected pooled features as wide as patches, {width}, got {pooled}")
        return [features]

    def _taking(self, side: int) -> Any:
        """The network for images of another size; some take any."""
        if side == self.config.image_size or not hasattr(self.model, "set_input_size"):
            return self.model
        if side not in self.resized:
            self.resized[side] = copy.deepcopy(self.model)
            self.resized[side].set_input_size(img_size=side)
        return self.resized[side]

    def to_static(self, subnet: Subnet) -> Backbone:
        raise InputError("detection.frozen: expected true with a model of timm, got false")

    def stage_maps(self, images: Tensor, subnet: Subnet, window: int = 0) -> list[Tensor]:
        """As `Backbone.stage_maps`; of each stride the last map, none of less than 4 pixels."""
        model = self._taking(images.shape[-1])
        last = {about["reduction"]: index for index, about in enumerate(model.feature_info)}
        maps = model.forward_intermediates(
            images,
            indices=[index for stride, index in last.items() if stride >= FINEST],
            norm=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return [x.permute(0, 2, 3, 1) for x in maps]


def _features(model: Any, images: Tensor) -> Features:
    """Those of a network of timm."""
    tokens = model.forward_features(images)
    cls = model.forward_head(tokens, pre_logits=True)
    if tokens.dim() == 4:
        first = tokens.shape[1] == model.num_features  # channels; `cls` may be wider, of a head's layer
        tokens = (tokens if first else tokens.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
    return Features(cls, tokens[:, getattr(model, "num_prefix_tokens", 0) :], tokens)


@dataclass(frozen=True)
class Peer:
    """A model to be scored, and its pre-processing."""

    backbone: Backbone | PeerNetwork
    pixels: Preprocessing
    classifier: ExportedModel | None


def open_peer(name: str) -> Peer:
    """An extracted model by its folder, or one of timm by `timm:NAME`, with its pre-trained weights. Raises
    InputError: there is none, or no timm."""
    if not name.startswith(TIMM):
        model = load(name)
        classifier = model if model.head is not None else None
        return Peer(read_source(name).backbone.eval(), model.preprocess, classifier)
    timm = optional_package("timm", "timm")
    with as_input(f"{name}: expected a model of timm whose weights can be read"):
        network = timm.create_model(name.removeprefix(TIMM), pretrained=True, num_classes=0)
    network.eval().requires_grad_(False)  # FLOPs of attention pooling are not counted otherwise
    data = timm.data.resolve_model_data_config(network)
    (channels, _, size), share = data["input_size"], data["crop_pct"]
    resize = round(size / share)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = _features(network, torch.zeros(1, channels, size, size))
    config = PeerConfig(
        image_size=size,
        channels=channels,
        width=features.cls.shape[1],
        depth=max(len(getattr(network, "blocks", ())), 1),
        count=sum(p.numel() for p in network.parameters()),
        cost=counter.get_total_flops(),
        patches=round(features.patches.shape[1] ** 0.5),
    )
    pixels = Preprocessing(size, resize, resize, tuple(data["mean"]), tuple(data["std"]))
    return Peer(PeerNetwork(network, config), pixels, None)


def evaluate_models(
    names: Sequence[str],
    data: str,
    protocols: Sequence[Protocol],
    *,
    device: str = "auto",
    out: Path,
    plot: Path | None = None,
    folders: Folders | None = None,
    baselines: bool = False,
) -> list[Report]:
    """Score models of `open_peer` on images with labels, as `Run.evaluate` scores subnets, and write JSON.

    That of several is a list `models` of those of each; what a file has of others, or by other protocols,
    stays. Raises InputError: wrong model, data or file.
    """
    several = len(names) > 1
    with init_distributed(device) as world:
        world.from_main(partial(require_outputs, out, plot, "models" if several else "settings"))
        for name in names[1:]:  # a wrong one is found before the others are scored
            open_peer(name)
        reports: list[Report] = []
        for number, name in enumerate(names):
            for report in _reports(name, data, protocols, world, folders, baselines):
                reports[number:] = [report]
                if world.is_main and several:
                    write_models(reports, out)
                elif world.is_main:
                    report.write(out)
        if world.is_main and plot:
            plot_reports(reports, plot)
        return reports


def _reports(
    name: str,
    data: str,
    protocols: Sequence[Protocol],
    world: World,
    folders: Folders | None,
    baselines: bool,
) -> Iterator[Report]:
    """Scores of a model, more and more of them."""
    peer = open_peer(name)
    pixels, fixed = peer.pixels, cast(Any, peer.backbone.to(world.device))
    crops = CropsConfig(
        global_size=pixels.size,
        local_count=0,
        eval_share=pixels.size / pixels.resize,
        mean=pixels.mean,
        std=pixels.std,
        blur=(0.0, 0.0, 0.0),
    )
    base = Config()
    method = replace(base.method, backbone=fixed.config, crops=crops, canvas=pixels.canvas)
    config = with_data(replace(base, method=method), data)
    images = open_on_ranks(config, world)
    if peer.classifier is not None:
        model = peer.classifier.to(world.device)
        require_classes(model.classes, images, data)
        protocols = [replace(TOP1, features=lambda _, __: model.classify), *protocols]
    place = name if name.startswith(TIMM) else os.path.abspath(name)
    origin = Origin(place, BRANCH, 0, VERSION)
    subnets = list(fixed.space)
    return evaluate_subnets(
        fixed,
        subnets,
        images,
        config,
        world,
        origin,
        protocols=protocols,
        folders=folders,
        baselines=baselines,
    )
