"""Kernels in Triton beside PyTorch's operators, cuBLAS and the memory limit: `python -m bench.gpu.kernels --out FILE`.

For each format, the shapes of 7B and 13B layers, and numbers of tokens: seconds of y = x Wᵀ by a dense 16-bit weight,
by the layer's operators, by a weight that one launch rebuilds, by the codes themselves, and of both sides of a step at
once; how far each is from the operators; and `limit`, seconds for which the card's memory is busy with codes, scales, x
and y at the bandwidth of a copy. `tokens` says of each format up to how many its codes are faster than the rebuilt
weight on every shape: what `TOKENS` of qzo/kernels/fused.py is to be. The file is written anew after each shape.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.gpu.layers import FORMATS, Layer
from bench.records.environment import environment
from bench.records.files import write_json
from qzo.kernels import asked, fused
from qzo.kernels.philox import Stream

DTYPE = torch.bfloat16
SHAPES = ((4096, 4096), (11008, 4096), (5120, 13824))  # N, K
TOKENS = (1, 16, 32, 64, 128, 512)
REPEATS = 10
SECONDS = 85
FLUSHED_BYTES = 256 << 20  # written before each run, more than the cache of any card holds
EPS = 1e-3
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write; 0, or 1 if a kernel failed or gave other weights than the operators."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu is for a dry run")
    parser.add_argument("--formats", default=",".join(FORMATS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="start no shape after these (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    bandwidth = copied_bytes_a_second(options.device)
    rows: list[Row] = []
    for name in options.formats.split(","):
        for shape in SHAPES:
            if time.monotonic() > end:
                print(f"{name} {shape}: not measured, the time is over", file=sys.stderr, flush=True)
                continue
            row: Row = {"format": name, "shape": list(shape), "status": "ok", "message": None, "tokens": []}
            try:
                measure(row, options.device, bandwidth)
            except Exception as error:  # the others are still to be measured
                row |= {"status": "error", "message": f"{type(error).__name__}: {error}".split("\n")[0]}
            rows.append(row)
            print(json.dumps(row)[:300], file=sys.stderr, flush=True)
            found = {"environment": environment(), "copy_bytes_a_second": bandwidth, "tokens": crossings(rows)}
            write_json(options.out, found | {"rows": rows})
    return int(any(row["status"] == "error" or row.get("same_bits") is False for row in rows))


@torch.no_grad()
def measure(row: Row, device: str, bandwidth: float) -> None:
    """Fill in one format and shape."""
    rows, depth = row["shape"]
    layer = FORMATS[row["format"]]((rows, depth), torch.device(device))
    packed = layer.packed()
    assert packed is not None
    dense = layer.dequantize(DTYPE)
    runs_kernels = device in asked.DEVICES
    if runs_kernels:
        ours = fused.rebuild(packed, 0, rows, DTYPE)
        row["same_bits"] = torch.equal(ours, dense)
        row["rebuild_seconds"] = seconds(partial(fused.rebuild, packed, 0, rows, DTYPE), device)
        row["rebuild_limit"] = (weight_bytes(layer) + dense.nbytes) / bandwidth
        del ours
    for tokens in TOKENS:
        x = torch.randn(tokens, depth, device=device).to(DTYPE)
        ways: dict[str, Callable[[], Tensor]] = {
            "dense": partial(torch.mm, x, dense.t()),
            "operators": partial(by_operators, layer, x),
        }
        if runs_kernels:
            ways |= kernels(layer, x)
        expected = ways["operators"]().float()
        row["tokens"].append(
            {
                "tokens": tokens,
                "seconds": {name: seconds(way, device) for name, way in ways.items()},
                "far": {name: far(way().float(), expected) for name, way in ways.items() if name != "operators"},
                "limit": (weight_bytes(layer) + x.nbytes + 2 * tokens * rows) / bandwidth,
            }
        )


def by_operators(layer: Layer, x: Tensor) -> Tensor:
    """The layer's product without kernels."""
    with asked.by_triton(False):
        return layer(x)


def kernels(layer: Layer, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Ways to compute a product, by name; `both` has two of them, and gives that by + EPS, with scales of d = 0."""
    packed = layer.packed()
    assert packed is not None
    masters, stream = torch.empty(packed.scales.shape, device=x.device).copy_(packed.scales), Stream(0, 0, 0, 0)

    def product(most: int) -> Tensor:
        with fused.most_tokens_of(most):
            return fused.multiply(packed, x)

    def both() -> Tensor:
        return fused.multiply_both(packed, (x, x), masters, stream, EPS, "binomial", relative=True)[0]

    return {"rebuilt": partial(product, 0), "codes": partial(product, len(x)), "both": both}


def weight_bytes(layer: Layer) -> int:
    """Codes, scales, zero points: what a product cannot do without."""
    return sum({buffer.untyped_storage().data_ptr(): buffer.nbytes for buffer in layer.buffers()}.values())


def far(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; `both` is as far as its scales are moved."""
    return float((found - expected).norm() / expected.norm())


def crossings(rows: Sequence[Row]) -> dict[str, int]:
    """Format -> tokens up to which its codes are no slower than the rebuilt weight, on every shape; 0 for none."""
    found: dict[str, int] = {}
    for row in rows:
        timed = [entry for entry in row["tokens"] if "codes" in entry["seconds"]]
        if not timed:
            continue
        faster = 0
        for entry in timed:
            if entry["seconds"]["codes"] > entry["seconds"]["rebuilt"]:
                break
            faster = entry["tokens"]
        found[row["format"]] = min(found.get(row["format"], faster), faster)
    return found


def copied_bytes_a_second(device: str) -> float:
    """Read and written, of a buffer that no cache holds."""
    size = FLUSHED_BYTES if device == "cuda" else 1 << 20
    first, second = torch.empty(2, size, dtype=torch.uint8, device=device)
    return 2 * size / seconds(lambda: first.copy_(second), device)


def seconds(action: Callable[[], object], device: str) -> float:
    """Median of some runs after one that compiles, each with nothing of its inputs in the cache."""
    action()
    if device == "cpu":
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for begun, ended in pairs:
        flushed.zero_()
        begun.record()
        action()
        ended.record()
    torch.cuda.synchronize()
    return median(begun.elapsed_time(ended) for begun, ended in pairs) / 1e3


if __name__ == "__main__":
    sys.exit(main())
