"""Elastic backbones: one definition each, behind one interface."""

from poa.backbones.base import Backbone, BackboneConfig, Features
from poa.backbones.resnet import ElasticResNet, ResNetConfig
from poa.backbones.swin import ElasticSwin, SwinConfig
from poa.backbones.vit import ElasticViT, ViTConfig

CONFIGS = (ViTConfig, SwinConfig, ResNetConfig)

__all__ = [
    "CONFIGS",
    "Backbone",
    "BackboneConfig",
    "ElasticResNet",
    "ElasticSwin",
    "ElasticViT",
    "Features",
    "ResNetConfig",
    "SwinConfig",
    "ViTConfig",
]
