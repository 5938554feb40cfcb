"""GPUs that the simulator can stand for: memory, architecture, and the CUDA context of a PyTorch process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.cases.case import choose

MIB = 1 << 20
DEFAULT_GPU = "rtx-4090"  # the card the paper measured its zeroth-order rows on
CPU = "cpu"  # stands in a GPU's place for a step on the CPU

# A context is what the driver takes, the local memory that it sets aside for every thread the GPU can hold at once, and
# the kernels that were loaded. Before the first kernel a T4 (40 x 1,024 threads) has 104.875 MiB and an RTX 6000 Ada
# (142 x 1,536 threads; PyTorch 2.10, CUDA 13.0) 426 MiB, as reported in
# https://github.com/unslothai/unsloth-zoo/pull/1053: 30.6 MiB and 1.856 KiB a thread. An H100 (132 x 2,048 threads)
# has 518 MiB (reports/measurements), where that line says 521.
DRIVER_MIB = 30.6
THREAD_KIB = 1.856
# Kernels are loaded when they first run, and are larger for newer cards: training loads 36 MiB on a T4 and 240 on an
# H100, forward passes alone 168 on an H100; of a T4 nobody knows, and the same share of 36 is taken. What was not
# measured lies between the two.
TRAINING, FORWARD = "training", "forward"
KERNELS_MIB = {TRAINING: (36, 240), FORWARD: (25, 168)}
Range = tuple[int, int]


@dataclass(frozen=True)
class Gpu:
    """One card. All sizes in bytes.

    `contexts`: what a PyTorch process takes outside its allocator, the lowest and the highest it may be (equal where it
    was measured), when it runs backward passes and when it runs forward passes alone.
    `driver_reserved_bytes`: what the driver keeps for itself of a card that nobody uses; 0 where nobody told.
    """

    name: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    multiprocessors: int
    contexts: Mapping[str, Range]
    driver_reserved_bytes: int = 0

    def context_bytes(self, backward: bool = True) -> int:
        """The middle of the range; the measured value where there is one."""
        return sum(self._range(backward)) // 2

    def context_note(self, backward: bool = True) -> str | None:
        """One sentence for the record when the context is a range and not a measurement."""
        low, high = self._range(backward)
        if low == high:
            return None
        return (
            f"CUDA context of {self.name} not measured: {low // MIB} to {high // MIB} MiB, process bytes use the middle"
        )

    def _range(self, backward: bool) -> Range:
        return self.contexts[TRAINING if backward else FORWARD]


@cache
def _table() -> dict[str, Gpu]:
    raw = json.loads(Path(__file__).with_name("gpus.json").read_text(encoding="utf-8-sig"))
    return {name: _gpu(name, entry) for name, entry in raw.items() if not name.startswith("_")}


def _gpu(name: str, entry: dict) -> Gpu:
    started = DRIVER_MIB + entry["multiprocessors"] * entry["threads"] * THREAD_KIB / 1024
    measured = entry.get("context_mib", {})
    contexts = {kind: (started + low, started + high) for kind, (low, high) in KERNELS_MIB.items()}
    contexts |= {kind: (mib, mib) for kind, mib in measured.items()}
    if FORWARD not in measured and TRAINING in measured:  # no more than with backward, and what every process has
        contexts[FORWARD] = (min(started, measured[TRAINING]), measured[TRAINING])
    in_bytes = {kind: (int(low * MIB), int(high * MIB)) for kind, (low, high) in contexts.items()}
    capability = (entry["compute_capability"][0], entry["compute_capability"][1])
    reserved = entry.get("driver_reserved_mib", 0) * MIB
    return Gpu(name, entry["memory_mib"] * MIB, capability, entry["multiprocessors"], in_bytes, reserved)


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
