"""Starting from pretrained weights: reading them, the options that follow, sorting by importance."""

from poa.initialization.configuration import in_order_of, initial_config
from poa.initialization.source import Source, is_run, read_source

__all__ = ["Source", "in_order_of", "initial_config", "is_run", "read_source"]
