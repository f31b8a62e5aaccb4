"""Triton kernels of an optimiser step over all tensors of a network at once.

Gradients are read twice, for their norms and for the update; weights, both moments and the average are read
and written once: 4 + 36 bytes a parameter with an average. Copies in half precision of weight and average are
written with them: 2 bytes each.

Tensors are found through a table of addresses, so that the number of launches does not grow with theirs: a
program takes a chunk of one tensor. What differs between tensors and not within them is worked out in float64
by one small program: bias corrections, clip coefficient, and whether anything happens at all.

Not registered with `torch.library`: what the kernels change, they find by address, which no schema can say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elastic_kernels.triton_ops.device import cdiv
from elastic_kernels.triton_ops.launching import launched
from elastic_kernels.triton_ops.registration import on_its_device

CHUNK = 8192  # elements of a tensor that a program takes
BLOCK = 1024
WARPS = 8
COPIED = tl.constexpr(16)  # tensors have copies whose elements are a multiple of it
TENSORS = 256  # a block of the small program


class Tables(NamedTuple):
    """Where everything lies, on the device. Addresses are int64 `[tensors]`, 0 for what is absent.

    Attributes:
        numel, group, part: elements of a tensor, and the numbers of its parameter group and of the part it
            is clipped with; int64 `[tensors]`.
        params, exp_avgs, exp_avg_sqs, averages: addresses of contiguous fp32 tensors.
        copies, average_copies: addresses of contiguous fp16 or bf16 ones, of parameters and averages of
            a multiple of `COPIED` elements.
        chunks: int32 `[chunks, 2]`, numbers of a tensor and of a chunk of `CHUNK` elements in it.
        steps: fp32 `[tensors]`, counted by the update.
    """

    numel: Tensor
    group: Tensor
    part: Tensor
    params: Tensor
    exp_avgs: Tensor
    exp_avg_sqs: Tensor
    averages: Tensor
    copies: Tensor
    average_copies: Tensor
    chunks: Tensor
    steps: Tensor


class Coefficients(NamedTuple):
    """What the update needs of each tensor, fp32 `[tensors]`; `trains` is 0 without a finite gradient."""

    clip: Tensor
    decay: Tensor
    weight1: Tensor
    weight2: Tensor
    step_size: Tensor
    scale: Tensor
    eps: Tensor
    trains: Tensor


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _load(pointer, at, numel, WHOLE: tl.constexpr):
    """Without a mask where the whole chunk lies inside, which allows accesses of 16 bytes."""
    return tl.load(pointer + at) if WHOLE else tl.load(pointer + at, mask=at < numel, other=0.0)


@triton.jit
def _store(pointer, at, value, numel, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + at, value)
    else:
        tl.store(pointer + at, value, mask=at < numel)


@triton.jit
def _store_rounded(
    address, at, value, numel,
    BF16: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """In half precision, where there is a place for it: 16 elements or more, all in accesses of 8 bytes."""
    dtype: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    if address != 0:
        numel = numel // COPIED * COPIED  # which tells the compiler
        _store(_pointer(address, dtype, ALIGNED), at, value.to(dtype), numel, WHOLE)


@triton.jit
def _squares(grad_ptr, first, numel, WHOLE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        g = _load(grad_ptr, first + start + tl.arange(0, BLOCK), numel, WHOLE)
        total += g * g
    return tl.sum(total, 0)


@launched()
def _adamw_norms_kernel(
    grads_ptr, numel_ptr, chunks_ptr, partial_ptr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the squared gradients of each chunk; 0 where there is no gradient."""
    pid = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * pid)
    first = tl.load(chunks_ptr + 2 * pid + 1).to(tl.int64) * CHUNK
    address, numel = tl.load(grads_ptr + tensor), tl.load(numel_ptr + tensor)
    grad_ptr = _pointer(address, tl.float32, ALIGNED)
    total = 0.0
    if address != 0:
        if first + CHUNK <= numel:
            total = _squares(grad_ptr, first, numel, True, CHUNK, BLOCK)
        else:
            total = _squares(grad_ptr, first, numel, False, CHUNK, BLOCK)
    tl.store(partial_ptr + pid, total)


