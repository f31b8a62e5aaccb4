"""Starting from pretrained weights: reading them, the options that follow, sorting by importance."""

from poa.initialization.configuration import in_order_of, initial_config
from poa.initialization.source import Source, is_run, read_source
from poa.initialization.teacher import FrozenTeacher, frozen_teacher

__all__ = [
    "FrozenTeacher", "Source", "frozen_teacher", "in_order_of", "initial_config", "is_run", "read_source",
]  # fmt: skip
