"""The measured CPU world: real weights and real text where there are any, PyTorch's allocation events, peak RSS."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from bench.cases import text
from bench.cases.case import BenchCase
from bench.ledger.events import MARK, rises
from bench.ledger.ledger import Ledger
from bench.methods import METHODS
from bench.methods.prepared import Enter, Prepared, Step
from bench.records.environment import environment
from bench.records.record import Record
from bench.simulator.cpu.gemm import NOTE, fast_bf16, needs_blocks
from bench.simulator.cuda.attention import attention_of
from bench.simulator.shared import collector_off
from bench.worlds.measured import MeasuredWorld, origin_notes, source_of
from bench.worlds.watch import WATCHED_STEPS, assign_batches, describe, register_resident, run_steps

INSIDE = "unattributed is what kernels take inside themselves, as oneDNN does to pack the operands of bf16 products"


def run(case: BenchCase) -> Record:
    """Run one cell: first the steps that are timed and whose peak RSS counts, then two under the profiler, and two more
    under the ledger.
    """
    source = source_of(case)
    attention = attention_of(case, source)
    world = MeasuredWorld(source, attention, "cpu")
    prepared = METHODS[case.method](case, world)
    ledger = Ledger("cpu")
    parts = register_resident(ledger, prepared)
    batches = world.batches(case, prepared.recipe)
    unwatched = len(batches) - WATCHED_STEPS
    reset_peak_rss()
    losses, seconds = _timed(prepared, batches[:unwatched])
    process = peak_rss()  # before the profiler, whose records would be the larger part of it
    ledger.enter("forward" if case.first_order else "perturb")  # what the first steps left behind is no part of loading
    register_resident(ledger, prepared)  # bitsandbytes casts its biases when it first runs
    watched, phases = watch_steps(prepared, ledger, batches[unwatched:])
    losses += watched
    prepared.notes += origin_notes(case, batches)
    prepared.notes += [NOTE] if needs_blocks() else []
    record = describe(
        replace(case, attention=attention), "measured-cpu", environment(), prepared, ledger, parts, world.parameters,
        allocated=max(phases.values()), phases=ledger.phase_peaks() | phases, process=process,
        step_seconds=statistics.median(seconds), losses=losses,
    )  # fmt: skip
    record["notes"] += [INSIDE] if record["at_peak"]["unattributed"] else []
    return record


def _timed(prepared: Prepared, batches: list[text.Batch]) -> tuple[list[float], list[float]]:
    """Losses and seconds of steps that nobody watches."""
    losses, seconds = [], []
    with fast_bf16():
        for batch in batches:
            start = time.perf_counter()
            losses.append(prepared.step(batch, lambda phase: None))
            seconds.append(time.perf_counter() - start)
    return losses, seconds


def watch_steps(prepared: Prepared, ledger: Ledger, batches: list[text.Batch]) -> tuple[list[float], dict[str, int]]:
    """Losses of steps, and the peak of each of their phases by PyTorch's own allocation events; then the same batches
    once more under the ledger, which says what the bytes are (bench/ledger/accumulation.py: it must not watch the
    steps that count).
    """
    ledger.assign("optimizer", prepared.optimizer_tensors())
    assign_batches(ledger, batches)
    resident = ledger.live_bytes()
    step = marked(prepared.step)
    gc.collect()  # what was left in cycles would be freed while the steps run, and be taken off their bytes
    recorded = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with collector_off(), recorded as profiler, fast_bf16():
        losses = [step(batch, lambda phase: None) for batch in batches]
    with ledger, fast_bf16():
        run_steps(ledger, prepared, batches)
    seen = ledger.phase_peaks()
    return losses, {name: max(resident + rise, seen[name]) for name, rise in rises(profiler).items() if name}


def marked(step: Step) -> Step:
    """The step, which lets a profiler know too where its phases begin."""

    def enter_both(enter: Enter, phase: str) -> None:
        enter(phase)
        with record_function(MARK + phase):
            pass

    return lambda batch, enter: step(batch, partial(enter_both, enter))


def reset_peak_rss() -> None:
    """Let the kernel count the process's peak from here on (Linux; elsewhere the peak includes loading)."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5", encoding="ascii")


def peak_rss() -> int:
    """Highest resident set size in bytes since `reset_peak_rss`."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    return int(psutil.Process().memory_info().rss)
