"""Launching rebuilds and products: tiles, and what a kernel is compiled for."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from qzo.kernels.packed import BLOCKS, PAIRS, Packed
from qzo.kernels.triton.weights import product_kernel, rebuild_kernel

WARPS = 4


def rebuild(weight: Tensor, packed: Packed, start: int) -> None:
    """Write the rows of W from `start` on to `weight` [rows, K], of any strides."""
    rows, depth = weight.shape
    tile = {"BN": 16, "BK": 128} if packed.layout in (BLOCKS, PAIRS) else {"BN": 64, "BK": 32}
    grid = triton.cdiv(rows, tile["BN"]), triton.cdiv(depth, tile["BK"])
    sizes = start, start + rows, *packed.shape, *weight.stride()
    with torch.cuda.device_of(weight):
        rebuild_kernel[grid](weight, *pointers(packed), *sizes, **described(packed), **tile, **options(packed))


def multiply(y: Tensor, packed: Packed, x: Tensor) -> None:
    """Write x Wᵀ to y [M, N], contiguous. A row of y does not depend on the others."""
    columns, depth = packed.shape
    side = with_near_elements(x)
    tile = product_tile(packed, len(side))
    grid = triton.cdiv(columns, tile["BN"]), triton.cdiv(len(side), tile["BM"])
    sizes = len(side), columns, depth, side.stride(0)
    with torch.cuda.device_of(y):
        product_kernel[grid](y, side, *pointers(packed), *sizes, **described(packed), **tile, **options(packed))


def with_near_elements(rows: Tensor) -> Tensor:
    """x [M, K] with the elements of a row next to each other."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def product_tile(packed: Packed, rows: int) -> dict[str, int]:
    """The tile of a product with so many rows of x; a product of Triton's has 16 at least."""
    return {"BM": 16 if rows <= 16 else 32 if rows <= 32 else 64, "BN": 64, "BK": 32 if is_scattered(packed) else 64}


def pointers(packed: Packed) -> tuple[Tensor, ...]:
    """The tensors in the order of the kernels' arguments; what there is not, a kernel does not read."""
    there = packed.codes
    zeros = packed.zeros if isinstance(packed.zeros, Tensor) else there
    further = (there if tensor is None else tensor for tensor in (packed.order, packed.offsets, packed.table))
    return packed.codes, packed.scales, zeros, *further


def options(packed: Packed) -> dict[str, Any]:
    """How the compiler treats a kernel. A fused multiply-add would give weights other bits than operators do."""
    return {"num_warps": WARPS, "num_stages": 2 if is_scattered(packed) else 3, "enable_fp_fusion": False}


def is_scattered(packed: Packed) -> bool:
    """Whether a kernel looks up something weight by weight: then it has fewer of them in flight."""
    return described(packed)["EACH"] or 32 % packed.n_bits != 0


def described(packed: Packed) -> dict[str, Any]:
    """What a kernel is compiled for, beside dtypes and tile."""
    group = packed.group_size
    if packed.layout != PAIRS and group >= packed.shape[1]:  # one for a whole row
        group = triton.next_power_of_2(packed.shape[1])
    each = packed.order is not None or group & (group - 1) != 0
    each |= packed.layout == PAIRS and packed.shape[1] % group != 0
    return {
        "LAYOUT": packed.layout, "BITS": packed.n_bits, "GROUP": group, "EACH": each,
        "BYTES": packed.codes.shape[-1] if packed.layout == BLOCKS else 0,
        "HEADER": 0 if packed.layout != BLOCKS else 2 if packed.offsets is None else 4,
        "ZERO": -1 if isinstance(packed.zeros, Tensor) else packed.zeros,
        "ORDERED": packed.order is not None, "OFFSET": packed.offsets is not None, "TABLE": packed.table is not None,
        "STRIDE": packed.scales.stride(-1),
    }  # fmt: skip
