"""From a command line to cells: which device each method runs on, and every check that can be made before any work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.cases import gpus, weights
from bench.cases.case import BenchCase, choose
from bench.cases.group_sizes import linear_widths
from bench.cases.methods import BY_NAME, METHODS, QUANTIZABLE
from bench.cases.models import ModelSource, build_empty, resolve
from bench.records.record import Record
from bench.simulator.cuda.attention import attention_of
from qzo.errors import QzoError

CPU_PARAMETERS = 1_000_000_000  # above this a step on a CPU takes minutes, and `auto` simulates
BYTES_PER_PARAMETER = 24  # of the largest method, full fine-tuning in fp32, with room for activations


def parse_methods(text: str | None) -> tuple[str, ...]:
    """Names separated by commas; None means `METHODS`, those of a default run."""
    if text is None:
        return METHODS
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise QzoError(f"methods={text!r} names no method; choose from {', '.join(METHODS)}")
    for name in names:
        choose("method", name, BY_NAME)
    return names


def cells(case: BenchCase, methods: Sequence[str]) -> tuple[ModelSource, list[BenchCase]]:
    """The source and one checked case for each method, `auto` resolved to sim, cpu, or (for later) cuda."""
    if case.quantization is not None and not set(QUANTIZABLE) & set(methods):
        raise QzoError(
            f"quantization={case.quantization!r} is for {' and '.join(QUANTIZABLE)}; add one of them to --methods"
        )
    source = resolve(case.model)
    device = automatic(source) if case.device == "auto" else case.device
    gpu = case.gpu or gpus.DEFAULT_GPU
    if gpu != gpus.CPU:
        gpus.get(gpu)
    elif device != "sim":
        raise QzoError(f"gpu={gpus.CPU!r} is nothing that device {device!r} has; add --device sim, or leave --gpu out")
    check(case, source)
    if device != "sim":
        weights.check(source)
    case = replace(case, device=device, gpu=gpu if device == "sim" else None)
    quantizations = dict.fromkeys(QUANTIZABLE, case.quantization)
    return source, [replace(case, method=method, quantization=quantizations.get(method)) for method in methods]


def automatic(source: ModelSource) -> str:
    """`sim` for an architecture alone; with weights `cuda` if there is a GPU, else `cpu` if the model is small."""
    if source.weights is None:
        return "sim"
    if torch.cuda.is_available():
        return "cuda"
    parameters = sum(parameter.numel() for parameter in build_empty(source, torch.bfloat16, "eager").parameters())
    import psutil

    memory = psutil.virtual_memory().available
    fits = parameters <= CPU_PARAMETERS and parameters * BYTES_PER_PARAMETER <= memory
    return "cpu" if isinstance(source.weights, Path) and fits else "sim"


def check(case: BenchCase, source: ModelSource) -> None:
    """Raise QzoError for what would make every cell fail."""
    simulated = case.device in ("auto", "sim") and case.gpu != gpus.CPU
    attention_of(case, source, gpus.get(case.gpu or gpus.DEFAULT_GPU).compute_capability if simulated else None)
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and case.seq_len > longest:
        raise QzoError(
            f"seq_len={case.seq_len} is more than the {longest} positions of {source.name}; give at most as many by "
            "--seq-len"
        )
    if case.group_size is not None:
        widths = sorted(linear_widths(build_empty(source, torch.bfloat16, "eager")))
        odd = [width for width in widths if width % case.group_size]
        if odd:
            common = math.gcd(*widths)
            wanted = case.group_size
            near = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - wanted))
            raise QzoError(
                f"in_features={odd[0]} of {source.name} is not divisible by group_size={case.group_size}; "
                f"choose {near}, or leave it out"
            )
    if case.device == "cuda" and not torch.cuda.is_available():
        raise QzoError("device 'cuda' needs an NVIDIA GPU that this PyTorch can use; choose sim or cpu")


def fitting(
    cases: Sequence[BenchCase], gpu: str, simulate: Callable[[list[BenchCase]], list[Record]]
) -> list[BenchCase]:
    """Of cases for the GPU at hand those that it can hold stay, the others become simulations of `gpu`."""
    predicted = simulate([replace(case, device="sim", gpu=gpu) for case in cases])
    capacity = torch.cuda.get_device_properties(0).total_memory
    needed = {record["case"]["method"]: record["peak"]["process"] for record in predicted}
    return [
        case if (needed.get(case.method) or capacity + 1) <= capacity
        else replace(case, device="sim", gpu=gpu)
        for case in cases
    ]  # fmt: skip