@launched("tensors")
def _adamw_coefficients_kernel(
    grads_ptr, group_ptr, part_ptr, lr_ptr, weight_decay_ptr, beta1_ptr, beta2_ptr, group_eps_ptr,
    clips_ptr, finite_ptr, steps_ptr,
    clip_ptr, decay_ptr, weight1_ptr, weight2_ptr, step_size_ptr, scale_ptr, eps_ptr, trains_ptr,
    tensors,
    TENSORS: tl.constexpr,
):  # fmt: skip
    """`Coefficients`, in float64 before they are rounded; counts the steps."""
    i = tl.program_id(0) * TENSORS + tl.arange(0, TENSORS)
    mask = i < tensors
    trains = (tl.load(grads_ptr + i, mask=mask, other=0) != 0) & (tl.load(finite_ptr) != 0)
    group = tl.load(group_ptr + i, mask=mask, other=0)
    part = tl.load(part_ptr + i, mask=mask, other=0)
    lr, weight_decay = tl.load(lr_ptr + group), tl.load(weight_decay_ptr + group)
    beta1, beta2 = tl.load(beta1_ptr + group), tl.load(beta2_ptr + group)
    step = tl.load(steps_ptr + i, mask=mask, other=0.0).to(tl.float64) + trains.to(tl.float64)
    counted = tl.maximum(step, 1.0)  # a tensor that never trained needs no correction, but finite numbers
    correction1 = 1 - tl.exp(counted * tl.log(tl.maximum(beta1, 1e-300)))
    correction2 = 1 - tl.exp(counted * tl.log(tl.maximum(beta2, 1e-300)))
    tl.store(clip_ptr + i, tl.load(clips_ptr + part), mask=mask)
    tl.store(decay_ptr + i, (1 - lr * weight_decay).to(tl.float32), mask=mask)
    tl.store(weight1_ptr + i, (1 - beta1).to(tl.float32), mask=mask)
    tl.store(weight2_ptr + i, (1 - beta2).to(tl.float32), mask=mask)
    tl.store(step_size_ptr + i, (lr / correction1).to(tl.float32), mask=mask)
    tl.store(scale_ptr + i, (1 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
    tl.store(eps_ptr + i, tl.load(group_eps_ptr + group).to(tl.float32), mask=mask)
    tl.store(trains_ptr + i, trains.to(tl.float32), mask=mask)
    tl.store(steps_ptr + i, step.to(tl.float32), mask=mask)


@triton.jit
def _adamw(p, g, m, v, clip, decay, weight1, weight2, step_size, scale, eps):
    g *= clip
    m += weight1 * (g - m)
    v += weight2 * (g * g - v)
    return p * decay - step_size * m / (tl.sqrt(v) * scale + eps), m, v


@triton.jit
def _update(
    grad, param, exp_avg, exp_avg_sq, average, copy, average_copy, first, numel,
    clip, decay, weight1, weight2, step_size, scale, eps, trains,
    one_minus_momentum,
    BF16: tl.constexpr, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of tensors at these addresses."""
    param_ptr, average_ptr = _pointer(param, tl.float32, ALIGNED), _pointer(average, tl.float32, ALIGNED)
    m_ptr, v_ptr = _pointer(exp_avg, tl.float32, ALIGNED), _pointer(exp_avg_sq, tl.float32, ALIGNED)
    for start in range(0, CHUNK, BLOCK):
        at = first + start + tl.arange(0, BLOCK)
        p = _load(param_ptr, at, numel, WHOLE)
        if trains:
            g = _load(_pointer(grad, tl.float32, ALIGNED), at, numel, WHOLE)
            m, v = _load(m_ptr, at, numel, WHOLE), _load(v_ptr, at, numel, WHOLE)
            p, m, v = _adamw(p, g, m, v, clip, decay, weight1, weight2, step_size, scale, eps)
            _store(param_ptr, at, p, numel, WHOLE)
            _store(m_ptr, at, m, numel, WHOLE)
            _store(v_ptr, at, v, numel, WHOLE)
        _store_rounded(copy, at, p, numel, BF16, WHOLE, ALIGNED)
        if average != 0:
            a = _load(average_ptr, at, numel, WHOLE)
            a += one_minus_momentum * (p - a)
            _store(average_ptr, at, a, numel, WHOLE)
            _store_rounded(average_copy, at, a, numel, BF16, WHOLE, ALIGNED)


@launched("one_minus_momentum")
def _adamw_kernel(
    grads_ptr, numel_ptr, params_ptr, exp_avgs_ptr, exp_avg_sqs_ptr, averages_ptr,
    copies_ptr, average_copies_ptr, chunks_ptr,
    clip_ptr, decay_ptr, weight1_ptr, weight2_ptr, step_size_ptr, scale_ptr, eps_ptr, trains_ptr,
    one_minus_momentum,
    BF16: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW of a chunk that has a gradient, its average, and copies of both."""
    tensor = tl.load(chunks_ptr + 2 * tl.program_id(0))
    first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    numel, trains = tl.load(numel_ptr + tensor), tl.load(trains_ptr + tensor) != 0
    clip, decay, eps = tl.load(clip_ptr + tensor), tl.load(decay_ptr + tensor), tl.load(eps_ptr + tensor)
    weight1, weight2 = tl.load(weight1_ptr + tensor), tl.load(weight2_ptr + tensor)
    step_size, scale = tl.load(step_size_ptr + tensor), tl.load(scale_ptr + tensor)
    grad, param = tl.load(grads_ptr + tensor), tl.load(params_ptr + tensor)
    exp_avg, exp_avg_sq = tl.load(exp_avgs_ptr + tensor), tl.load(exp_avg_sqs_ptr + tensor)
    average = tl.load(averages_ptr + tensor)
    copy, average_copy = tl.load(copies_ptr + tensor), tl.load(average_copies_ptr + tensor)
    if first + CHUNK <= numel:
        _update(
            grad, param, exp_avg, exp_avg_sq, average, copy, average_copy, first, numel,
            clip, decay, weight1, weight2, step_size, scale, eps, trains, one_minus_momentum,
            BF16, True, ALIGNED, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        _update(
            grad, param, exp_avg, exp_avg_sq, average, copy, average_copy, first, numel,
            clip, decay, weight1, weight2, step_size, scale, eps, trains, one_minus_momentum,
            BF16, False, ALIGNED, CHUNK, BLOCK,
        )  # fmt: skip


@on_its_device
def squares(grads: Tensor, tables: Tables, aligned: bool) -> Tensor:
    """Sums of squared gradients `[chunks]`, of gradients at addresses int64 `[tensors]`."""
    chunks = len(tables.chunks)
    partial = torch.empty(chunks, dtype=torch.float32, device=grads.device)
    _adamw_norms_kernel[(chunks,)](
        grads, tables.numel, tables.chunks, partial,
        ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return partial


@on_its_device
def update(
    grads: Tensor,
    tables: Tables,
    rates: Tensor,
    clips: Tensor,
    finite: Tensor,
    momentum: float,
    bf16: bool,
    aligned: bool,
) -> None:
    """AdamW and averages in place, and their copies; no AdamW if `finite` is false.

    Args:
        grads: int64 `[tensors]`, addresses of contiguous fp32 gradients, 0 for none.
        tables: of the tensors.
        rates: float64 `[5, groups]`: lr, weight decay, beta1, beta2, eps.
        clips: fp32 `[parts]`, factor of the gradients of a part.
        finite: bool, no dimension.
        momentum: of the averages.
        bf16: dtype of the copies, if there are any; else it is fp16.
        aligned: whether all addresses are multiples of 16.
    """
    tensors = len(grads)
    coefficients = Coefficients(
        *torch.empty(len(Coefficients._fields), tensors, dtype=torch.float32, device=grads.device)
    )
    _adamw_coefficients_kernel[(cdiv(tensors, TENSORS),)](
        grads, tables.group, tables.part, *rates, clips, finite, tables.steps, *coefficients,
        tensors,
        TENSORS=TENSORS, num_warps=4,
    )  # fmt: skip
    _adamw_kernel[(len(tables.chunks),)](
        grads, tables.numel, tables.params, tables.exp_avgs, tables.exp_avg_sqs, tables.averages,
        tables.copies, tables.average_copies, tables.chunks, *coefficients,
        1 - momentum,
        BF16=bf16, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
