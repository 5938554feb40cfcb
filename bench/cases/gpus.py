"""GPUs that the simulator can stand for: memory, architecture, and the CUDA context of a PyTorch process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.cases.case import choose

MIB = 1 << 20
DEFAULT_GPU = "rtx-4090"  # the card the paper measured its zeroth-order rows on
CPU = "cpu"  # stands in a GPU's place for a step on the CPU

# A context is what the driver takes, the local memory that it sets aside for every thread the GPU can hold at once, and
# the kernels that were loaded. Where nothing was measured it is estimated. Before the first kernel a T4 (40 x 1,024
# threads) has 104.875 MiB and an RTX 6000 Ada (142 x 1,536 threads; PyTorch 2.10, CUDA 13.0) 426 MiB, as reported in
# https://github.com/unslothai/unsloth-zoo/pull/1053: 30.6 MiB and 1.856 KiB a thread. Training loaded 36 MiB of kernels
# on the T4. Two cards make no statistics, so a range is given, a fifth to either side.
DRIVER_MIB = 30.6
THREAD_KIB = 1.856
KERNELS_MIB = 36
UNCERTAINTY = 0.2


@dataclass(frozen=True)
class Gpu:
    """One card. All sizes in bytes."""

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    multiprocessors: int
    context_low_bytes: int
    context_high_bytes: int

    @property
    def context_bytes(self) -> int:
        """The middle of the range; the measured value where there is one."""
        return (self.context_low_bytes + self.context_high_bytes) // 2

    @property
    def context_note(self) -> str | None:
        """One sentence for the record when the context is a range and not a measurement."""
        if self.context_low_bytes == self.context_high_bytes:
            return None
        low, high = self.context_low_bytes // MIB, self.context_high_bytes // MIB
        return f"CUDA context of {self.name} not measured: {low} to {high} MiB, process bytes use the middle"


@cache
def _table() -> dict[str, Gpu]:
    raw = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8"))
    return {name: _gpu(name, entry) for name, entry in raw.items() if not name.startswith("_")}


def _gpu(name: str, entry: dict) -> Gpu:
    threads = entry["multiprocessors"] * entry["threads"]
    estimate = DRIVER_MIB + KERNELS_MIB + threads * THREAD_KIB / 1024
    low, high = entry.get("context_mib", (estimate * (1 - UNCERTAINTY), estimate * (1 + UNCERTAINTY)))
    capability = (entry["compute_capability"][0], entry["compute_capability"][1])
    return Gpu(name, entry["memory_mib"] * MIB, capability, entry["multiprocessors"], int(low * MIB), int(high * MIB))


def names() -> list[str]:
    """All known GPUs, smallest memory first."""
    return sorted(_table(), key=lambda name: (_table()[name].memory_bytes, name))


def find(device_name: str) -> Gpu:
    """The GPU that CUDA calls `device_name`: "Tesla T4" is t4, "NVIDIA H100 80GB HBM3" is h100-80gb."""
    words = set(device_name.lower().replace("-", " ").split())
    known = [name for name in names() if set(name.split("-")) <= words]
    if not known:
        return get(device_name)
    return get(max(known, key=len))


def get(name: str) -> Gpu:
    """The GPU of that name; an unknown one raises with the nearest names."""
    return _table()[choose("GPU", name, names(), "python -m bench list gpus")]
