"""The measured GPU world: PyTorch's caching allocator and, for the whole process, the NVIDIA driver."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from bench import nvml, text, weights
from bench.attention import attention_of
from bench.case import BenchCase
from bench.catalog import ModelSource, resolve
from bench.environment import environment
from bench.ledger import Ledger
from bench.methods import METHODS
from bench.record import Record
from bench.watch import WATCHED_STEPS, describe, register_resident, run_steps
from qzo.errors import QzoError

DEVICE = "cuda"
GRANULARITY = 512
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}


class CudaWorld:
    """Models on the current GPU; they are changed by the method in host memory and then moved."""

    def __init__(self, source: ModelSource, attention: str) -> None:
        self.source = source
        self.implementation = "eager" if attention == "eager" else "sdpa"
        self.parameters = 0

    def model(self, dtype: torch.dtype) -> PreTrainedModel:
        model = weights.load(self.source, dtype, self.implementation)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        return model

    def place(self, model: nn.Module) -> nn.Module:
        return model.to(DEVICE)

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(DEVICE, torch.bfloat16)

    def recomputing(self) -> AbstractContextManager:
        return nullcontext()


def run(case: BenchCase) -> Record:
    """Run one cell on the GPU: two steps under the ledger, the rest timed without it."""
    if not torch.cuda.is_available():
        raise QzoError("device 'cuda' needs an NVIDIA GPU that this PyTorch can use; choose --device sim or cpu")
    source = resolve(case.model)
    capability = torch.cuda.get_device_capability()
    attention = attention_of(case, source, flash=capability >= (8, 0))
    world = CudaWorld(source, attention)
    prepared = METHODS[case.method](case, world)
    others = nvml.foreign_processes()
    if others:
        prepared.notes.append(f"other processes on the GPU while measuring: {', '.join(map(str, others))}")
    ledger = Ledger(DEVICE, GRANULARITY)
    parts = register_resident(ledger, prepared)
    resident = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    batches = (_batch(source, case, step) for step in range(case.steps))
    with sdpa_kernel([BACKENDS.get(attention, SDPBackend.MATH), SDPBackend.MATH], set_priority=True):
        with ledger:
            losses = run_steps(ledger, prepared, [next(batches) for _ in range(WATCHED_STEPS)])
        peak = allocator_peak(resident)
        seconds = []
        for batch in batches:
            torch.cuda.synchronize()
            start = time.perf_counter()
            losses.append(prepared.step(batch, lambda phase: None))
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return describe(
        replace(case, attention=attention, gpu=torch.cuda.get_device_name()), "measured-cuda", environment(),
        prepared, ledger, parts, world.parameters, process=nvml.process_bytes(),
        step_seconds=statistics.median(seconds), losses=losses, **peak,
    )  # fmt: skip


def allocator_peak(resident: int) -> dict[str, Any]:
    """Peak allocated and reserved bytes since the statistics were reset, as the caching allocator counts them."""
    statistics_ = torch.cuda.memory_stats()
    return {
        "allocated": max(resident, int(statistics_["allocated_bytes.all.peak"])),
        "reserved": int(statistics_["reserved_bytes.all.peak"]),
    }


def _batch(source: ModelSource, case: BenchCase, step: int) -> text.Batch:
    batch = text.batch(source, case.batch_size, case.seq_len, case.seed, step)
    return replace(batch, input_ids=batch.input_ids.to(DEVICE), labels=batch.labels.to(DEVICE))
