"""Elastic backbones: one definition each, behind one interface."""

from typing import get_args

from poa.backbones.base import Backbone, BackboneConfig, Features
from poa.backbones.resnet import ElasticResNet, ResNetConfig
from poa.backbones.swin import ElasticSwin, SwinConfig
from poa.backbones.vit import ElasticViT, ViTConfig

# The one registry of kinds: configurations, files, presets and the command line read it.
BackboneOptions = ViTConfig | SwinConfig | ResNetConfig
CONFIGS: tuple[type[BackboneOptions], ...] = get_args(BackboneOptions)

__all__ = [
    "CONFIGS",
    "Backbone",
    "BackboneConfig",
    "BackboneOptions",
    "ElasticResNet",
    "ElasticSwin",
    "ElasticViT",
    "Features",
    "ResNetConfig",
    "SwinConfig",
    "ViTConfig",
]
