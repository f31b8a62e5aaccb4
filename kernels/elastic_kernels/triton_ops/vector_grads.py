"""Triton kernel of the gradients of vectors: those of a backward in one launch, from partial sums.

    bias, affine of a norm    sum of the parts
    LayerScale                dW = gamma * P,  db = gamma * sum dy,  dgamma = rowsum(P * W) + b * sum dy

Each is made in full shape, 0 outside of the corner, and added to one that waits beside it, or in place to an
earlier one. LayerScale takes one pass over P, of the weight's size, and no saved activation. Parts are added
in a fixed order, so that results repeat bitwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import ops, register


@triton.jit
def _added(sums_ptr, parts, stride, offs_n, mask_n, PARTS: tl.constexpr):
    """Columns `offs_n` of partial sums `[parts, stride]`, added up."""
    total = tl.zeros([PARTS, offs_n.shape[0]], tl.float32)
    for start in range(0, parts, PARTS):
        offs_p = start + tl.arange(0, PARTS)
        mask = (offs_p < parts)[:, None] & mask_n[None, :]
        total += tl.load(sums_ptr + offs_p[:, None] * stride + offs_n[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _vector(
    result_ptr, sums_ptr, addend_ptr, parts, groups, features, largest, tile,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of the vectors `[groups, largest]`, one after the other, from `[parts, groups, features]`."""
    tiles = tl.cdiv(largest, COLUMNS)
    group, offs_n = tile // tiles, tile % tiles * COLUMNS + tl.arange(0, COLUMNS)
    sums_ptr += group * features
    total = _added(sums_ptr, parts, groups * features, offs_n, offs_n < features, PARTS)
    inside, place = offs_n < largest, group * largest + offs_n
    if addend_ptr is not None:
        total += tl.load(addend_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(result_ptr + place, total.to(result_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scaled_rows(
    result_ptr, dgamma_ptr, dbias_ptr, p_ptr, sums_ptr, weight_ptr, bias_ptr, gamma_ptr, corner_ptr,
    addend_ptr, gamma_addend_ptr,
    parts, features, in_features, largest, corner_out, corner_width,
    stride_rn, stride_cn, stride_wn, stride_wk, tile,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the weight's gradient, of P and a corner that may be added, either of which is the result."""
    offs_n = tile * ROWS + tl.arange(0, ROWS)
    mask_n, inside = offs_n < features, offs_n < largest
    gamma = tl.load(gamma_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    rows = offs_n.to(tl.int64)[:, None]
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, in_features, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        mask = mask_n[:, None] & (offs_k < in_features)[None, :]
        p = tl.load(p_ptr + rows * in_features + offs_k[None, :], mask=mask, other=0.0)
        w = tl.load(weight_ptr + rows * stride_wn + offs_k[None, :] * stride_wk, mask=mask, other=0.0)
        products += p * w.to(tl.float32)
        p *= gamma[:, None]
        if corner_ptr is not None:
            shared = (offs_n < corner_out)[:, None] & (offs_k < corner_width)[None, :]
            corner = tl.load(corner_ptr + rows * stride_cn + offs_k[None, :], mask=shared, other=0.0)
            p += corner.to(tl.float32)
        tl.store(result_ptr + rows * stride_rn + offs_k[None, :], p, mask=mask)
    dgamma = tl.sum(products, 1)
    if sums_ptr is not None:
        dbias = _added(sums_ptr, parts, features, offs_n, mask_n, PARTS)
        dgamma += dbias * tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        dbias *= gamma
        if addend_ptr is not None:
            dbias += tl.load(addend_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
        tl.store(dbias_ptr + offs_n, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
    if gamma_addend_ptr is not None:
        dgamma += tl.load(gamma_addend_ptr + offs_n, mask=inside, other=0.0).to(tl.float32)
    tl.store(dgamma_ptr + offs_n, dgamma.to(dgamma_ptr.dtype.element_ty), mask=inside)


@launched("first_parts", "first_groups", "second_parts", "second_groups", "parts")
def _vector_grads_kernel(
    first_ptr, first_sums_ptr, first_addend_ptr, first_parts, first_groups, first_features, first_largest,
    second_ptr, second_sums_ptr, second_addend_ptr, second_parts, second_groups, second_features,
    second_largest,
    result_ptr, dgamma_ptr, dbias_ptr, p_ptr, sums_ptr, weight_ptr, bias_ptr, gamma_ptr, corner_ptr,
    addend_ptr, gamma_addend_ptr,
    parts, features, in_features, largest, corner_out, corner_width,
    stride_rn, stride_cn, stride_wn, stride_wk,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """LayerScale's rows if P is given, then tiles of up to two vectors: a program takes one of them."""
    tile = tl.program_id(0)
    if p_ptr is not None:
        if tile < tl.cdiv(largest, ROWS):
            _scaled_rows(
                result_ptr, dgamma_ptr, dbias_ptr, p_ptr, sums_ptr, weight_ptr, bias_ptr, gamma_ptr,
                corner_ptr, addend_ptr, gamma_addend_ptr,
                parts, features, in_features, largest, corner_out, corner_width, stride_rn, stride_cn,
                stride_wn, stride_wk, tile,
                PARTS, ROWS, BLOCK,
            )  # fmt: skip
        tile -= tl.cdiv(largest, ROWS)
    if first_ptr is not None:
        tiles = first_groups * tl.cdiv(first_largest, COLUMNS)
        if (tile >= 0) & (tile < tiles):
            _vector(
                first_ptr, first_sums_ptr, first_addend_ptr, first_parts, first_groups, first_features,
                first_largest, tile, PARTS, COLUMNS,
            )  # fmt: skip
        tile -= tiles
    if second_ptr is not None:  # noqa: SIM102, the compiler drops it
        if tile >= 0:
            _vector(
                second_ptr, second_sums_ptr, second_addend_ptr, second_parts, second_groups, second_features,
                second_largest, tile, PARTS, COLUMNS,
            )  # fmt: skip


PARTS, COLUMNS = 128, 32  # partial sums and columns that are loaded at a time: many programs, few turns
ROWS, BLOCK = 4, 512  # of LayerScale's pass: 16 values a thread
_NO_VECTOR, _NO_SCALE = (None, None, None, 0, 1, 0, 0), (*(None,) * 11, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)


def vector_grads_(
    results: list[Tensor], sums: list[Tensor], addends: list[Tensor | None], scaled: list[Tensor | None]
) -> None:
    """Write gradients.

    Args:
        results: a vector `[groups * largest]` of each of `sums`; then those of LayerScale, if there is any:
            the weight's gradient `[1, n, k]`, perhaps in a larger one, and those of gamma `[largest]` and of
            the bias `[largest]`, if the layer has one.
        sums: partial sums, fp32 `[parts, groups, n]`.
        addends: a vector like its result for each of `sums`, perhaps itself, added to it, or None.
        scaled: none, or of LayerScale's layer: P, fp32 `[1, n, k]` and contiguous, or None if it is where the
            weight's gradient will be; partial sums of the bias `[parts, 1, n]` or None, the corners weight
            `[1, n, k]`, bias `[1, n]` or None and gamma `[n]`, of which P was made; a gradient
            `[1, n_c, k_c]`, perhaps in a larger one, to be added to that corner of P, or None; gradients of
            bias and gamma, to which these are added, or None. Those that are added may be the results.
    """
    vectors = list(zip(results, sums, addends, strict=False))
    scale, programs = _scale_arguments(results[len(sums) :], *scaled) if scaled else (_NO_SCALE, 0)
    for i in range(0, max(len(vectors), 1), 2):
        pair = [_vector_arguments(*vector) for vector in vectors[i : i + 2]]
        first, second = (*pair, _NO_VECTOR, _NO_VECTOR)[:2]
        tiles = sum(groups * cdiv(largest, COLUMNS) for *_, groups, _, largest in pair)
        _vector_grads_kernel[(programs + tiles,)](
            *first, *second, *scale,
            PARTS=PARTS, COLUMNS=COLUMNS, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        scale, programs = _NO_SCALE, 0


def _vector_arguments(result: Tensor, sums: Tensor, addend: Tensor | None) -> tuple[Any, ...]:
    parts, groups, features = sums.shape
    return result, sums, addend, parts, groups, features, result.numel() // groups


def _scale_arguments(results: list[Tensor], *scaled: Any) -> tuple[tuple[Any, ...], int]:
    """Of the kernel, and its programs."""
    result, dgamma, dbias = (*results, None)[:3]
    p, sums, weight, _, _, corner, _, _ = scaled
    assert result is not None and dgamma is not None
    parts, largest = 0 if sums is None else sums.shape[0], dgamma.numel()
    shared, stride = ((0, 0), 0) if corner is None else (corner.shape[1:], corner.stride(1))
    sizes = (parts, *result.shape[1:], largest, *shared, result.stride(1), stride, *weight.stride()[1:])
    places = (result, dgamma, dbias, result if p is None else p)
    return (*places, *scaled[1:], *sizes), cdiv(largest, ROWS)


register(
    "vector_grads_(Tensor(a!)[] results, Tensor[] sums, Tensor?[] addends, Tensor?[] scaled) -> ()",
    vector_grads_,
)


class VectorGrads:
    """Vectors whose gradients one launch makes at the end of a backward; they are filled no earlier."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._results: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._addends: list[Tensor | None] = []
        self._scaled: list[Tensor | None] = []
        self._scaled_results: list[Tensor] = []

    def add(self, sums: Tensor, largest: int, dtype: torch.dtype, addend: Tensor | None) -> Tensor:
        """That of partial sums fp32 `[parts, groups, n]`: `[groups * largest]`, as is `addend`."""
        result = sums.new_empty(sums.shape[1] * largest, dtype=dtype)
        self._results.append(result)
        self._sums.append(sums)
        self._addends.append(addend)
        return result

    def scale(
        self, p: Tensor, largest: int, dtype: torch.dtype, sums: Tensor | None, *scaled: Tensor | None
    ) -> tuple[Tensor | None, Tensor]:
        """Those of bias and gamma of the one layer with LayerScale; the rest is as of `vector_grads_`."""
        dgamma = p.new_empty(largest, dtype=dtype)
        dbias = None if sums is None else p.new_empty(largest, dtype=dtype)
        self._scaled = [None, sums, *scaled]
        self._scaled_results = [p, dgamma, *(() if dbias is None else (dbias,))]
        return dbias, dgamma

    def add_to(self, gradient: Tensor, sums: Tensor) -> None:
        """Add that of partial sums to one `[groups * largest]`, in place."""
        self._results.append(gradient)
        self._sums.append(sums)
        self._addends.append(gradient)

    def scale_into(
        self,
        corner: Tensor,
        p: Tensor,
        vectors: tuple[Tensor, Tensor | None],
        sums: Tensor | None,
        *layer: Tensor | None,
    ) -> None:
        """As `scale`, all of it added to earlier gradients: a corner, and vectors of gamma and bias."""
        dgamma, dbias = vectors
        self._scaled = [p, sums, *layer, corner, dbias, dgamma]
        self._scaled_results = [corner, dgamma, *(() if dbias is None else (dbias,))]

    def launch(self) -> None:
        """Fill those that were not yet."""
        if results := self._results + self._scaled_results:
            ops.vector_grads_(results, self._sums, self._addends, self._scaled)
            self._clear()


def side_by_side(vectors: Sequence[Tensor | None] | None) -> Tensor | None:
    """Two vectors as one, if the second lies behind the first in memory, as a backward here makes them."""
    first, second = vectors or (None, None)
    if first is None or second is None or first.untyped_storage()._cdata != second.untyped_storage()._cdata:
        return None
    if second.storage_offset() != first.storage_offset() + first.numel():
        return None
    return first.as_strided((first.numel() + second.numel(),), (1,))


def affine_gradients(partials: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Full-shape gradients of a norm's weight and bias, from partial sums fp32 `[parts, 2, n]`."""
    vectors = VectorGrads()
    both = vectors.add(partials, len(weight), weight.dtype, None)
    vectors.launch()
    return both[: len(weight)], both[len(weight) :]
