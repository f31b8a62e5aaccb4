"""Every test here runs the Triton kernels, under Triton's interpreter, into outputs full of NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from numerics import poison_outputs

from elastic_kernels import backend


@pytest.fixture(autouse=True)
def on_triton_with_poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison_outputs(monkeypatch)
    with backend("triton"):
        yield
