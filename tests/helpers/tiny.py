"""A run small enough for tests: digits, a few subnets, a few steps."""

from __future__ import annotations

from poa.config import Config
from poa.options import override
from poa.presets import preset

VIT = [
    "method.backbone.min_width=16",
    "method.backbone.max_width=32",
    "method.backbone.min_depth=1",
    "method.backbone.max_depth=2",
    "method.backbone.drop_path=0.2",
]
MODERN = [  # as of DINOv3
    "method.backbone.mlp=swiglu",
    "method.backbone.positions=rotary",
    "method.backbone.qkv_bias=false",
    "method.backbone.norm_eps=1e-5",
]
SHORT = [
    "method.batch_size=8",
    "method.head.prototypes=8,12",
    "method.head.hidden=16",
    "method.head.bottleneck=8",
    "method.optim.epoch_steps=2",
    "method.optim.epochs=3",
    "method.optim.warmup_epochs=1",
    "method.optim.freeze_last_layer_epochs=0.5",
    "method.optim.ibot_start_epoch=1",
    "run.log_every=1",
    "run.save_every=3",
    "run.evaluate_every=0",
    "run.device=cpu",
]
OVERRIDES = [*VIT, *SHORT]
ONE_STEP = [  # of which the prototypes are frozen in the first
    "method.optim.epochs=0.5",
    "method.optim.warmup_epochs=0",
    "method.optim.freeze_last_layer_epochs=0.49",
    "method.optim.ibot_start_epoch=0.49",
]


def tiny_config(*overrides: str) -> Config:
    """A ViT of four subnets for six steps; further overrides win."""
    return override(preset("quickstart"), [*OVERRIDES, *overrides])


def tiny_modern(*overrides: str) -> Config:
    """A ViT of another design; further overrides win."""
    return tiny_config(*MODERN, *overrides)


def tiny_pyramid(kind: str, *overrides: str) -> Config:
    """The same with the Swin or ResNet of its quickstart; further overrides win."""
    return override(preset(f"quickstart-{kind}"), [*SHORT, *overrides])
