"""Triton's interpreter without what it does again and again, most of its time; results are the same bits.

It replaces the members of `triton.language` when a kernel starts, and looks for all of them again in each
function that the kernel calls. It computes every sum and product of integers again in int64 for an assertion
that is off. It builds the type and the extents of every intermediate result anew.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import prod
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_replace = interpreter._patch_lang
_numpy_dtype = interpreter._get_np_dtype
_broadcast = TritonSemantic.broadcast_impl_value
_begin_block = tl.block_type.__init__
_blocks: dict[tuple, dict[str, Any]] = {}
_dtypes: dict[str, Any] = {}


@cache
def _languages(function: FunctionType) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _replace_once(function: FunctionType) -> Any:
    """Nothing to restore where the members are replaced already, as in a function that a kernel calls."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _replace(function)
    return interpreter._LangPatchScope()


def _known_dtype(dtype: tl.dtype) -> Any:
    name = dtype.scalar.name
    if name not in _dtypes:
        _dtypes[name] = _numpy_dtype(dtype)
    return _dtypes[name]


def _known_block(block: tl.block_type, element: tl.dtype, shape: Any) -> None:
    """Block types of one element and shape share their members, and the extents that tensors show."""
    sizes = (*[s.value if isinstance(s, tl.constexpr) else s for s in shape],)
    key = element.name, sizes
    if key not in _blocks:
        _begin_block(block, element, shape)
        _blocks[key] = vars(block) | {"extents": _extents(sizes)}
    block.__dict__ = _blocks[key]


@cache
def _extents(sizes: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
    """Shape and number of elements, as tensors show them."""
    return tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(prod(sizes))


def _broadcast_others(semantic: TritonSemantic, left: tl.tensor, right: tl.tensor) -> tuple:
    """Nothing to do where shapes, which those of block types share, are the same."""
    if left.shape is right.shape:
        return left, right
    return _broadcast(semantic, left, right)


def _begin_tensor(tensor: tl.tensor, handle: Any, type: tl.dtype) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = type.extents if type.is_block() else _extents(())


def install() -> None:
    interpreter._patch_lang = _replace_once
    interpreter._get_np_dtype = _known_dtype
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    TritonSemantic.broadcast_impl_value = _broadcast_others
    tl.block_type.__init__ = _known_block
    tl.tensor.__init__ = _begin_tensor
