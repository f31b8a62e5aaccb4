"""Fixtures shared by all tests."""

from __future__ import annotations

import socket

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread only costs, and results repeat bitwise


@pytest.fixture
def free_port() -> int:
    """A TCP port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
