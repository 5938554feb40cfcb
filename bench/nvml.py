"""What the NVIDIA driver says of a GPU: bytes of a process, and who else is on the card. None where it cannot say."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pynvml

T = TypeVar("T")


def _ask(question: Callable[[], T]) -> T | None:
    """The driver's answer, or None where there is no driver or it will not tell (containers hide processes)."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return question()
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Version of the NVIDIA driver."""
    return _ask(lambda: str(pynvml.nvmlSystemGetDriverVersion()))


def processes(device: int = 0) -> dict[int, int | None] | None:
    """Process id -> bytes on the card (None where hidden), of all processes that the driver shows."""

    def question() -> dict[int, int | None]:
        handle = pynvml.nvmlDeviceGetHandleByIndex(device)
        return {entry.pid: entry.usedGpuMemory for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}

    return _ask(question)


def process_bytes(device: int = 0, pid: int | None = None) -> int | None:
    """Bytes that this process holds on the card, CUDA context included; None where NVML cannot say, never 0."""
    found = processes(device)
    return (found.get(pid or os.getpid()) or None) if found is not None else None


def foreign_processes(device: int = 0) -> list[int]:
    """Ids of other processes on the card; they make process and reserved bytes doubtful."""
    return sorted(set(processes(device) or {}) - {os.getpid()})


def device_bytes(device: int = 0) -> tuple[int, int] | None:
    """(used, total) bytes of the card."""

    def question() -> tuple[int, int]:
        info: Any = pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(device))
        return int(info.used), int(info.total)

    return _ask(question)
