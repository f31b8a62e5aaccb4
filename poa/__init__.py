"""POA: pre-train once, get models of all sizes."""

from poa import official
from poa.backbones import ElasticResNet, ElasticSwin, ElasticViT, ResNetConfig, SwinConfig, ViTConfig
from poa.export import ExportedModel, load
from poa.subnets import SearchSpace, Subnet
from poa.version import VERSION

__version__ = VERSION
__all__ = [
    "ElasticResNet",
    "ElasticSwin",
    "ElasticViT",
    "ExportedModel",
    "ResNetConfig",
    "SearchSpace",
    "Subnet",
    "SwinConfig",
    "ViTConfig",
    "load",
    "official",
]
