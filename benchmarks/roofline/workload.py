"""The step to be costed."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.roofline.costs import SINGLE
from poa.config import MethodConfig
from poa.micro_batch import crop_masks
from poa.network import VIEWS
from poa.random import python_stream


@dataclass(frozen=True)
class Workload:
    """A step.

    Attributes:
        method: network, heads, crops.
        images: of a micro-batch.
        masked: patches under masks in its global crops.
        skip_dead_tokens: the last block of a ViT leaves out what only unread tokens need.
        stream_bytes: of an element of a transformer's residual stream.
    """

    method: MethodConfig
    images: int
    masked: int
    skip_dead_tokens: bool = True
    stream_bytes: int = SINGLE

    @classmethod
    def of(cls, method: MethodConfig, images: int) -> Workload:
        """With the number of masked patches that the first step of a run draws."""
        masks = crop_masks(method, images, python_stream(method.seed, "masks", 0, 0))
        return cls(method, images, len(masks.indices))

    def crops(self, student: bool) -> tuple[tuple[int, int], ...]:
        """`(count, side in pixels)` of each group of crops that a branch sees."""
        crops = self.method.crops
        views = [(VIEWS, crops.global_size)]
        if student and crops.local_count:
            views.append((crops.local_count, crops.local_size))
        return tuple((count * self.images, size) for count, size in views)

    def read_rows(self, student: bool) -> int:
        """Features that are read: one of each crop, and the masked patches."""
        return sum(count for count, _ in self.crops(student)) + self.masked
