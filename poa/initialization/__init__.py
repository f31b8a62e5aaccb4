"""Starting from pretrained weights: reading them, and the options that follow from them."""

from poa.initialization.configuration import initial_config
from poa.initialization.source import Source, is_run, read_source

__all__ = ["Source", "initial_config", "is_run", "read_source"]
