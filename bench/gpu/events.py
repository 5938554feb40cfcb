"""What the allocator did in one step, event by event: `python -m bench.gpu.events --out FILE`.

Of a steady step of each cell, each cell in a process of its own: bytes asked for and given back, phase by phase, as
PyTorch's own history of the caching allocator has them, a release as a negative number; and, of the step after it, what
the ledger saw, rounded up as the allocator rounds. `simulated` has the events of the simulated step.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.cases import gpus
from bench.cases.case import BenchCase
from bench.cases.models import resolve
from bench.ledger.ledger import Ledger
from bench.methods import METHODS
from bench.methods.prepared import Prepared
from bench.records.files import write_json
from bench.simulator.allocator.replay import ROUND_BYTES
from bench.simulator.cuda.attention import attention_of
from bench.simulator.cuda.kernels import CudaFunctions, rules
from bench.simulator.shared import number_of_experts
from bench.worlds.batches import steps_of, without_data
from bench.worlds.cuda import preferred
from bench.worlds.measured import MeasuredWorld, source_of
from bench.worlds.sim import SimWorld
from bench.worlds.watch import assign_batches, register_resident, run_steps

CELLS = (
    *(("opt-125m", method) for method in ("qzo", "mezo", "lora", "qlora", "ft-bf16", "ft-amp", "qzo-2bit", "qzo-full")),
    *(("llama3.2-1b", method) for method in ("qzo", "mezo", "lora", "qlora", "ft-mixed")),
    ("llama2-7b", "qzo"),
)
SEQ_LEN = 512
PROCESSES = 6
MAX_ENTRIES = 1_000_000
Events = list[tuple[str, list[int]]]  # (phase, bytes asked for, or with a minus given back)
SIGNS = {"alloc": 1, "free_requested": -1, "free": -1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, or 1 if a cell failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.events", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu, without an allocator, is for a dry run"
    )
    parser.add_argument("--cells", nargs="*", metavar="MODEL:METHOD", help="in place of CELLS")
    parser.add_argument("--cell", nargs=2, metavar=("MODEL", "METHOD"), help="this one, here, as JSON on stdout")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.cell:
        model, method = options.cell
        print(json.dumps(events(BenchCase(model, method, options.device, seq_len=SEQ_LEN))))
        return 0
    cells = [tuple(cell.rsplit(":", 1)) for cell in options.cells] if options.cells else CELLS
    found: list[dict[str, Any]] = []
    with ThreadPoolExecutor(PROCESSES if options.device == "cuda" else 1) as pool:
        for cell in pool.map(partial(_in_a_process, options.device), cells):
            found.append(cell)
            write_json(options.out, {"seq_len": SEQ_LEN, "cells": found})
    return int(any("message" in cell for cell in found))


def _in_a_process(device: str, cell: tuple[str, str]) -> dict[str, Any]:
    model, method = cell
    command = [sys.executable, "-m", "bench.gpu.events", "--device", device, "--cell", model, method]
    ran = subprocess.run(command, capture_output=True, text=True)
    about = {"model": model, "method": method}
    if ran.returncode:
        message = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        print(f"{model} {method}: {message}", file=sys.stderr, flush=True)
        return about | {"message": message}
    return about | json.loads(ran.stdout)


def events(case: BenchCase) -> dict[str, Any]:
    """Phase by phase the allocator's and the ledger's events of a steady step."""
    source = source_of(case)
    on_gpu = case.device == "cuda"
    capability = torch.cuda.get_device_capability() if on_gpu else None
    attention = attention_of(case, source, capability)
    world = MeasuredWorld(source, attention, case.device)
    prepared = METHODS[case.method](case, world)
    batches = [world.here(batch) for batch in world.batches(replace(case, steps=4), prepared.recipe)]
    ledger = Ledger(case.device, ROUND_BYTES)
    with preferred(capability, attention):
        for batch in batches[:2]:
            prepared.step(batch, lambda phase: None)
        allocator = _history(prepared, batches[2]) if on_gpu else []
        register_resident(ledger, prepared)
        first = len(ledger.events)
        with ledger:
            run_steps(ledger, prepared, batches[3:])
    seen: dict[str, list[int]] = {}
    for event in ledger.events[first:]:
        seen.setdefault(ledger.phases[event.phase], []).append(event.sign * event.block.nbytes)
    return {"dtype": prepared.dtype, "allocator": allocator, "ledger": seen}


def simulated(case: BenchCase) -> Events:
    """The events of the second step, as `bench.worlds.sim` has them."""
    source, gpu = resolve(case.model), gpus.get(case.gpu or gpus.DEFAULT_GPU)
    attention = attention_of(case, source, gpu.compute_capability)
    functions = partial(CudaFunctions, attention, gpu.compute_capability)
    world = SimWorld(source, attention, functions)
    prepared = METHODS[case.method](case, world)
    ledger = Ledger("meta", ROUND_BYTES, rules(gpu, number_of_experts(source.config)))
    register_resident(ledger, prepared)
    (batch,) = without_data(steps_of(case, prepared.recipe, 1), prepared.recipe, "meta")
    assign_batches(ledger, [batch])
    with ledger, functions():
        run_steps(ledger, prepared, [batch])
        first = len(ledger.events)
        run_steps(ledger, prepared, [batch])
    found: Events = []
    current = None
    for event in ledger.events[first:]:
        if event.phase != current:
            current = event.phase
            found.append((ledger.phases[current], []))
        found[-1][1].append(event.sign * event.block.nbytes)
    return found


def _history(prepared: Prepared, batch: Any) -> Events:
    """(phase, its events in order) of one step, by the allocator's own history."""
    torch.cuda.memory._record_memory_history(max_entries=MAX_ENTRIES, context=None)
    begun: list[tuple[str, int]] = []

    def enter(phase: str) -> None:
        begun.append((phase, len(_trace())))

    prepared.step(batch, enter)
    trace = _trace()
    torch.cuda.memory._record_memory_history(enabled=None)
    ends = [*(start for _, start in begun[1:]), len(trace)]
    return [
        (phase, [SIGNS[action] * size for action, size in trace[start:end] if action in SIGNS])
        for (phase, start), end in zip(begun, ends, strict=True)
    ]


def _trace() -> list[tuple[str, int]]:
    snapshot = torch.cuda.memory._snapshot()
    return [(entry["action"], entry["size"]) for entry in snapshot["device_traces"][torch.cuda.current_device()]]


if __name__ == "__main__":
    sys.exit(main())
