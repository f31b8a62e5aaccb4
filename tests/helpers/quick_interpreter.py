"""Triton's interpreter without what it does again in every call of a function by a kernel.

It replaces the members of `triton.language` when a kernel starts, and looks for all of them again in each
function that the kernel calls: a third of its time.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_replace = interpreter._patch_lang


@cache
def _languages(function: FunctionType) -> list[ModuleType]:
    return [value for value in function.__globals__.values() if value is tl or value is tl.core]


def _replace_once(function: FunctionType) -> Any:
    """Nothing to restore where the members are replaced already, as in a function that a kernel calls."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _replace(function)
    return interpreter._LangPatchScope()


def install() -> None:
    interpreter._patch_lang = _replace_once
