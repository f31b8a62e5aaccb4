"""Elastic backbones: one definition each."""

from poa.backbones.vit import ElasticViT, Features, ViTConfig

__all__ = ["ElasticViT", "Features", "ViTConfig"]
