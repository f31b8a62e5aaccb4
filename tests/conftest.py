"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import socket

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and results repeat bitwise


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `cuda` run where there is a GPU, or what their lane has in its place."""
    marker = item.get_closest_marker("cuda")
    if marker is None or torch.cuda.is_available():
        return
    if os.environ.get("TRITON_INTERPRET") != "1" or not marker.kwargs.get("or_interpreted"):
        pytest.skip("needs CUDA")


@pytest.fixture
def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
