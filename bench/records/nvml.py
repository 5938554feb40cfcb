"""What the NVIDIA driver says of a GPU: bytes of a process, and who else is on the card. None where it cannot say."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def _ask(question: Callable[[Any], T]) -> T | None:
    """The driver's answer, or None where there is no driver or it will not tell (containers hide processes)."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return question(pynvml)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Version of the NVIDIA driver."""
    return _ask(lambda pynvml: str(pynvml.nvmlSystemGetDriverVersion()))


def processes(uuid: str | None = None) -> dict[int, int | None] | None:
    """Process id -> bytes on the card (None where hidden), of all processes that the driver shows.

    The card goes by its UUID: CUDA's numbers change with CUDA_VISIBLE_DEVICES, the driver's do not. None is the first.
    """

    def question(pynvml: Any) -> dict[int, int | None]:
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid) if uuid else pynvml.nvmlDeviceGetHandleByIndex(0)
        return {entry.pid: entry.usedGpuMemory for entry in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}

    return _ask(question)


def process_bytes(uuid: str | None = None, pid: int | None = None) -> int | None:
    """Bytes that this process holds on the card, CUDA context included; None where NVML cannot say, never 0."""
    found = processes(uuid)
    return (found.get(pid or os.getpid()) or None) if found is not None else None


def foreign_processes(uuid: str | None = None, pid: int | None = None) -> list[int]:
    """Ids of other processes on the card, which make process bytes doubtful.

    Call it when this process has a CUDA context. In a container the driver may show this process under an id that is
    not its own; then one of the unknown ids is taken for it.
    """
    found = processes(uuid) or {}
    own = pid or os.getpid()
    others = sorted(set(found) - {own})
    return others if own in found else others[1:]
