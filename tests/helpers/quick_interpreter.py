"""Triton's interpreter without what it does again and again, most of its time; results are the same bits.

It replaces the members of `triton.language` when a kernel starts, and looks for all of them again in each
function that the kernel calls. It computes every sum and product of integers again in int64 for an assertion
that is off. It builds the type and the extents of every intermediate result anew. It finds out what types the
operands of each sum or product are converted to, and spreads both over all of the result, which NumPy does
by itself.
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
_convert_both = TritonSemantic.binary_op_type_checking_impl
_expand = TritonSemantic.expand_dims
_begin_block = tl.block_type.__init__
_blocks: dict[tuple, dict[str, Any]] = {}
_dtypes: dict[str, Any] = {}
_converted: dict[tuple, tuple[Any, Any]] = {}
_expanded: dict[tuple, tl.dtype] = {}


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


def _kind(operand: Any) -> tuple:
    """What the conversion of an operand depends on: type and shape, or all of a number."""
    if type(operand) is tl.tensor:
        return operand.dtype.name, id(operand.shape)
    return type(operand), repr(operand)


def _convert_known(semantic: TritonSemantic, left: Any, right: Any, *rules: Any, **named: Any) -> Any:
    """Operands of an elementwise operation, with the types of its result; only numbers get its shape."""
    key = (_kind(left), _kind(right), rules, *named.items())
    if key not in _converted:
        both = _convert_both(semantic, left, right, *rules, **named)
        _converted[key] = tuple(
            after.type if type(before) is tl.tensor else after
            for before, after in zip((left, right), both, strict=True)
        )
    return [_as(semantic, *pair) for pair in zip((left, right), _converted[key], strict=True)]


def _as(semantic: TritonSemantic, operand: Any, known: Any) -> tl.tensor:
    """An operand as a type, whose shape its values are not spread over; or the number it is, as a tensor."""
    if type(known) is tl.tensor:
        return known
    if operand.dtype.name != known.scalar.name:
        operand = semantic.cast(operand, known.scalar)
    if vars(operand.type) is vars(known):
        return operand
    return tl.tensor(operand.handle, known)


def _expand_known(semantic: TritonSemantic, operand: tl.tensor, axis: int) -> tl.tensor:
    key = operand.dtype.name, id(operand.shape), axis
    if key not in _expanded or not operand.type.is_block():
        expanded = _expand(semantic, operand, axis)
        _expanded[key] = expanded.type
        return expanded
    return tl.tensor(semantic.builder.create_expand_dims(operand.handle, axis), _expanded[key])


@cache
def _semantic_of(builder: Any) -> TritonSemantic:
    return TritonSemantic(builder)


def _call_directly(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """A member of the language without the check that it got what it now gets always."""
    function, semantic = getattr(member, "__wrapped__", member), _semantic_of(builder)

    def call(*args: Any, _semantic: Any = None, **options: Any) -> Any:
        return function(*args, _semantic=semantic, **options)

    scope.set_attr(owner, name, call)


def _begin_tensor(tensor: tl.tensor, handle: Any, type: tl.dtype) -> None:
    tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
    tensor.shape, tensor.numel = type.extents if type.is_block() else _extents(())


def install() -> None:
    interpreter._patch_lang = _replace_once
    interpreter._patch_attr = _call_directly
    interpreter._get_np_dtype = _known_dtype
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    TritonSemantic.broadcast_impl_value = _broadcast_others
    TritonSemantic.binary_op_type_checking_impl = _convert_known
    TritonSemantic.expand_dims = _expand_known
    tl.block_type.__init__ = _known_block
    tl.tensor.__init__ = _begin_tensor
