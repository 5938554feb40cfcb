"""Launching rebuilds and products: tiles, and what a kernel is compiled for.

Triton looks at every argument of a launch to find the kernel that was compiled for its like, for longer than most
kernels here run. So a kernel is remembered by what Triton compiles for, and from its second time on started at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel

from qzo.kernels.packed import BLOCKS, PAIRS, Packed
from qzo.kernels.triton.weights import product_kernel, rebuild_kernel

WARPS = 4
DEPTH = 128  # columns of W that a product takes at a time
Constants = dict[str, Any]
_compiled: dict[Hashable, tuple[CompiledKernel, tuple[Any, ...]]] = {}


class Kind(NamedTuple):
    """What of packed weights a kernel is compiled for. zero: -1 where zero points are packed too."""

    layout: int
    n_bits: int
    shape: tuple[int, int]
    group_size: int
    zero: int
    is_ordered: bool
    has_offsets: bool
    has_table: bool
    block_bytes: int
    stride: int


def kind_of(packed: Packed) -> Kind:
    """The kind of packed weights."""
    return Kind(
        packed.layout, packed.n_bits, packed.shape, packed.group_size,
        -1 if isinstance(packed.zeros, Tensor) else packed.zeros, packed.order is not None, packed.offsets is not None,
        packed.table is not None, packed.codes.shape[-1] if packed.layout == BLOCKS else 0, packed.scales.stride(-1),
    )  # fmt: skip


def rebuild(weight: Tensor, packed: Packed, start: int) -> None:
    """Write the rows of W from `start` on to `weight` [rows, K], of any strides."""
    rows, depth = weight.shape
    kind = kind_of(packed)
    constants, how = rebuilt(kind)
    grid = triton.cdiv(rows, constants["BN"]), triton.cdiv(depth, constants["BK"])
    numbers = start, start + rows, *packed.shape, *weight.stride()
    begin(rebuild_kernel, grid, ("rebuild", kind), (weight, *pointers(packed)), (), numbers, constants, how)


def multiply(y: Tensor, packed: Packed, x: Tensor) -> None:
    """Write x Wᵀ to y [M, N], contiguous. A row of y does not depend on the others."""
    columns, depth = packed.shape
    side, kind = with_near_elements(x), kind_of(packed)
    count = len(side)
    constants, how = multiplied(kind, rows_of_tile(count), DEPTH)
    grid = triton.cdiv(columns, constants["BN"]), triton.cdiv(count, constants["BM"])
    which, numbers = ("product", kind, constants["BM"], constants["BK"]), (columns, depth, side.stride(0))
    begin(product_kernel, grid, which, (y, side, *pointers(packed)), (count,), numbers, constants, how)


def begin(
    kernel: Any,
    grid: tuple[int, int],
    which: Hashable,
    tensors: tuple[Tensor, ...],
    free: tuple[int, ...],
    numbers: tuple[int, ...],
    constants: Constants,
    how: Constants,
) -> None:
    """Launch a kernel whose arguments are tensors, numbers that it is not compiled for, others, constants.

    which: tells this kernel, its constants and options from those of other launches.
    """
    there = tensors[0].device
    kinds = tuple((tensor.dtype, tensor.data_ptr() % 16 == 0) for tensor in tensors)
    key = which, numbers, kinds, there
    with on(there):
        found = _compiled.get(key)
        if found is None:
            made = kernel[grid](*tensors, *free, *numbers, **constants, **how)
            if isinstance(made, CompiledKernel):  # not what the interpreter runs
                _compiled[key] = made, tuple(constants[name] for name in kernel.arg_names if name in constants)
        else:
            found[0][(*grid, 1)](*tensors, *free, *numbers, *found[1])


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Within, kernels are launched on this GPU."""
    return torch.cuda.device(device) if _are_several() and device.type == "cuda" else nullcontext()


@cache
def _are_several() -> bool:
    return torch.cuda.device_count() > 1


def with_near_elements(rows: Tensor) -> Tensor:
    """x [M, K] with the elements of a row next to each other."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def rows_of_tile(rows: int) -> int:
    """Rows of x that a tile has; a product of Triton's has 16 at least."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


@cache
def rebuilt(kind: Kind) -> tuple[Constants, Constants]:
    """Constants and options of a rebuild: its tile is longest where weights lie next to each other."""
    tile = {"BN": 16, "BK": 256} if kind.layout in (BLOCKS, PAIRS) else {"BN": 64, "BK": 64}
    return described(kind) | tile, options(kind)


@cache
def multiplied(kind: Kind, most: int, depth: int) -> tuple[Constants, Constants]:
    """Constants and options of a product by tiles of so many rows of x, and so many columns of W where they can be.

    A tile is narrow for few rows, so that a layer of 4,096 columns has a program for each multiprocessor.
    """
    tile = {"BN": 32 if most < 64 else 64, "BK": 32 if is_scattered(kind) else depth, "BM": most}
    return described(kind) | tile, options(kind)


def pointers(packed: Packed) -> tuple[Tensor, ...]:
    """The tensors in the order of the kernels' arguments; what there is not, a kernel does not read."""
    there = packed.codes
    zeros = packed.zeros if isinstance(packed.zeros, Tensor) else there
    further = (there if tensor is None else tensor for tensor in (packed.order, packed.offsets, packed.table))
    return packed.codes, packed.scales, zeros, *further


def options(kind: Kind) -> Constants:
    """How the compiler treats a kernel. A fused multiply-add would give weights other bits than operators do."""
    return {"num_warps": WARPS, "num_stages": 2 if is_scattered(kind) else 3, "enable_fp_fusion": False}


def is_scattered(kind: Kind) -> bool:
    """Whether a kernel looks up something weight by weight: then it has fewer of them in flight."""
    return described(kind)["EACH"] or 32 % kind.n_bits != 0


def described(kind: Kind) -> Constants:
    """What a kernel is compiled for, beside dtypes and tile."""
    group, depth = kind.group_size, kind.shape[1]
    if kind.layout != PAIRS and group >= depth:  # one for a whole row
        group = triton.next_power_of_2(depth)
    each = kind.is_ordered or group & (group - 1) != 0
    each |= kind.layout == PAIRS and depth % group != 0
    return {
        "LAYOUT": kind.layout, "BITS": kind.n_bits, "GROUP": group, "EACH": each, "BYTES": kind.block_bytes,
        "HEADER": 0 if kind.layout != BLOCKS else 4 if kind.has_offsets else 2,
        "ZERO": kind.zero, "ORDERED": kind.is_ordered, "OFFSET": kind.has_offsets, "TABLE": kind.has_table,
        "STRIDE": kind.stride,
    }  # fmt: skip
