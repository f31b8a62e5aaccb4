"""Launches that do not ask Triton are those that Triton would make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from elastic_kernels import ElasticBlock, absent_gpu, dispatch, planning

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
jit = pytest.importorskip("triton.runtime.jit")
if dispatch.INTERPRETED:
    pytest.skip("the interpreter has no launches to find", allow_module_level=True)

from elastic_kernels.triton_ops import launching  # noqa: E402


@launching.launched("rows")
def _toy_kernel(
    x_ptr, y_ptr, rows, columns, scale, WIDE: tl.constexpr, BLOCK: tl.constexpr = 16
):  # fmt: skip
    pass


def bf16(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta", dtype=torch.bfloat16)


def launch(*arguments: Any, grid: tuple[int, ...] = (3,), **constants: Any) -> Any:
    return _toy_kernel[grid](*arguments, **{"WIDE": True} | constants)


def by_triton(function: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call a function whose launches somebody watches."""
    run = jit.JITFunction.run
    with monkeypatch.context() as patch:
        patch.setattr(jit.JITFunction, "run", lambda *args, **options: run(*args, **options))
        function()


def test_launches_of_a_block_are_those_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        block, x = ElasticBlock(128, 512, 32, layer_scale=1e-5), torch.empty(30, 64, requires_grad=True)

    def step() -> None:
        with planning(torch.bfloat16):
            block(x, [(2, 5), (4, 5)]).sum().backward()

    with absent_gpu("sm_90") as launches:
        launches.keep_arguments = True
        step()
        first = launches.made.copy()
        launches.made.clear()
        step()
        direct = launches.made.copy()
        launches.made.clear()
        by_triton(step, monkeypatch)
    assert len(direct) == len(launches.made) == len(first) > 10
    for mine, theirs in zip(direct, launches.made, strict=True):
        assert mine.binary is theirs.binary and mine.grid == theirs.grid
        pairs = zip(mine.arguments.items(), theirs.arguments.items(), strict=True)
        for (name, value), (same_name, same) in pairs:
            assert name == same_name and type(value) is type(same)
            assert value.shape == same.shape if isinstance(value, Tensor) else value == same, name


def test_whatever_binaries_differ_by_is_asked_anew() -> None:
    x, y = bf16(64), bf16(64)
    with absent_gpu("sm_90") as launches:
        for _ in range(2):
            binaries = [
                launch(x, y, 5, 32, 0.5),
                launch(x[1:], y, 5, 32, 0.5),  # whose address is not aligned
                launch(x.float(), y, 5, 32, 0.5),
                launch(x, None, 5, 32, 0.5),
                launch(x, y, 5, 33, 0.5),  # which 16 does not divide
                launch(x, y, 5, 1, 0.5),
                launch(x, y, 2**31, 32, 0.5),  # which takes 64 bits
                launch(x, y, 5, 32, 0.5, WIDE=False),
                launch(x, y, 5, 32, 0.5, BLOCK=32),
                launch(x, y, 5, 32, 0.5, num_warps=8),
            ]
            assert len({id(binary) for binary in binaries}) == len(binaries)
        assert len(launches.binaries) == len(binaries)
        assert launch(x, y, 7, 32, 0.5) is binaries[0]  # rows are not specialised
        assert launch(x, y, 2**31 + 1, 32, 0.5) is binaries[6]


def test_grids_have_three_sides() -> None:
    with absent_gpu("sm_90") as launches:
        for grid in ((3,), (3, 4), (3, 4, 5)) * 2:
            launch(bf16(8), None, 5, 32, 0.5, grid=grid)
    assert [made.grid for made in launches.made] == [(3, 1, 1), (3, 4, 1), (3, 4, 5)] * 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_triton_see_every_launch(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(metadata: Any) -> None:
        raise AssertionError("nothing runs here")

    with absent_gpu("sm_90") as launches:
        launches.keep_arguments = True
        for hooks in (set(), {see}):
            for _ in range(2):
                launch(bf16(8), None, 5, 32, 0.5)
                assert {x for x in launches.made[-1].rest if x is see} == hooks
            monkeypatch.setattr(triton.knobs.runtime, hook, see)


def test_launches_that_never_come_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "MOST_KNOWN", 8)
    with absent_gpu("sm_90"):
        for number in range(100):
            launch(bf16(8), None, 5, 32, number / 7)
            assert 0 < len(_toy_kernel.known) <= 8
    assert not _toy_kernel.known  # no absent GPU remains in kernels
