"""Persistent programs of linear layers under Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from helpers.kernels.linear_cases import Case, assert_accurate, with_persistent_programs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_persistent_programs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes several tiles; rows that descriptors do not take are left to the other kernel."""
    tile = {"block_m": 16, "block_n": 64, "block_k": 16, "warps": 4, "stages": 1}
    grids = with_persistent_programs(monkeypatch, **tile, persistent=1)
    for form in ("residual-gamma", "mlp-half", "attention-half"):
        assert_accurate(Case(70, 144, 144, kept=33), form, dtype)
    assert (4,) in grids
    grids.clear()
    assert_accurate(Case(17, 150, 150, spare=3), "residual-gamma", dtype)
    assert not grids
