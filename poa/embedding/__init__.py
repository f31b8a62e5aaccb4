"""Features of many images: computed in order, written to a file, looked up by their nearest neighbours."""

from poa.embedding.embed import TOKENS, Embeddings, embed
from poa.embedding.nearest import Nearest

__all__ = ["TOKENS", "Embeddings", "Nearest", "embed"]
