"""What the steps of the presets launch on Hopper, recorded once."""

from __future__ import annotations

import pytest

from benchmarks import kernel_report


@pytest.fixture(scope="session")
def cases() -> list[kernel_report.Case]:
    return kernel_report.launched([run for run in kernel_report.RUNS if run.architecture == "sm_90"])
