"""The timer of a GPU on a simulated one: what the host does beside it does not show."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing


class Machine:
    """A host that takes time to launch, and a device that works off a queue; seconds."""

    def __init__(self) -> None:
        self.host = self.device = 0.0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.device, self.host) + device

    def wait(self) -> None:
        self.host = max(self.host, self.device)


class Event:
    machine: Machine

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.done = max(self.machine.device, self.machine.host)

    def query(self) -> bool:
        return self.done <= self.machine.host

    def elapsed_time(self, stop: Event) -> float:
        return 1e3 * (stop.done - self.done)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(Event, "machine", machine, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: machine.launch(0, cycles / timing.SPIN_CLOCK))
    monkeypatch.setattr(torch.cuda, "synchronize", machine.wait)
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: torch.zeros(1))
    return machine


@pytest.mark.parametrize("launches", [1, 100])
def test_launches_are_hidden(machine: Machine, launches: int) -> None:
    """Kernels of 2 us, each of which the host takes 80 us to launch."""

    def call() -> None:
        for _ in range(launches):
            machine.launch(80e-6, 2e-6)

    timer = timing.CudaTimer(hide=True)
    assert timer(timing.timed(call)) == (pytest.approx(launches * 2e-6), True)
    exposed = timing.CudaTimer(hide=False)
    assert exposed(timing.timed(call)) == (pytest.approx(launches * 82e-6, rel=0.03), False)


def test_a_call_that_waits_for_the_device_is_told_from_one_that_does_not(machine: Machine) -> None:
    def waiting() -> None:
        machine.launch(80e-6, 2e-6)
        machine.wait()
        machine.launch(80e-6, 2e-6)

    seconds, hidden = timing.CudaTimer(hide=True)(timing.timed(waiting))
    assert not hidden
    assert seconds == pytest.approx(84e-6)


def test_the_preparation_is_not_timed(machine: Machine) -> None:
    def prepared() -> object:
        machine.launch(1e-3, 5e-3)
        return lambda: machine.launch(80e-6, 2e-6)

    assert timing.CudaTimer(hide=True)(prepared) == (pytest.approx(2e-6), True)  # type: ignore[arg-type]
