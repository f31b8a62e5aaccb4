"""Subnets out: ordinary networks in folders that timm reads, too, and the loader that reads them."""

from poa.export.folder import extract, load
from poa.export.formats import export_file
from poa.export.model import ExportedModel, static_model

__all__ = ["ExportedModel", "export_file", "extract", "load", "static_model"]
