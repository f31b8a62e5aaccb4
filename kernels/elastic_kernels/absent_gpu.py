"""An absent GPU: what operators would launch on it, recorded with meta tensors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from elastic_kernels.dispatch import HAS_TRITON, INTERPRETED, Gpu

if TYPE_CHECKING:
    from elastic_kernels.triton_ops.recorded import Launches

GPUS = {  # a well-known one of each architecture
    "sm_80": Gpu((8, 0), 108),  # A100
    "sm_86": Gpu((8, 6), 82),  # RTX 3090
    "sm_89": Gpu((8, 9), 142),  # L40S
    "sm_90": Gpu((9, 0), 132),  # H100 and H200
    "sm_100": Gpu((10, 0), 148),  # B200
    "sm_120": Gpu((12, 0), 170),  # RTX 5090
}


def absent_gpu(
    architecture: str = "sm_90", processors: int | None = None
) -> AbstractContextManager[Launches]:
    """Take meta tensors for those of a GPU, and record kernels in place of compiling and launching them.

    The host does all it would do there. Settings of kernels are those without a table of timed ones.

    Args:
        architecture: one of `GPUS`.
        processors: streaming multiprocessors, if other than there.

    Returns:
        A context, which gives the launches that are made and the binaries they need.

    Raises:
        ValueError: an architecture that is not known, or Triton does not compile here.

    Example:
        >>> import torch
        >>> from elastic_kernels import absent_gpu, elastic_layer_norm
        >>> with absent_gpu("sm_90") as launches:
        ...     y = elastic_layer_norm(torch.empty(8, 64, device="meta"), None, None, 1e-6)
        >>> [launch.binary.name for launch in launches.made]
        ['_layer_norm_fwd_kernel']
    """
    if architecture not in GPUS:
        raise ValueError(f"expected one of {', '.join(GPUS)}, got {architecture!r}")
    if not HAS_TRITON or INTERPRETED:
        raise ValueError("expected Triton that compiles, got none, or TRITON_INTERPRET=1")
    from elastic_kernels.triton_ops.recorded import recorded

    gpu = GPUS[architecture]
    return recorded(gpu._replace(processors=processors or gpu.processors))
