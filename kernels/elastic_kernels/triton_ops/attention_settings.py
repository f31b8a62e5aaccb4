"""Launch settings of packed attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from elastic_kernels.triton_ops.device import SMALL_PARTS
from elastic_kernels.tuning import Tunable, power_of_2

LONGEST_OF_ONE_PROGRAM = 1024  # tokens in the backward, of which a longer sequence takes several


@dataclass(frozen=True)
class AttentionConfig:
    """Launch settings of a length class.

    Attributes:
        block_m, block_n: rows of a tile of queries, of keys.
        warps, stages: of the launch.
        resident: all keys fit into one tile, so the kernel without online softmax runs, or in the backward,
            with tiles that are square, that without loops.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int = 1
    resident: bool = False


# The largest tiles that compile without spilling on 4 warps: more would compute the rows of a tile twice, and
# leave room for one block only. Not timed on a GPU yet. Parts with 99 KB of shared memory a block
# (`device.SMALL_PARTS`) also spill earlier, and get smaller ones.
_RESIDENT = (  # (longest length, settings), half precision and head_dim up to 64
    (64, AttentionConfig(64, 64, warps=4, resident=True)),
    (128, AttentionConfig(64, 128, warps=4, resident=True)),
    (256, AttentionConfig(64, 256, warps=4, resident=True)),
)
_STREAMING = AttentionConfig(64, 64, warps=4, stages=2)
_STREAMING_AHEAD = AttentionConfig(64, 64, warps=4, stages=3)  # on sm_90 four blocks a processor, not two
_FWD_FP32 = AttentionConfig(32, 32, warps=8)  # exact products run on the plain units, from registers
_BWD_RESIDENT = AttentionConfig(64, 64, warps=4, resident=True)
_BWD = AttentionConfig(64, 64, warps=4)
_BWD_AHEAD = AttentionConfig(64, 64, warps=4, stages=3)  # two blocks a processor hide less than loads ahead
_BWD_AHEAD_ALONE = AttentionConfig(64, 64, warps=4, stages=2)  # without sums for a bias, where three spill
_BWD_WIDE = AttentionConfig(32, 64, warps=4)  # where 64x64 spills: wide heads, and all on sm_80
_BWD_SMALL_PART = AttentionConfig(32, 32, warps=4)
_BWD_FP32 = AttentionConfig(32, 32, warps=8)
_BWD_FP32_WIDE = AttentionConfig(16, 16, warps=8)


def fwd_config(length: int, head_dim: int, itemsize: int, part: tuple[int, int]) -> AttentionConfig:
    """Settings of the forward for sequences of a length; `part`: compute capability."""
    if itemsize == 4:
        return _FWD_FP32
    if head_dim <= 64:
        if part == (9, 0) and length > 128:
            return _STREAMING_AHEAD
        for longest, config in _RESIDENT[: 2 if part in SMALL_PARTS else None]:
            if length <= longest:
                return config
    return _STREAMING


def bwd_config(
    length: int, head_dim: int, itemsize: int, part: tuple[int, int], sums: bool = True
) -> AttentionConfig:
    """Settings of the backward, with sums for a bias or not; other arguments as in `fwd_config`."""
    if itemsize == 4:
        return _BWD_FP32_WIDE if head_dim > 64 else _BWD_FP32
    if head_dim <= 64 and length <= _BWD_RESIDENT.block_n:
        return _BWD_RESIDENT
    if part in SMALL_PARTS:
        return _BWD_SMALL_PART
    if head_dim > 64 or part < (9, 0):
        return _BWD_WIDE
    if part != (9, 0) or length > LONGEST_OF_ONE_PROGRAM:
        return _BWD
    return _BWD_AHEAD if sums else _BWD_AHEAD_ALONE


def _fwd_candidates(length: int, head_dim: int) -> list[AttentionConfig]:
    """Streaming ones take any length, resident ones what fits into a tile."""
    streaming = (
        _STREAMING,
        _STREAMING_AHEAD,
        AttentionConfig(64, 128, warps=4, stages=2),
        AttentionConfig(128, 64, warps=4, stages=2),
        AttentionConfig(128, 64, warps=8, stages=2),
        AttentionConfig(128, 128, warps=8, stages=2),
    )
    resident = (
        AttentionConfig(64, keys, warps, resident=True)
        for keys in (64, 128, 256)
        for warps in (4, 8)
        if length <= keys
    )
    return [*streaming, *resident]


def _bwd_candidates(length: int, head_dim: int) -> list[AttentionConfig]:
    """With loops any length, without what fits into a tile."""
    return [*_BWD_CANDIDATES, *([_BWD_RESIDENT] if length <= _BWD_RESIDENT.block_n else [])]


_BWD_CANDIDATES = (
    _BWD,
    _BWD_AHEAD,
    _BWD_AHEAD_ALONE,
    _BWD_WIDE,
    _BWD_SMALL_PART,
    AttentionConfig(64, 64, warps=8),
    AttentionConfig(64, 32, warps=4),
    AttentionConfig(128, 64, warps=8),
)
FWD_TUNABLE = Tunable("attention_fwd", _fwd_candidates)
BWD_TUNABLE = Tunable("attention_bwd", _bwd_candidates)


def config_of(tunable: Tunable, fallback: AttentionConfig, qkv: Tensor, length: int) -> AttentionConfig:
    """Settings for sequences of a length; exact products keep the fallback."""
    if qkv.dtype.itemsize == 4:
        return fallback
    return tunable.choose(qkv, (power_of_2(length), qkv.shape[3]), fallback)
