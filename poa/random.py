"""Random streams that depend on what is drawn, not on what was drawn before.

Every random choice of a run is a function of (seed, purpose, step, micro-batch), so a resumed run needs no
saved generator state and every rank can derive every other rank's choices.
"""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch


def stream_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for one purpose at one position, such as `("augment", step, micro_batch)`."""
    entropy = [seed, zlib.crc32(purpose.encode()), *position]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def torch_stream(seed: int, purpose: str, *position: int) -> torch.Generator:
    """A CPU `torch.Generator` for one purpose at one position."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, *position))


def python_stream(seed: int, purpose: str, *position: int) -> random.Random:
    """A `random.Random` for one purpose at one position."""
    return random.Random(stream_seed(seed, purpose, *position))
