"""timm's networks of the size of a subnet."""

from __future__ import annotations

from typing import Any

from torch import nn

from benchmarks.failures import Unavailable
from poa.backbones import Backbone, SwinConfig


def build(static: Backbone) -> tuple[nn.Module, bool]:
    """timm's network of one size, in evaluation mode, and whether it computes the same function.

    timm has no Swin that normalises its embedding over more channels than its blocks have, so that one gets
    weights of its own. Raises Unavailable: timm cannot be imported, or has no such network.
    """
    try:
        import timm
    except Exception as error:  # beside a torchvision that does not fit it fails in many ways
        raise Unavailable(f"timm does not import: {type(error).__name__}") from None
    config = static.config
    if isinstance(config, SwinConfig):
        return _swin(timm, config).eval(), False
    described = config.timm_model()
    if described is None:
        raise Unavailable("timm has ResNets of four stages and a stem of 64 channels alone")
    model = timm.create_model(described.architecture, num_classes=0, **described.arguments).eval()
    model.load_state_dict(static.exported_state(), strict=True)
    return model, True


def _swin(timm: Any, config: SwinConfig) -> nn.Module:
    heads = tuple(config.max_width // config.head_dim * 2**stage for stage in range(len(config.max_depths)))
    return timm.models.swin_transformer.SwinTransformer(
        img_size=config.image_size, patch_size=config.patch_size, embed_dim=config.max_width,
        depths=config.max_depths, num_heads=heads, window_size=config.window, mlp_ratio=config.mlp_ratio,
        num_classes=0, drop_path_rate=0.0,
    )  # fmt: skip
