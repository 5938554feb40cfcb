"""What the driver tells, told by a stand-in driver."""

import sys
from types import SimpleNamespace

import pytest

from bench.records import nvml


class NVMLError(Exception):
    pass


def driver(processes: dict[int, int | None] | Exception) -> SimpleNamespace:
    def running(handle: object) -> list[SimpleNamespace]:
        if isinstance(processes, Exception):
            raise processes
        return [SimpleNamespace(pid=pid, usedGpuMemory=nbytes) for pid, nbytes in processes.items()]

    return SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses=running,
    )


def test_without_a_driver_everything_is_unknown_and_nothing_is_zero(monkeypatch):
    def fail() -> None:
        raise NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(NVMLError=NVMLError, nvmlInit=fail))
    assert nvml.driver_version() is None
    assert nvml.process_bytes() is None
    assert nvml.foreign_processes() == []


def test_without_the_package_everything_is_unknown(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert nvml.driver_version() is None
    assert nvml.process_bytes() is None


def test_own_bytes_and_foreign_processes(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", driver({7: 500, 8: 900, 9: 100}))
    assert nvml.driver_version() == "580.1"
    assert nvml.process_bytes(pid=7) == 500
    assert nvml.foreign_processes(pid=7) == [8, 9]


@pytest.mark.parametrize("hidden", [{7: None}, {7: 0}, {}, NVMLError("no permission")])
def test_hidden_bytes_are_none(monkeypatch, hidden):
    monkeypatch.setitem(sys.modules, "pynvml", driver(hidden))
    assert nvml.process_bytes(pid=7) is None


def test_in_a_container_one_unknown_process_is_this_one(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", driver({4321: 500}))
    assert nvml.foreign_processes(pid=7) == []
    monkeypatch.setitem(sys.modules, "pynvml", driver({4321: 500, 5000: 1}))
    assert len(nvml.foreign_processes(pid=7)) == 1


def test_a_card_is_asked_for_by_its_uuid(monkeypatch):
    asked = []
    fake = driver({7: 500})
    fake.nvmlDeviceGetHandleByUUID = asked.append
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert nvml.process_bytes("GPU-123", pid=7) == 500
    assert asked == ["GPU-123"]
