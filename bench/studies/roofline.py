"""Launches and bytes of a step, counted on tensors without data: `python -m bench.studies.roofline --out FILE`.

Every operator that PyTorch dispatches is one launch that reads its inputs and writes its outputs once, views and
allocations none; so is each launch of a kernel in Triton, whose bytes are codes, scales, x, y and what it rebuilds.
Products with the codes are counted where they read them once, which is up to 64 tokens. Ways by kernels take z of
Philox, and one launch moves all scales of a kind, see `qzo.optim.masters.table`.

Two limits come of it: bytes at the bandwidth of a copy, and operations of products at the rate of a large one, both as
measured on a card. No step is faster than either, and none has been timed for this.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qzo
from bench.cases.case import BenchCase
from bench.cases.models import resolve
from bench.methods import METHODS
from bench.records.environment import environment
from bench.records.files import write_json
from bench.simulator.cuda.attention import attention_of
from bench.simulator.cuda.kernels import CudaFunctions
from bench.worlds.batches import steps_of, without_data
from bench.worlds.sim import SimWorld
from qzo.kernels import asked, fused, rebuilt
from qzo.kernels.packed import Packed
from qzo.optim import noise
from qzo.optim.masters.table import Table

MODELS = ("llama2-7b", "llama2-13b")
SHAPES = ((1, 32), (16, 40))
FORWARDS, MEZO = "two bf16 forward passes", "MeZO as released"
OPERATORS, REBUILT, CODES = "operators", "rebuilt weights", "codes"
WAYS = (FORWARDS, MEZO, OPERATORS, REBUILT, CODES)
METHODS_OF = {FORWARDS: "mezo", MEZO: "mezo-reference"}  # others are qzo
KERNELS = (REBUILT, CODES)
ONE_TILE = 64  # rows of x, for which codes are read once
FIGURES = ("launches", "forward_launches", "bytes", "forward_bytes", "operations", "reads")
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "bernoulli_", "arange")  # do not read what they write to
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class Traffic(TorchDispatchMode):
    """Counts launches, bytes read and written, operations of products, and numbers that the CPU waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = self.operations = self.reads = 0
        self.forward_launches = self.forward_bytes = 0
        self.phase = "forward"  # of a step

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense":
            self.reads += 1
            return 1.0  # of a tensor without data; a loss, say
        if name == "_to_copy" and args[0].is_meta and (kwargs or {}).get("device") == torch.device("cpu"):
            self.reads += 1
            return torch.ones(args[0].shape, dtype=(kwargs or {}).get("dtype"))
        out = func(*args, **(kwargs or {}))
        if not func.is_view and name not in ALLOCATIONS and not name.startswith("_unsafe_view"):
            read = tensors_in((args[1:] if name in OVERWRITES else args, without_out(kwargs)))
            if any(tensor.is_meta for tensor in (*read, *tensors_in(out))):  # others are the CPU's business
                self.add(sum(map(nbytes_of, (*read, *tensors_in(out)))))
            if name in PRODUCTS:
                left, right = tensors_in(args)[-2:]
                self.operations += 2 * left.numel() * right.shape[-1]
        return out

    def add(self, nbytes: int, operations: int = 0) -> None:
        """One launch."""
        self.launches += 1
        self.bytes += nbytes
        self.operations += operations
        if self.phase.startswith("forward"):
            self.forward_launches += 1
            self.forward_bytes += nbytes

    def enter(self, phase: str) -> None:
        """Of a step, told by it."""
        self.phase = phase


def tensors_in(tree: Any) -> list[Tensor]:
    """Those in arguments or results of an operator."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def without_out(kwargs: Any) -> dict[str, Any]:
    """Arguments that are read."""
    return {name: value for name, value in (kwargs or {}).items() if name != "out"}


def nbytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; what is expanded lies there once."""
    sizes = (size if stride else 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return math.prod(sizes) * tensor.element_size()


def main(arguments: Sequence[str] | None = None) -> int:
    """Count and write; 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.studies.roofline", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args(arguments)
    rows = []
    for model in options.models.split(","):
        for batch_size, seq_len in SHAPES:
            for way in WAYS if batch_size * seq_len <= ONE_TILE else WAYS[:-1]:
                traffic = counted(model, way, batch_size, seq_len)
                found = {name: getattr(traffic, name) for name in FIGURES}
                rows.append({"model": model, "way": way, "batch_size": batch_size, "seq_len": seq_len, **found})
                print(rows[-1], file=sys.stderr, flush=True)
    write_json(options.out, {"environment": environment(), "rows": rows})
    return 0


def counted(model: str, way: str, batch_size: int, seq_len: int) -> Traffic:
    """What one step takes, or two forward passes of the 16-bit model."""
    case = BenchCase(
        model, METHODS_OF.get(way, "qzo"), device="sim", gpu="h100-80gb", batch_size=batch_size,
        seq_len=seq_len, noise="philox" if way in KERNELS else "generator",
    )  # fmt: skip
    source = resolve(case.model)
    attention = attention_of(case, source, (9, 0))
    world = SimWorld(source, attention)
    traffic = Traffic()
    step: Callable[[Any], object]
    if way == FORWARDS:
        bf16 = world.model(torch.bfloat16).eval()
        step = lambda batch: [qzo.label_loss(bf16, batch.input_ids, batch.labels, keep=1) for _ in range(2)]  # noqa: E731
        recipe = None
    else:
        prepared = METHODS[case.method](case, world)
        step, recipe = (lambda batch: prepared.step(batch, traffic.enter)), prepared.recipe
    (batch,) = without_data(steps_of(case, recipe, 1), recipe, "meta")
    with torch.no_grad(), CudaFunctions(attention, (9, 0)), way_of(way, traffic), traffic:
        step(batch)
    return traffic


@contextmanager
def way_of(way: str, traffic: Traffic) -> Iterator[None]:
    """Within, layers are computed in this way, all of their parts, and kernels are counted."""
    rebuild, multiply, place, update = fused.rebuild, fused.multiply, Table.place, Table.update

    def counted_rebuild(packed: Packed, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        weight = rebuild(packed, start, stop, dtype)
        traffic.add(codes_bytes(packed) * (stop - start) // packed.shape[0] + weight.nbytes)
        return weight

    def counted_multiply(packed: Packed, x: Tensor) -> Tensor:
        y = multiply(packed, x)
        if x.numel() // x.shape[-1] <= fused.most_tokens(packed):
            traffic.add(codes_bytes(packed) + x.nbytes + y.nbytes, 2 * x.numel() * packed.shape[0])
        return y

    def counted_place(table: Table, *told: Any) -> None:
        place(table, *told)
        traffic.add(table.placed_bytes)

    def counted_update(table: Table, *told: Any) -> None:
        update(table, *told)
        traffic.add(table.placed_bytes + table.kept_bytes)

    most = 2**31 if way == CODES else 0
    with (
        asked.by_triton(way in KERNELS),
        fused.most_tokens_of(most),
        mock.patch.multiple(fused, rebuild=counted_rebuild, multiply=counted_multiply),
        mock.patch.multiple(Table, place=counted_place, update=counted_update),
        mock.patch.object(rebuilt, "_walked", lambda shape, x: rebuilt.chunk_bounds(*shape)),
        mock.patch.object(noise, "_starts", lambda numel, size, device: range(0, numel, max(1, size))),
    ):
        yield


def codes_bytes(packed: Packed) -> int:
    """Codes, scales and what else a kernel reads of a layer."""
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors())


if __name__ == "__main__":
    sys.exit(main())
