"""Compile a Triton kernel for a part that is not there, and read what came out."""

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
TENSOR_CORE = ("wgmma", "tcgen05.mma", "mma.sync")


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str

    def tensor_core_instructions(self) -> list[str]:
        return [name for name in TENSOR_CORE if name in self.ptx]

    def wide_global_loads(self) -> int:
        """Loads of 16 bytes a thread."""
        return len(re.findall(r"ld\.global\S*\.v4\.b32", self.ptx))

    def wide_global_stores(self) -> int:
        """Stores of 16 bytes a thread."""
        return len(re.findall(r"st\.global\S*\.v4\.b32", self.ptx))

    def summary(self) -> str:
        return (
            f"{self.registers} registers, {self.spilled_bytes} B spilled, {self.shared_bytes} B shared, "
            f"{' '.join(self.tensor_core_instructions()) or 'no tensor cores'}"
        )


def compile_kernel(
    kernel: Any,
    arch: int,
    *,
    pointer_dtype: str,
    pointers: Mapping[str, str],
    floats: Sequence[str],
    constants: Mapping[str, Any],
    multiples_of_16: Sequence[str],
    warps: int,
    stages: int,
) -> Compiled:
    """Compile for an architecture; other arguments are 32-bit integers, pointers are aligned to 16 bytes.

    Args:
        kernel: a `triton.jit` function whose pointer arguments end in `_ptr`.
        arch: such as 90.
        pointer_dtype: element type of the pointers, but for those in `pointers`.
        floats: names of fp32 arguments.
        constants: constexpr arguments.
        multiples_of_16: integers that are.
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
        if name.endswith("_ptr") or name in multiples_of_16
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=values, attrs=aligned)
    options = {"num_warps": warps, "num_stages": stages}
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, local = _resources(result.asm["cubin"])
    return Compiled(registers, stack + local, result.metadata.shared, result.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", printed).groups()
    return int(registers), int(stack), int(local)
