"""What a card is: its context, bandwidth and speed: `python -m bench.gpu.facts --out FILE`."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.records import nvml
from bench.records.environment import environment
from bench.records.files import write_json

COPIED_BYTES = 4 << 30
PRODUCT_SIZE = 8192
REPEATS = 10
LAUNCHES = 2000


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.facts", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    found = {"environment": environment()} | (card() if options.device == "cuda" else {})
    print(found)
    write_json(options.out, found)
    return 0


def card() -> dict[str, Any]:
    """Bytes of a process before and after its first kernels, bytes a second of a copy (read and written), and so on."""
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
    properties = torch.cuda.get_device_properties()
    torch.cuda.init()
    torch.cuda.synchronize()
    empty = nvml.process_bytes(uuid)
    small = torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    one_kernel = nvml.process_bytes(uuid)
    reserved = torch.cuda.memory_reserved()
    halves = torch.empty(2, COPIED_BYTES, dtype=torch.uint8, device="cuda").random_()
    copy = seconds(lambda: halves[0].copy_(halves[1]))
    left, right = (torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = seconds(lambda: left @ right)

    def launches() -> None:
        for _ in range(LAUNCHES):
            small.add_(0)

    launch = seconds(launches) / LAUNCHES
    return {
        "name": properties.name, "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count, "threads": properties.max_threads_per_multi_processor,
        "compute_capability": [properties.major, properties.minor], "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(), "context_bytes": empty, "context_and_one_kernel_bytes": one_kernel,
        "reserved_then_bytes": reserved, "copy_bytes_a_second": 2 * COPIED_BYTES / copy,
        "bf16_operations_a_second": 2 * PRODUCT_SIZE**3 / product, "seconds_a_launch": launch,
        "other_processes": nvml.foreign_processes(uuid), "noise": noise(),
    }  # fmt: skip


def noise() -> dict[str, Any]:
    """Up to how many elements `normal_` gives the same numbers whatever their number: a power of two."""

    def drawn(count: int) -> torch.Tensor:
        return torch.empty(count, device="cuda").normal_(generator=torch.Generator("cuda").manual_seed(0))

    longest, many = 0, drawn(1 << 22)
    for exponent in range(4, 23):
        if torch.equal(drawn(1 << exponent), many[: 1 << exponent]):
            longest = 1 << exponent
    return {"same_prefix_elements": longest, "first": many[:4].tolist()}


def seconds(action: Callable[[], object]) -> float:
    """Median of some runs, each ended by a synchronization, after two that do not count."""
    taken = []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


if __name__ == "__main__":
    sys.exit(main())
