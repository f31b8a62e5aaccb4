"""What a compiled kernel needs of a GPU, and what its code does, read from its assembly."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton

from elastic_kernels.triton_ops.recorded import WARP, Binary

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TENSOR_CORE = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync"}
MMA_ROWS = 16  # that a warp computes with one matrix instruction


@dataclass(frozen=True)
class Architecture:
    """What a kind of GPU offers, by compute capability.

    Source: CUDA C++ programming guide, table of technical specifications per compute capability.
    """

    shared_of_block: int  # KiB
    shared_of_processor: int  # KiB
    threads: int  # of a multiprocessor
    registers: int = 65536
    blocks: int = 32


ARCHITECTURES = {
    80: Architecture(163, 164, 2048),
    90: Architecture(227, 228, 2048),
    100: Architecture(227, 228, 2048),
    120: Architecture(99, 100, 1536, blocks=24),
}


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Attributes:
        architecture, warps: of the launch.
        registers: of a thread.
        spilled_bytes: of a thread: stack and local memory.
        shared_bytes: of a block.
        ptx, ttir, ttgir: its forms.
        sass: machine code, with its encoding.
    """

    architecture: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    ptx: str
    ttir: str = ""
    ttgir: str = ""
    sass: str = ""

    @classmethod
    def of(cls, binary: Binary) -> Compiled:
        """Compile for a GPU that need not be there."""
        kernel = binary.compile()
        registers, spilled = _resources(kernel.asm["cubin"])
        ptx, ttir, ttgir = (str(kernel.asm[form]) for form in ("ptx", "ttir", "ttgir"))
        # Of specialised warps there are more than the launch asked for.
        warps = re.search(r"\.reqntid (\d+)", ptx)
        count = int(warps[1]) // WARP if warps else binary.options["num_warps"]
        shared = kernel.metadata.shared
        sass = _run("nvdisasm", "--print-code", "-hex", cubin=kernel.asm["cubin"])
        return cls(binary.architecture, count, registers, spilled, shared, ptx, ttir, ttgir, sass)

    @property
    def instructions(self) -> int:
        """Instructions of the PTX."""
        return len(re.findall(r"(?m)^\s+(?:@!?%p\d+ )?[a-z][a-z0-9_.:]+ .*;$", self.ptx))

    @property
    def tensor_core(self) -> dict[str, int]:
        """Matrix instructions by kind."""
        counts = {name: len(re.findall(pattern, self.ptx)) for name, pattern in TENSOR_CORE.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def operands(self) -> str:
        """The dtype of the operands of matrix products, or nothing."""
        dtypes = sorted(set(re.findall(r"tt\.dot .*? : tensor<[\dx]+x(\w+)> \*", self.ttir)))
        return "/".join({"f16": "fp16", "f32": "fp32"}.get(dtype, dtype) for dtype in dtypes)

    @cached_property
    def accesses(self) -> dict[str, Counter[int]]:
        """Instructions that load from and store to global memory, by their bytes a thread."""
        counts: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
        for kind, words in re.findall(r"\b(ld|st)\.global((?:\.[\w:]+)+)", self.ptx):
            vector = re.search(r"\.v(\d)", words)
            bits = int(re.findall(r"\d+", words)[-1])
            counts[kind][bits // 8 * (int(vector[1]) if vector else 1)] += 1
        copies = r"cp\.async\.c[ag]\.shared\.global(?:\.[\w:]+)* \[[^]]*\], \[[^]]*\], (0x[0-9a-f]+|\d+)"
        for size in re.findall(copies, self.ptx):
            counts["ld"][int(size, 0)] += 1
        return counts

    @property
    def narrow(self) -> int:
        """Accesses of less than 4 bytes a thread: elements of half precision one by one."""
        return sum(count for sizes in self.accesses.values() for size, count in sizes.items() if size < 4)

    @property
    def waits(self) -> int:
        """Waits for asynchronous products in a step of the innermost loop that has the most."""
        starts: dict[str, int] = {}
        lines, loops = self.sass.splitlines(), []
        for end, line in enumerate(lines):
            if label := re.match(r"(\.L_\w+):", line):
                starts[label[1]] = end
            elif (jump := re.search(r"\bBRA\b.*`\((\.L_\w+)\)", line)) and jump[1] in starts:
                loops.append((starts[jump[1]], end))
        products = [(a, b) for a, b in loops if any("HGMMA" in line for line in lines[a:b])]
        inner = [x for x in products if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in products)]
        return max((sum("WARPGROUP.DEPBAR" in line for line in lines[a:b]) for a, b in inner), default=0)

    @property
    def duplicates(self) -> int:
        """How many warps compute the same elements of a product; 1 is each its own."""
        layouts = {}
        shapes = (
            r"(#mma\d*) = #ttg\.nvidia_mma<\{.*?warpsPerCTA = \[(\d+), (\d+)\], .*?instrShape = \[([\d, ]+)\]"
        )
        for name, down, across, shape in re.findall(shapes, self.ttgir):
            layouts[name] = int(down) * MMA_ROWS, int(across) * int(shape.split(",")[1])
        repeats = [1]
        results = r"(?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, (#mma\d*)>"
        for rows, columns, name in re.findall(results, self.ttgir):
            height, width = layouts[name]
            repeats.append(math.ceil(height / int(rows)) * math.ceil(width / int(columns)))
        return max(repeats)

    @property
    def blocks_per_processor(self) -> int:
        """Blocks that fit on a multiprocessor at once."""
        gpu = ARCHITECTURES[self.architecture]
        by_registers = gpu.registers // (-(-self.registers * WARP // 256) * 256 * self.warps)
        by_shared = gpu.shared_of_processor * 1024 // (self.shared_bytes + 1024)
        return min(by_registers, by_shared, gpu.threads // (WARP * self.warps), gpu.blocks)


def _run(tool: str, *options: str, cubin: bytes) -> str:
    """What one of the tools that come with Triton prints about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and spilled bytes."""
    printed = _run("cuobjdump", "--dump-resource-usage", cubin=cubin)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", printed)
    if usage is None:
        raise RuntimeError(f"cuobjdump: expected REG, STACK and LOCAL, got {printed!r}")
    registers, stack, local = map(int, usage.groups())
    return registers, stack + local
