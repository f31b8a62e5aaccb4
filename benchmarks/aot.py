"""Compile a Triton kernel for an absent GPU architecture, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TENSOR_CORE = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync"}
WARP = 32


@dataclass(frozen=True)
class Part:
    """What a kind of GPU offers, by compute capability.

    Source: CUDA C++ programming guide, table of technical specifications per compute capability.
    """

    shared_of_block: int  # KiB
    shared_of_processor: int  # KiB
    threads: int  # of a multiprocessor
    registers: int = 65536
    blocks: int = 32


PARTS = {
    80: Part(163, 164, 2048),
    89: Part(99, 100, 1536, blocks=24),
    90: Part(227, 228, 2048),
    100: Part(227, 228, 2048),
    120: Part(99, 100, 1536, blocks=24),
}


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel."""

    architecture: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    ttir: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.ptx))

    @property
    def instructions(self) -> int:
        """Instructions of the PTX."""
        return self.count(r"(?m)^\s+(?:@!?%p\d+ )?[a-z][a-z0-9_.:]+ .*;$")

    @property
    def tensor_core(self) -> dict[str, int]:
        """Matrix instructions by kind."""
        counts = {name: self.count(pattern) for name, pattern in TENSOR_CORE.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def wide_loads(self) -> int:
        """Loads from global memory of 16 bytes a thread, also those straight to shared memory."""
        return self.count(r"ld\.global\S*\.v4\.b32") + self.count(r"cp\.async\S*global.*0x10")

    @property
    def wide_stores(self) -> int:
        """Stores to global memory of 16 bytes a thread."""
        return self.count(r"st\.global\S*\.v4\.b32")

    @property
    def blocks_per_processor(self) -> int:
        """Blocks that fit on a multiprocessor at once."""
        part = PARTS[self.architecture]
        by_registers = part.registers // (-(-self.registers * WARP // 256) * 256 * self.warps)
        by_shared = part.shared_of_processor * 1024 // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, part.threads // (WARP * self.warps), part.blocks)


def compile_kernel(
    kernel: Any,
    architecture: int,
    *,
    pointer_dtype: str,
    pointers: Mapping[str, str],
    floats: Sequence[str],
    constants: Mapping[str, Any],
    odd: Sequence[str],
    warps: int,
    stages: int,
) -> Compiled:
    """Compile for an architecture; other arguments are 32-bit integers, pointers are aligned to 16 bytes.

    Args:
        kernel: a `triton.jit` function whose pointer arguments end in `_ptr`.
        architecture: such as 90.
        pointer_dtype: element type of the pointers, but for those in `pointers`.
        floats: names of fp32 arguments.
        constants: constexpr arguments, and absent tensors with the value None.
        odd: integers that need not be multiples of 16.
        warps, stages: launch settings.
    """
    names = kernel.arg_names
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = "*" + pointers.get(name, pointer_dtype)
        else:
            signature[name] = "fp32" if name in floats else "i32"
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and name not in odd
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    result = triton.compile(source, target=GPUTarget("cuda", architecture, WARP), options=options)
    registers, stack, local = _resources(result.asm["cubin"])
    asm = result.asm
    spilled = stack + local
    return Compiled(
        architecture, warps, registers, spilled, result.metadata.shared, asm["ptx"], str(asm["ttir"])
    )


def _resources(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", printed)
    if found is None:
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, got {printed!r}")
    registers, stack, local = found.groups()
    return int(registers), int(stack), int(local)
