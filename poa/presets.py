"""The presets: whole configurations by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from poa.backbones import BackboneOptions, ResNetConfig, SwinConfig, ViTConfig
from poa.config import Config, InitConfig, MaskConfig, MethodConfig, PerformanceConfig, RunConfig
from poa.data.crops import CropsConfig
from poa.errors import InputError
from poa.heads import HeadConfig
from poa.losses import LossConfig
from poa.optim import OptimConfig


def _short_run(temperature: float, **options: float) -> OptimConfig:
    """A run of minutes: a constant teacher temperature, and no scaling rules made for large ones."""
    return dataclasses.replace(
        OptimConfig(
            lr_scaling="none",
            min_lr=1e-5,
            weight_decay_end=0.1,
            layer_decay=1.0,
            patch_embed_lr=1.0,
            stretch=1.0,
            momentum=0.98,
            teacher_temperature=temperature,
            teacher_temperature_start=temperature,
            teacher_temperature_epochs=0.0,
        ),
        **options,  # type: ignore[arg-type]
    )


def _on_digits(backbone: BackboneOptions, epochs: float) -> Config:
    """A run on digits on a CPU in minutes: gentle crops, a sharp teacher."""
    size = backbone.image_size
    return Config(
        method=MethodConfig(
            batch_size=64,
            precision="fp32",
            canvas=32,
            backbone=backbone,
            head=HeadConfig(prototypes=(32, 48, 64, 96), hidden=128, bottleneck=32),
            crops=CropsConfig(
                global_size=size,
                local_size=16,
                local_count=2,
                global_scale=(0.6, 1.0),
                local_scale=(0.4, 0.8),
                aspect=(0.85, 1.15),
                flip=0.0,
                rotation=8.0,
                jitter=0.5,
                brightness=0.4,
                contrast=0.3,
                saturation=0.0,
                hue=0.0,
                grayscale=0.0,
                blur=(0.0, 0.0, 0.0),
                solarize=(0.0, 0.0, 0.0),
                eval_share=1.0,
                mean=(0.3053,) * 3,
                std=(0.3760,) * 3,
            ),
            optim=_short_run(
                epochs=epochs,
                base_lr=3e-3,
                warmup_epochs=0.1 * epochs,
                freeze_last_layer_epochs=0.02 * epochs,
                momentum_end=0.99,
                temperature=0.03,
                ibot_start_epoch=0.2 * epochs,
            ),
        ),
        performance=PerformanceConfig(workers=0),
        run=RunConfig(evaluate_every=315, save_every=630),
    )


def _quickstart() -> Config:
    """9 ViTs of few, large patches."""
    backbone = ViTConfig(
        image_size=24,
        patch_size=8,
        min_width=32,
        max_width=64,
        min_depth=2,
        max_depth=4,
        head_dim=16,
        layer_scale=1.0,
        drop_path=0.0,
    )
    return _on_digits(backbone, epochs=75.0)


def _quickstart_swin() -> Config:
    """6 Swin transformers of three stages."""
    backbone = SwinConfig(
        image_size=32,
        patch_size=4,
        min_width=16,
        max_width=32,
        head_dim=16,
        window=4,
        min_depths=(1, 1, 1),
        max_depths=(1, 1, 3),
        drop_path=0.0,
    )
    return _on_digits(backbone, epochs=40.0)


def _quickstart_resnet() -> Config:
    """12 ResNets of three stages."""
    backbone = ResNetConfig(
        image_size=32,
        base_width=16,
        min_width=16,
        max_width=32,
        norm_groups=8,
        min_depths=(1, 1, 1),
        max_depths=(1, 2, 2),
    )
    return _on_digits(backbone, epochs=40.0)


def _small_images() -> Config:
    """Images of about 32 pixels (CIFAR-10 and the like) on a CPU in a quarter of an hour."""
    return Config(
        method=MethodConfig(
            batch_size=128,
            precision="fp32",
            canvas=64,
            backbone=ViTConfig(
                image_size=32,
                patch_size=8,
                min_width=64,
                max_width=128,
                min_depth=2,
                max_depth=4,
                head_dim=32,
                layer_scale=1.0,
                drop_path=0.0,
            ),
            head=HeadConfig(prototypes=(64, 128, 256, 512), hidden=256, bottleneck=64),
            crops=CropsConfig(
                global_size=32,
                local_size=16,
                local_count=4,
                global_scale=(0.4, 1.0),
                local_scale=(0.1, 0.4),
                blur=(0.0, 0.0, 0.0),
                eval_share=1.0,
            ),
            optim=_short_run(
                epochs=10.0,
                base_lr=2e-3,
                warmup_epochs=0.6,
                freeze_last_layer_epochs=0.1,
                momentum_end=0.995,
                temperature=0.04,
                ibot_start_epoch=1.2,
            ),
        ),
        performance=PerformanceConfig(workers=1),
        run=RunConfig(evaluate_every=400, save_every=400),
    )


def _elastic() -> Config:
    """A network that has learned already: short, with small learning rates in its first layers."""
    optim = OptimConfig(
        epochs=10.0,
        base_lr=5e-4,
        min_lr=1e-6,
        warmup_epochs=1.0,
        freeze_last_layer_epochs=0.0,
        freeze_backbone_epochs=0.5,
        freeze_teacher_epochs=5.0,
        layer_decay=0.8,
        stretch=1.0,
        momentum=0.996,
        teacher_temperature_epochs=2.0,
        ibot_start_epoch=1.0,
    )
    backbone, loss = ViTConfig(drop_path=0.1), LossConfig(operands="fp16", features=1.0)
    method = MethodConfig(backbone=backbone, loss=loss, optim=optim)
    return Config(method=method, run=RunConfig(knn_drop=0.05))


def _elastic_vit(
    weights: str, width: int, depth: int, patch: int, layer_decay: float, **shape: Any
) -> Config:
    """The same from weights of timm, whose subnets go down to half of their width and depth."""
    method = _elastic().method
    backbone = ViTConfig(
        patch_size=patch,
        min_width=width // 128 * 64,
        max_width=width,
        min_depth=depth // 2,
        max_depth=depth,
        drop_path=0.1,
        **shape,
    )
    crops = dataclasses.replace(method.crops, local_size=round(method.crops.local_size / patch) * patch)
    optim = dataclasses.replace(method.optim, layer_decay=layer_decay)
    init = InitConfig(f"timm:{weights}", "taylor")
    method = dataclasses.replace(method, backbone=backbone, crops=crops, optim=optim, init=init)
    return dataclasses.replace(_elastic(), method=method)


def _elastic_small() -> Config:
    """The same for images of about 32 pixels on a CPU, as tried on CIFAR-10.

    Gentle crops, none of them local, and no masks: students follow the class tokens of the source, which is
    the teacher for most of the run.
    """
    method = _small_images().method
    crops = dataclasses.replace(
        method.crops,
        local_count=0,
        global_scale=(0.5, 1.0),
        jitter=0.4,
        grayscale=0.0,
        solarize=(0.0, 0.0, 0.0),
    )
    optim = dataclasses.replace(
        method.optim,
        epochs=5.0,
        base_lr=2e-3,
        freeze_last_layer_epochs=0.0,
        freeze_backbone_epochs=0.25,
        freeze_teacher_epochs=4.0,
        momentum=0.95,
        momentum_end=0.98,
    )
    loss = dataclasses.replace(method.loss, intact=0.5, ibot=0.0, features=10.0)
    run = RunConfig(evaluate_every=400, save_every=400, knn_drop=0.05)
    method = dataclasses.replace(method, crops=crops, optim=optim, loss=loss)
    return dataclasses.replace(_small_images(), method=method, run=run)


def _published(backbone: BackboneOptions, layer_decay: float, epochs: float, stretch: float) -> Config:
    """The published recipe for a network of several stages."""
    optim = OptimConfig(epochs=epochs, warmup_epochs=30.0, layer_decay=layer_decay, stretch=stretch)
    loss, masks = LossConfig(operands="fp16"), MaskConfig(ratio=(0.1, 0.3))
    return Config(method=MethodConfig(backbone=backbone, loss=loss, masks=masks, optim=optim))


def _vit(min_width: int, max_width: int, min_depth: int, max_depth: int) -> Config:
    """The published recipe for a ViT with patches of 16 pixels."""
    backbone = ViTConfig(min_width=min_width, max_width=max_width, min_depth=min_depth, max_depth=max_depth)
    return Config(method=MethodConfig(backbone=backbone, loss=LossConfig(operands="fp16")))


PRESETS: dict[str, tuple[Callable[[], Config], str]] = {
    "quickstart": (_quickstart, "digits on a CPU in minutes: widths 32..64, depths 2..4"),
    "quickstart-swin": (_quickstart_swin, "digits with a Swin: widths 16 and 32, last stage 1..3 blocks"),
    "quickstart-resnet": (_quickstart_resnet, "digits with a ResNet: middle widths 16..32, 3..5 blocks"),
    "small-images": (_small_images, "images of 32 pixels on a CPU: widths 64..128, depths 2..4"),
    "elastic": (_elastic, "with --init: any network of 224 pixels, which becomes elastic; needs a GPU"),
    "elastic-vit-s14": (
        lambda: _elastic_vit("vit_small_patch14_dinov2.lvd142m", 384, 12, 14, layer_decay=0.8),
        "DINOv2 ViT-S/14 made elastic: widths 192..384, depths 6..12; needs a GPU",
    ),
    "elastic-vit-b14": (
        lambda: _elastic_vit("vit_base_patch14_dinov2.lvd142m", 768, 12, 14, layer_decay=0.8),
        "DINOv2 ViT-B/14 made elastic: widths 384..768, depths 6..12; needs a GPU",
    ),
    "elastic-vit-l16": (  # the first of its 24 blocks learns as fast as that of 12 with 0.8
        lambda: _elastic_vit(
            "vit_large_patch16_dinov3.lvd1689m",
            1024,
            24,
            16,
            layer_decay=0.9,
            positions="rotary",
            registers=4,
            qkv_bias=False,
            norm_eps=1e-5,
        ),
        "DINOv3 ViT-L/16 made elastic: widths 512..1024, depths 12..24; needs a GPU",
    ),
    "elastic-small": (_elastic_small, "with --init: any network of 32 pixels, on a CPU"),
    "vit-s16": (lambda: _vit(192, 384, 6, 12), "up to ViT-S/16: widths 192..384, depths 6..12"),
    "vit-b16": (lambda: _vit(384, 768, 6, 12), "up to ViT-B/16: widths 384..768, depths 6..12"),
    "vit-l16": (lambda: _vit(384, 1024, 12, 24), "the paper's ViT-L/16: widths 384..1024, depths 12..24"),
    "swin-b": (
        lambda: _published(SwinConfig(), layer_decay=0.9, epochs=346.0, stretch=0.9),
        "the paper's Swin-B: widths 96..128, third stage 6..18 blocks",
    ),
    "resnet-152": (
        lambda: _published(ResNetConfig(), layer_decay=0.95, epochs=692.0, stretch=1.0),
        "the paper's ResNet-152: middle widths 64..128, second stage 4..8 blocks, third 6..36",
    ),
}

QUICKSTARTS = {
    make().method.backbone.kind: name for name, (make, _) in PRESETS.items() if name.startswith("quickstart")
}
"""The presets for digits by kind of backbone."""


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise InputError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name][0]()
