"""Kernels: perturb, restore or update all scales of a model, and launching them; see `qzo.optim.masters.table`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qzo.kernels.philox import BITS, Stream
from qzo.kernels.triton.both import DTYPES, words_of
from qzo.kernels.triton.dual import offset_at
from qzo.kernels.triton.launch import WARPS, on
from qzo.kernels.triton.noise import noise_of

# An entry of a table, int64: addresses, then numbers. A tensor without offsets or momentum has no such address.
FIELDS = (
    "live", "master", "offset", "scale_start", "offset_start", "momentum",
    "numel", "live_stride", "offset_stride", "index", "first",
)  # fmt: skip
COUNT = tl.constexpr(len(FIELDS))
LIVE, MASTER, OFFSET, SCALE_START, OFFSET_START, MOMENTUM, NUMEL, LIVE_STRIDE, OFFSET_STRIDE, INDEX, FIRST = map(
    tl.constexpr, range(len(FIELDS))
)


def place(
    entries: Tensor,
    tensor_of: Tensor,
    size: int,
    live: torch.dtype,
    offset: torch.dtype | None,
    distance: float,
    relative: bool,
    stream: Stream,
    distribution: str | None,
) -> None:
    """Write s + distance z (with `relative` s + distance z s) to the live scales; s itself without a distribution.

    entries: int64 [tensors, FIELDS]. tensor_of: int32, the tensor of each program, which moves `size` of its elements.
    live, offset: dtypes; no offsets, None. stream: its tensor is not read.
    """
    made = {"LIVE_DTYPE": DTYPES[live], "OFFSET_DTYPE": None if offset is None else DTYPES[offset], "SIZE": size}
    made |= {"RELATIVE": relative, "BITS": BITS[distribution] if distribution else 0}
    with on(entries.device):
        place_kernel[(len(tensor_of),)](
            entries, tensor_of, distance, *_words(stream), **made, num_warps=WARPS, enable_fp_fusion=False
        )


def update(
    entries: Tensor,
    tensor_of: Tensor,
    size: int,
    live: torch.dtype,
    offset: torch.dtype | None,
    factors: Tensor,
    rate: float,
    momentum: float,
    relative: bool,
    nonnegative: bool,
    stream: Stream,
    distribution: str,
) -> None:
    """Add Σ_j factors[j] z_j to the masters, as `qzo.optim.rules` has it, and write them to the live scales.

    factors: fp32, one for each direction. rate, momentum: -lr and the factor of the momentum; 0 for no momentum. The
    rest as with `place`.
    """
    made = {"LIVE_DTYPE": DTYPES[live], "OFFSET_DTYPE": None if offset is None else DTYPES[offset], "SIZE": size}
    made |= {"RELATIVE": relative, "BITS": BITS[distribution], "NONNEGATIVE": nonnegative, "REMEMBERS": momentum != 0}
    key_0, key_1, _, step = _words(stream)
    with on(entries.device):
        update_kernel[(len(tensor_of),)](
            entries, tensor_of, factors, len(factors), rate, momentum, key_0, key_1, step, **made,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def _words(stream: Stream) -> tuple[int, ...]:
    key_0, key_1, _, direction, step = words_of(stream)
    return key_0, key_1, direction, step


@triton.jit
def _at(entry, FIELD: tl.constexpr, DTYPE: tl.constexpr):
    """The address that a field holds."""
    return tl.load(entry + FIELD).to(tl.pointer_type(DTYPE))


@triton.jit
def _write(entry, element, scale, inside, LIVE_DTYPE: tl.constexpr, OFFSET_DTYPE: tl.constexpr):
    """Scales fp32 to their live elements, and the offsets that follow them."""
    live = _at(entry, LIVE, LIVE_DTYPE) + element * tl.load(entry + LIVE_STRIDE)
    tl.store(live, scale.to(LIVE_DTYPE), mask=inside)
    if OFFSET_DTYPE is not None:
        start = tl.load(_at(entry, SCALE_START, tl.float32) + element, mask=inside, other=0)
        first = tl.load(_at(entry, OFFSET_START, tl.float32) + element, mask=inside, other=0)
        offset = _at(entry, OFFSET, OFFSET_DTYPE) + element * tl.load(entry + OFFSET_STRIDE)
        tl.store(offset, offset_at(scale, start, first).to(OFFSET_DTYPE), mask=inside)


@triton.jit(do_not_specialize=["key_0", "key_1", "direction", "step"])
def place_kernel(
    entries, tensor_of, distance, key_0, key_1, direction, step,
    LIVE_DTYPE: tl.constexpr, OFFSET_DTYPE: tl.constexpr, RELATIVE: tl.constexpr, BITS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """live = s + distance z of SIZE elements of one tensor."""
    block = tl.program_id(0)
    entry = entries + tl.load(tensor_of + block) * COUNT
    element = ((block - tl.load(entry + FIRST)) * SIZE).to(tl.int32) + tl.arange(0, SIZE)
    inside = element < tl.load(entry + NUMEL)
    scale = tl.load(_at(entry, MASTER, tl.float32) + element, mask=inside, other=0)
    if BITS > 0:
        index = tl.load(entry + INDEX).to(tl.uint32)
        moved = noise_of(element, key_0, key_1, index, direction, step, BITS) * distance
        if RELATIVE:
            moved *= scale
        scale += moved
    _write(entry, element, scale, inside, LIVE_DTYPE, OFFSET_DTYPE)


@triton.jit(do_not_specialize=["key_0", "key_1", "step", "count"])
def update_kernel(
    entries, tensor_of, factors, count, rate, momentum, key_0, key_1, step,
    LIVE_DTYPE: tl.constexpr, OFFSET_DTYPE: tl.constexpr, RELATIVE: tl.constexpr, BITS: tl.constexpr,
    NONNEGATIVE: tl.constexpr, REMEMBERS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """s = s + u, live = s, of SIZE elements of one tensor."""
    block = tl.program_id(0)
    entry = entries + tl.load(tensor_of + block) * COUNT
    element = ((block - tl.load(entry + FIRST)) * SIZE).to(tl.int32) + tl.arange(0, SIZE)
    inside = element < tl.load(entry + NUMEL)
    index = tl.load(entry + INDEX).to(tl.uint32)
    change = noise_of(element, key_0, key_1, index, 0, step, BITS) * tl.load(factors)
    for direction in range(1, count):
        change += noise_of(element, key_0, key_1, index, direction, step, BITS) * tl.load(factors + direction)
    if REMEMBERS:
        buffer = _at(entry, MOMENTUM, tl.float32) + element
        change += tl.load(buffer, mask=inside, other=0) * momentum
        tl.store(buffer, change, mask=inside)
        change *= rate
    master = _at(entry, MASTER, tl.float32) + element
    scale = tl.load(master, mask=inside, other=0)
    if RELATIVE:
        change *= scale
    scale += change
    if NONNEGATIVE:
        scale = tl.where(scale < 0, 0.0, scale)
    tl.store(master, scale, mask=inside)
    _write(entry, element, scale, inside, LIVE_DTYPE, OFFSET_DTYPE)
