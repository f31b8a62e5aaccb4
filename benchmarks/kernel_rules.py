"""What is asked of a row of the kernel table, and who is excused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.assembly import ARCHITECTURES


@dataclass(frozen=True)
class Row:
    """A binary that a preset's steps launch.

    Attributes:
        preset, precision: of the steps.
        kernel: its name.
        architecture: of the GPU.
        form: compile-time arguments, without flags that are off and absent tensors; then the pointers that
            are not multiples of 16.
        types: of its pointers, in order.
        warps, stages: of the launch.
        registers, spilled_bytes: of a thread.
        shared_bytes: of a block.
        blocks_an_sm: that fit on a multiprocessor at once.
        waves: of the largest grid over all multiprocessors.
        operands: dtype of matrix products, or -.
        matrix_instructions: by kind, or -.
        waits: for asynchronous products in a step of the innermost loop; on sm_90 alone.
        duplicates: warps that compute the same elements of a product.
        load_bytes, store_bytes: of the widest and the narrowest access to global memory, a thread.
        narrow: accesses of less than 4 bytes.
        instructions: in PTX.
    """

    preset: str
    precision: str
    kernel: str
    architecture: str
    form: str
    types: str
    warps: int
    stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    blocks_an_sm: int
    waves: float
    operands: str
    matrix_instructions: str
    waits: int
    duplicates: int
    load_bytes: str
    store_bytes: str
    narrow: int
    instructions: int

    @classmethod
    def parse(cls, line: str) -> Row:
        kinds = {"int": int, "float": float, "str": str}
        fields = dataclasses.fields(cls)
        values = zip(fields, line.split("\t"), strict=True)
        return cls(*(kinds[str(field.type)](value) for field, value in values))

    def __str__(self) -> str:
        return "\t".join(map(str, dataclasses.astuple(self)))

    @property
    def key(self) -> tuple[Any, ...]:
        """All but what the compiler made of it, and waves."""
        return dataclasses.astuple(self)[:8]


COLUMNS = "\t".join(field.name for field in dataclasses.fields(Row))
BANDWIDTH_BOUND = (
    "adamw", "adamw_norms", "branch_grad", "column_merge", "column_pass", "column_scaling",
    "column_total", "crops_blur", "crops_colour", "crops_finish", "crops_horizontal", "crops_vertical",
    "embedding_bwd", "embedding_fwd", "fold", "group_norm_bwd", "group_norm_fwd", "koleo_bwd",
    "koleo_fwd", "layer_norm_bwd", "layer_norm_fwd", "losses_bwd", "losses_fwd", "losses_merge",
    "qk_norm_bwd", "qk_norm_fwd", "row_pass", "swiglu", "unit_rows_bwd", "unit_rows_fwd", "vector_grads",
    "window_attention_bwd", "window_attention_fwd",
)  # fmt: skip


def _shared(row: Row) -> str | None:
    limit = ARCHITECTURES[int(row.architecture.removeprefix("sm_"))].shared_of_block * 1024
    return f"{row.shared_bytes} bytes, the GPU has {limit}" if row.shared_bytes > limit else None


def _scalar(row: Row) -> str | None:
    bound = row.kernel in BANDWIDTH_BOUND and row.narrow
    return f"{row.narrow} of less than 4 bytes, of {row.load_bytes} and {row.store_bytes}" if bound else None


def _matrix(row: Row) -> str | None:
    """Products in half precision take the tensor cores; those in fp32 are exact, so none."""
    units = {"sm_90": "wgmma", "sm_100": "tcgen05"}.get(row.architecture, "mma")
    wanted = "-" if row.operands in ("-", "fp32") else units
    instructions = re.sub(r"\d+ ", "", row.matrix_instructions)
    return None if instructions == wanted else f"expected {wanted}, got {instructions}"


RULES: dict[str, Callable[[Row], str | None]] = {
    "spills": lambda row: f"{row.spilled_bytes} bytes" if row.spilled_bytes else None,
    "shared memory": _shared,
    "blocks": lambda row: None if row.blocks_an_sm else "none fits",
    "duplicated warps": lambda row: f"{row.duplicates} compute the same" if row.duplicates > 1 else None,
    "scalar accesses": _scalar,
    "matrix instructions": _matrix,
}


@dataclass(frozen=True)
class Excuse:
    """Rows that may break a rule: of kernels whose names, and of architectures and forms that, match."""

    rule: str
    kernels: str
    reason: str
    architectures: str = ".*"
    forms: str = ".*"

    def covers(self, rule: str, row: Row) -> bool:
        texts = ((self.kernels, row.kernel), (self.architectures, row.architecture))
        matched = all(re.fullmatch(pattern, text) for pattern, text in texts)
        return matched and rule == self.rule and re.search(self.forms, row.form) is not None


EXCUSES = (
    Excuse(
        "matrix instructions",
        "attention_bwd",
        "wgmma takes 64 rows, and some products of these tiles have 32",
        forms="HEAD_DIM=(80|128)",
    ),
    Excuse(
        "scalar accesses",
        "group_norm_fwd|group_norm_bwd",
        "channels of a group are found by division, and groups of 2 to 8 lie apart",
        forms=r"PER_GROUP=[248]\b",
    ),
    Excuse("scalar accesses", "embedding_fwd|embedding_bwd", "a patch is masked by a byte", forms="HAS_MASK"),
    Excuse("scalar accesses", "crops_horizontal", "pixels are bytes, gathered where a crop's filter lies"),
    Excuse("scalar accesses", "crops_blur", "a tap further is a pixel further, which is not aligned"),
    Excuse(
        "spills",
        "group_norm_fwd",
        "16 bytes, though ptxas takes only 72 of the registers that it may",
        architectures="sm_100",
    ),
    Excuse(
        "spills",
        "losses_fwd|vector_grads",
        "40 and 16 bytes, though ptxas takes only 168 and 64 of the registers that it may",
        architectures="sm_80",
    ),
)


def complaints(rows: Sequence[Row], excuses: Sequence[Excuse] = EXCUSES) -> Iterator[str]:
    """Rules that are broken without an excuse, and excuses that no row needs."""
    needed = set()
    for row in rows:
        for name, rule in RULES.items():
            complaint = rule(row)
            if complaint is None:
                continue
            covering = [excuse for excuse in excuses if excuse.covers(name, row)]
            needed.update(covering)
            if not covering:
                yield f"{name}: {complaint}: {' '.join(map(str, row.key))}"
    for excuse in excuses:
        if excuse not in needed:
            yield f"no row needs the excuse: {excuse}"
