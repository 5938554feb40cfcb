"""Launching what draws z: both sides of a step at once, and z alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo.kernels.packed import Packed
from qzo.kernels.philox import BITS, Stream
from qzo.kernels.triton.dual import dual_kernel
from qzo.kernels.triton.launch import (
    WARPS,
    described,
    is_scattered,
    kind_of,
    on,
    options,
    pointers,
    rows_of_tile,
    with_near_elements,
)
from qzo.kernels.triton.noise import draw_kernel

DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
SIZE = 1024  # elements of z a program
DEPTH = 64  # columns of W at a time: of two weights, half as many as a product takes of one


def multiply_both(
    results: tuple[Tensor, Tensor],
    packed: Packed,
    sides: tuple[Tensor, Tensor],
    masters: Tensor,
    stream: Stream,
    eps: float,
    distribution: str,
    relative: bool,
    starts: tuple[Tensor, Tensor] | None,
) -> None:
    """Write x± W±ᵀ to `results`, contiguous [M, N]; the rest is told in `qzo.kernels.fused.multiply_both`."""
    columns, depth = packed.shape
    plus, minus = map(with_near_elements, sides)
    kind = kind_of(packed)
    tile = {"BM": rows_of_tile(len(plus)), "BN": 64, "BK": 32 if is_scattered(kind) else DEPTH}
    grid = triton.cdiv(columns, tile["BN"]), triton.cdiv(len(plus), tile["BM"])
    codes, _, *further = pointers(packed)
    words = eps, *words_of(stream)
    warps = WARPS * (2 if tile["BM"] == 64 else 1)  # two sums of the largest tile need the registers of more threads
    sizes = len(plus), columns, depth, plus.stride(0), minus.stride(0)
    with on(plus.device):
        dual_kernel[grid](
            *results, plus, minus, codes, masters, *further, *(starts or (codes, codes)), *words, *sizes,
            **described(kind), SCALE=DTYPES[packed.scales.dtype], RELATIVE=relative, FOLLOWS=starts is not None,
            NOISE=BITS[distribution], **tile, **options(kind) | {"num_warps": warps},
        )  # fmt: skip


def draw(out: Tensor, start: int, stream: Stream, distribution: str) -> None:
    """As `qzo.kernels.philox.draw_by_operators`, in one launch; `out` has fewer than 2**31 elements to its end."""
    if len(out):
        words, made = (start, len(out), *words_of(stream)), {"BITS": BITS[distribution], "SIZE": SIZE}
        with on(out.device):
            draw_kernel[(triton.cdiv(len(out), SIZE),)](out, *words, **made, num_warps=WARPS, enable_fp_fusion=False)


def words_of(stream: Stream) -> tuple[int, ...]:
    """Key and counter as numbers of an int32 with the same bits, so that one kernel serves them all."""
    return tuple(word - (word >> 31 << 32) for word in (*stream.key(), *stream.counter()))
