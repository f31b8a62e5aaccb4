"""Kernel tests run in lanes, each a process of its own: interpreted and compiled Triton do not mix."""

from __future__ import annotations

import os

from elastic_kernels import dispatch

collect_ignore = []
if not dispatch.HAS_TRITON:
    collect_ignore.append("device")
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("interpreted")
if os.environ.get("ELASTIC_KERNELS_LANE") != "compiled":
    collect_ignore.append("compiled")
