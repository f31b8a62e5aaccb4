"""Kernel tests run in lanes, each a process of its own: ways to run Triton do not mix."""

from __future__ import annotations

import os

import pytest
import torch

from elastic_kernels import dispatch

LANE = os.environ.get("ELASTIC_KERNELS_LANE")
collect_ignore = []
if not dispatch.HAS_TRITON or not (torch.cuda.is_available() or LANE == "sanitized"):
    collect_ignore.append("device")
if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("interpreted")
if LANE != "compiled":
    collect_ignore.append("compiled")
if LANE != "sanitized":
    collect_ignore.append("sanitized")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-kernel", action="store_true", help="fail if the sanitiser never executed one")


def pytest_report_header() -> list[str]:
    return ["device: left out, needs CUDA or make sanitize"] if "device" in collect_ignore else []


def pytest_configure(config: pytest.Config) -> None:
    if LANE == "sanitized":
        from helpers.kernels.sanitizer import Plugin

        config.pluginmanager.register(Plugin(config.getoption("every_kernel", False)))
