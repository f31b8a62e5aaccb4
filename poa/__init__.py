"""POA: pre-train once, get models of all sizes."""

from poa.backbones import ElasticViT, ViTConfig
from poa.export import ExportedModel, load
from poa.subnets import SearchSpace, Subnet

__version__ = "0.1.0"
__all__ = ["ElasticViT", "ExportedModel", "SearchSpace", "Subnet", "ViTConfig", "load"]
