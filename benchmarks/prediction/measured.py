"""What was measured of a step on a GPU of the kind, from the committed rows."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from benchmarks import results


@dataclass(frozen=True)
class Measured:
    """The last rows of a step.

    Attributes:
        images_per_s: of the whole step; None without a row.
        kernels: milliseconds of the largest kernels, by name, all forms of a kernel together.
    """

    images_per_s: float | None
    kernels: dict[str, float]

    @classmethod
    def of(cls, gpu: str, shape: str, subnet: str) -> Measured:
        """Of steps with an elastic student."""
        wanted = (gpu, "ours", shape, subnet)
        rows = [
            row
            for row in results.load(results.committed())
            if tuple(row[key] for key in ("gpu", "provider", "shape", "mode")) == wanted
        ]
        speeds = [row["images_per_s"] for row in rows if row["op"] == "step"]
        profiles = [row["lines"] for row in rows if row["op"] == "profile"]
        kernels: Counter[str] = Counter()
        for line in profiles[-1] if profiles else ():
            if match := re.match(r" *([\d.]+) ms .* _(\w+)_kernel$", line):
                kernels[match[2]] += float(match[1])  # type: ignore[assignment]
        return cls(speeds[-1] if speeds else None, dict(kernels))
