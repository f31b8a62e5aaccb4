"""Whether `torch.compile` can make code for the CPU here."""

from __future__ import annotations

import shutil

HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
