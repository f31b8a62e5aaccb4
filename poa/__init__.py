"""POA: pre-train once, get models of all sizes."""

from poa import official
from poa.backbones import ElasticResNet, ElasticSwin, ElasticViT, ResNetConfig, SwinConfig, ViTConfig
from poa.data.preprocessing import Preprocessing
from poa.embedding import Embeddings, Nearest, embed
from poa.export import ExportedModel, load
from poa.run import Run, pretrain
from poa.subnets import SearchSpace, Subnet
from poa.version import VERSION

__version__ = VERSION
__all__ = [
    "ElasticResNet", "ElasticSwin", "ElasticViT", "Embeddings", "ExportedModel", "Nearest", "Preprocessing",
    "ResNetConfig", "Run", "SearchSpace", "Subnet", "SwinConfig", "ViTConfig", "embed", "load", "official",
    "pretrain",
]  # fmt: skip
