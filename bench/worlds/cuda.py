"""The measured GPU world: PyTorch's caching allocator and, for the whole process, the NVIDIA driver."""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.cases.case import BenchCase
from bench.cases.text import Batch
from bench.ledger.ledger import Ledger
from bench.methods import METHODS
from bench.methods.prepared import Prepared
from bench.records import nvml
from bench.records.environment import environment
from bench.records.record import Record
from bench.simulator.allocator.replay import ROUND_BYTES
from bench.simulator.cuda.attention import Capability, attention_of, preference
from bench.worlds.measured import MeasuredWorld, origin_notes, source_of
from bench.worlds.watch import WATCHED_STEPS, describe, register_resident, run_steps
from qzo.errors import QzoError

DEVICE = "cuda"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip


def run(case: BenchCase) -> Record:
    """Run one cell on the GPU: two steps whose peaks count, the rest timed, at last two under the ledger."""
    if not torch.cuda.is_available():
        raise QzoError("device 'cuda' needs an NVIDIA GPU that this PyTorch can use; choose --device sim or cpu")
    source = source_of(case)
    capability = torch.cuda.get_device_capability()
    attention = attention_of(case, source, capability)
    world = MeasuredWorld(source, attention, DEVICE)
    prepared = METHODS[case.method](case, world)
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
    others = set(nvml.foreign_processes(uuid))
    ledger = Ledger(DEVICE, ROUND_BYTES)
    parts = register_resident(ledger, prepared)
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # of products while the model was quantized
    torch.cuda.empty_cache()  # what loading left behind is no part of the steps
    meter = Meter()
    batches = world.batches(case, prepared.recipe)
    prepared.notes += origin_notes(case, batches)
    with preferred(capability, attention):
        # not under the ledger, where autograd would add gradients out of place (bench/ledger/accumulation.py)
        losses = [meter.step(prepared, batch) for batch in map(world.here, batches[:WATCHED_STEPS])]
        phases, reserved = meter.read()
        process = nvml.process_bytes(uuid)
        seconds = []
        for batch in map(world.here, batches[WATCHED_STEPS:]):
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(prepared.step(batch, lambda phase: None))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        further = torch.cuda.memory_reserved() - reserved
        ledger.assign("optimizer", prepared.optimizer_tensors())
        with ledger:
            run_steps(ledger, prepared, map(world.here, batches[:WATCHED_STEPS]))
    others |= set(nvml.foreign_processes(uuid))
    if further > 0:
        prepared.notes.append(f"the steps after those that count reserved {further:,} bytes more")
    if others:
        prepared.notes.append("other processes were on the GPU: not timed")
    return describe(
        replace(case, attention=attention, gpu=torch.cuda.get_device_name()), "measured-cuda", environment(),
        prepared, ledger, parts, world.parameters, allocated=max(phases.values()), phases=phases, reserved=reserved,
        process=process, step_seconds=None if others else statistics.median(seconds), losses=losses,
    )  # fmt: skip


class Meter:
    """The caching allocator's own peaks, phase by phase, from when it is made; allocations need no synchronization."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.phase: str | None = None
        self.reserved = 0
        torch.cuda.reset_peak_memory_stats()

    def step(self, prepared: Prepared, batch: Batch) -> float:
        """The loss of a step whose phases are read as they end."""
        return prepared.step(batch, self._enter)

    def _enter(self, phase: str) -> None:
        self._end()
        self.phase = phase

    def read(self) -> tuple[dict[str, int], int]:
        """Phase -> the most bytes allocated while it was current, and the most bytes reserved at any time."""
        self._end()
        return self.phases, self.reserved

    def _end(self) -> None:
        statistics_ = torch.cuda.memory_stats()
        self.reserved = max(self.reserved, int(statistics_["reserved_bytes.all.peak"]))
        if self.phase is not None:
            peak = int(statistics_["allocated_bytes.all.peak"])
            self.phases[self.phase] = max(self.phases.get(self.phase, 0), peak)
        torch.cuda.reset_peak_memory_stats()


def preferred(capability: Capability | None, attention: str) -> AbstractContextManager:
    """Within it scaled_dot_product_attention tries its kernels in PyTorch's order, `attention` before all others.

    Without a capability, which is a CPU's, nothing changes.
    """
    if capability is None:
        return nullcontext()
    order = preference(capability, None if attention == "eager" else attention)
    return sdpa_kernel([BACKENDS[kernel] for kernel in order], set_priority=True)
