"""Seconds of a step on a GPU, method by method, and what its kernels take: `python -m bench.gpu.seconds --out FILE`.

One process, nothing else on the GPU. For each model and method and each shape of a batch: a step that is not timed,
then steps until there are enough or the time for them is over, each ended by a synchronization. One further step is
profiled: kernels launched, their seconds together, and which took most. The file is written anew after each method.
`--add` keeps its rows of earlier sessions; every row has the number of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import qzo
from bench.cases.case import BenchCase
from bench.methods import METHODS
from bench.methods.prepared import Prepared
from bench.records.environment import environment
from bench.records.files import read_json, write_json
from bench.simulator.cuda.attention import attention_of
from bench.worlds.cuda import preferred
from bench.worlds.measured import MeasuredWorld, source_of
from qzo.kernels import asked, fused

FORWARDS = (
    "two forward passes"  # of the bf16 model, logits where a label is: what no method of two evaluations undercuts
)
BY_KERNELS = "qzo by kernels"  # qzo with those of qzo/kernels/fused.py, and z of Philox, which they draw
EVERY = (
    FORWARDS, "qzo", BY_KERNELS, "mezo", "mezo-reference", "lora", "qlora", "qzo-reference", "qzo-2bit", "qzo-full",
    "ft-sgd",
)  # fmt: skip
OF_13B = (FORWARDS, "qzo", BY_KERNELS, "mezo", "mezo-reference", "lora")
CELLS = {"llama2-7b": EVERY, "llama3.2-1b": EVERY, "llama2-13b": OF_13B}
SHAPES = ((1, 128), (16, 128), (1, 512))
STEPS, STEP_SECONDS = 9, 1.5  # at most so many timed steps of a shape, and none is started after so many seconds
SECONDS = 170
TOP = 12  # kernels told by name
Step = Callable[[Any], object]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, 1 if a method failed, 2 and one line on stderr for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.seconds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    parser.add_argument("--models", default=",".join(CELLS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--methods", help="comma-separated (default: those of CELLS)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="start no method after these (default: %(default)s)"
    )
    parser.add_argument(
        "--most-tokens",
        help="comma-separated, of products by codes: `qzo by kernels` once for each (default: qzo's own)",
    )
    parser.add_argument("--add", action="store_true", help="keep the rows of earlier sessions that the file holds")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    sessions, rows = _earlier(options.out) if options.add else ([], [])
    sessions.append(environment())
    limits = list(map(int, options.most_tokens.split(","))) if options.most_tokens else [None]
    for model in options.models.split(","):
        for method in options.methods.split(",") if options.methods else CELLS.get(model, EVERY):
            for most in limits if method == BY_KERNELS else [None]:
                if time.monotonic() > end:
                    print(f"{model} {method}: not measured, the time is over", file=sys.stderr, flush=True)
                    continue
                rows.append({"session": len(sessions), **_row(model, method, options.device, most)})
                print(json.dumps(rows[-1])[:400], file=sys.stderr, flush=True)
                write_json(options.out, {"sessions": sessions, "rows": rows})
    return int(any(row["status"] == "error" for row in rows))


def _earlier(file: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    found = read_json(file) if file.exists() else {"sessions": [], "rows": []}
    return found["sessions"], found["rows"]


def _row(model: str, method: str, device: str, most: int | None) -> dict[str, Any]:
    """One method on one model, by codes for up to so many tokens; what went wrong is its message."""
    row: dict[str, Any] = {"model": model, "method": method, "status": "ok", "message": None, "shapes": []}
    row |= {} if most is None else {"most_tokens": most}
    start = time.monotonic()
    try:
        with asked.by_triton(method == BY_KERNELS), nullcontext() if most is None else fused.most_tokens_of(most):
            _measure(row, device)
    except ImportError as error:
        row |= {"status": "unsupported", "message": f"{method} needs the package {error.name}"}
    except Exception as error:  # the others are still to be measured
        row["status"], row["message"] = "error", f"{type(error).__name__}: {error}".split("\n")[0]
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    row["seconds_in_all"] = round(time.monotonic() - start, 1)
    return row


def _measure(row: dict[str, Any], device: str) -> None:
    method = {FORWARDS: "mezo", BY_KERNELS: "qzo"}.get(row["method"], row["method"])
    noise = "philox" if row["method"] == BY_KERNELS else "generator"
    case = BenchCase(row["model"], method, device=device, noise=noise)
    source = source_of(case)
    capability = torch.cuda.get_device_capability() if device == "cuda" else None
    attention = attention_of(case, source, capability)
    world = MeasuredWorld(source, attention, device)
    start = time.monotonic()
    prepared = None if row["method"] == FORWARDS else METHODS[case.method](case, world)
    step = _steps(prepared) if prepared else _forwards(world)
    recipe = prepared.recipe if prepared else None
    _wait(device)
    row["loading_seconds"] = round(time.monotonic() - start, 2)
    for batch_size, seq_len in SHAPES:
        batch = world.here(world.batches(replace(case, batch_size=batch_size, seq_len=seq_len), recipe)[0])
        with preferred(capability, attention):
            row["shapes"].append(_timed(step, batch, device))
    with preferred(capability, attention):
        row["profile"] = _profiled(step, batch) if device == "cuda" else None


def _steps(prepared: Prepared) -> Step:
    return lambda batch: prepared.step(batch, lambda phase: None)


def _forwards(world: MeasuredWorld) -> Step:
    model = world.place(world.model(torch.bfloat16)).eval()

    @torch.no_grad()
    def twice(batch: Any) -> list[float]:
        return [float(qzo.label_loss(model, batch.input_ids, batch.labels, keep=1)) for _ in range(2)]

    return twice


def _timed(step: Step, batch: Any, device: str) -> dict[str, Any]:
    """Seconds of each step on this batch, and the highest memory of them."""
    step(batch)
    _wait(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    end = time.monotonic() + STEP_SECONDS
    while len(taken) < STEPS and (not taken or time.monotonic() < end):
        start = time.perf_counter()
        step(batch)
        _wait(device)
        taken.append(round(time.perf_counter() - start, 5))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else None
    batch_size, seq_len = batch.input_ids.shape
    return {
        "batch_size": batch_size, "seq_len": seq_len, "median": statistics.median(taken), "seconds": taken,
        "peak_allocated": peak,
    }  # fmt: skip


def _profiled(step: Step, batch: Any) -> dict[str, Any]:
    """Kernels of one step: launches, seconds on the GPU, and the longest by name; copies and fills count as kernels."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        step(batch)
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            kernels.setdefault(event.name()[:120], []).append(event.duration_ns() / 1e9)
    longest = sorted(kernels, key=lambda name: -sum(kernels[name]))[:TOP]
    return {
        "launches": sum(map(len, kernels.values())),
        "device_seconds": round(sum(map(sum, kernels.values())), 6),
        "top": [[name, len(kernels[name]), round(sum(kernels[name]), 6)] for name in longest],
    }


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
