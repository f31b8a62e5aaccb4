"""The configuration of a run that starts from pretrained weights: its backbone follows them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from poa.backbones import BackboneOptions
from poa.checkpoint import RunFolder
from poa.config import Config, InitConfig, MethodConfig
from poa.data.crops import CropsConfig
from poa.initialization.source import Source, is_run, read_source
from poa.options import override
from poa.presets import preset as preset_of

HINTS = ("kind", "head_dim", "norm_groups")  # options that a file of weights needs to be understood
UNITS = {"head_dim": ("min_width", "max_width"), "norm_groups": ("min_width", "max_width", "base_width")}
PIXELS = ("global_size", "local_size", "mean", "std")  # of crops, which the weights of a run are used to
KEPT = ("drop_path", "drop_path_uniform", "sampling_scale", "mask_scale")  # options that no weights decide


def initial_config(
    preset: str | Config | None, weights: str | None, overrides: Sequence[str] | Mapping[str, Any]
) -> Config:
    """The options of a new run.

    Args:
        preset: name of a preset, or a configuration. None: that of the run that `weights` names; `elastic`
            with other weights; `quickstart` without.
        weights: as `method.init.weights`; their backbone takes the place of that of the preset. Subnets of a
            backbone of one size go down to half of its width and depth.
        overrides: options that win over all this.

    Raises:
        InputError: unknown options, or weights that cannot be used.
    """
    if weights and preset is None and is_run(weights):
        config = RunFolder(Path(weights)).config()
    elif isinstance(preset, Config):
        config = preset
    else:
        config = preset_of(preset or ("elastic" if weights else "quickstart"))
    if not weights:
        return override(config, overrides)
    init = InitConfig(weights)
    if is_run(weights):
        theirs = RunFolder(Path(weights)).config().method
        backbone, pixels = theirs.backbone, {name: getattr(theirs.crops, name) for name in PIXELS}
        crops = dataclasses.replace(config.method.crops, **pixels)
    else:
        source = read_source(weights, override(config, _hints(overrides)).method.backbone)
        backbone, crops = _following(source, config.method)
        if backbone.sortable and not source.elastic:
            init = InitConfig(weights, "taylor")
    method = dataclasses.replace(config.method, init=init, backbone=backbone, crops=crops)
    return override(dataclasses.replace(config, method=method), overrides)


def in_order_of(config: Config, run: Config) -> Config:
    """The configuration with the blocks in the order that a run found when it began."""
    backbone, theirs = config.method.backbone, run.method.backbone
    if config.method.init.importance == "none" or backbone.kind != theirs.kind:
        return config
    backbone = backbone.changed(block_order=getattr(theirs, "block_order", ()))
    return dataclasses.replace(config, method=dataclasses.replace(config.method, backbone=backbone))


def _hints(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Those of the overrides that a file of weights needs, with widths that fit them."""
    given = [f"{k}={v}" for k, v in overrides.items()] if isinstance(overrides, Mapping) else overrides
    pairs = (assignment.partition("=") for assignment in given)
    hints = {name: value for key, _, value in pairs if (name := key.rpartition(".")[2]) in HINTS}
    for unit, widths in UNITS.items():
        if unit in hints:
            hints |= dict.fromkeys(widths, hints[unit])
    return [f"method.backbone.{name}={value}" for name, value in hints.items()]


def _following(source: Source, method: MethodConfig) -> tuple[BackboneOptions, CropsConfig]:
    """The backbone of the source, with subnets down to half of it, on crops of the sizes that it can take."""
    shape, crops = cast(BackboneOptions, source.backbone.config), method.crops
    sizes = {
        name: max(1, round(getattr(crops, name) / shape.stride)) * shape.stride
        for name in ("global_size", "local_size")
    }
    if source.normalisation:
        sizes |= dict(zip(("mean", "std"), source.normalisation, strict=True))
    shared = [key for key in KEPT if hasattr(method.backbone, key) and hasattr(shape, key)]
    kept = {key: getattr(method.backbone, key) for key in shared}
    crops = dataclasses.replace(crops, **sizes)
    shape = shape.halved().changed(image_size=crops.global_size, masked=True, **kept)
    return shape, crops
