"""z of `qzo.kernels.philox` in a kernel, where it is needed and nowhere stored; the same bits."""

from __future__ import annotations

import triton
import triton.language as tl

from qzo.kernels import philox

LANES, BLOCK_BITS = tl.constexpr(philox.LANES), tl.constexpr(philox.BLOCK_BITS)
MULTIPLIER_0, MULTIPLIER_1 = map(tl.constexpr, philox.MULTIPLIERS)
WEYL_0, WEYL_1 = map(tl.constexpr, philox.WEYL)
ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def noise_of(element, key_0, key_1, tensor, direction, step, BITS: tl.constexpr):
    """z fp32 of elements int32, below 2**31; the other words are those of `Stream`, as int32 of the same bits."""
    parts: tl.constexpr = BLOCK_BITS // BITS  # elements a block
    part = element // LANES % parts
    first = (element // (LANES * parts) * LANES + element % LANES).to(tl.uint32)
    nothing = first ^ first
    second, third, fourth = nothing + tensor, nothing + direction, nothing + step
    key_0, key_1 = key_0.to(tl.uint32), key_1.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high_0, low_0 = tl.umulhi(nothing + MULTIPLIER_0, first), first * MULTIPLIER_0
        high_1, low_1 = tl.umulhi(nothing + MULTIPLIER_1, third), third * MULTIPLIER_1
        first, second, third, fourth = high_1 ^ second ^ key_0, low_1, high_0 ^ fourth ^ key_1, low_0
        key_0, key_1 = key_0 + WEYL_0, key_1 + WEYL_1
    word, shift = part * BITS // 32, (part * BITS % 32).to(tl.uint32)
    bits = tl.where(word == 0, first, tl.where(word == 1, second, tl.where(word == 2, third, fourth))) >> shift
    if BITS == 16:
        bits = (bits & 0x5555) + (bits >> 1 & 0x5555)
        bits = (bits & 0x3333) + (bits >> 2 & 0x3333)
        bits = (bits & 0x0F0F) + (bits >> 4 & 0x0F0F)
        z = ((bits & 0xFF) + (bits >> 8 & 0xFF)).to(tl.float32) * 0.5 - 4
    else:
        z = (bits & 1).to(tl.float32) * 2 - 1
    return z


@triton.jit(do_not_specialize=["start", "key_0", "key_1", "tensor", "direction", "step"])
def draw_kernel(out, start, count, key_0, key_1, tensor, direction, step, BITS: tl.constexpr, SIZE: tl.constexpr):
    """z of elements start ... start + count - 1."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    z = noise_of(start + place, key_0, key_1, tensor, direction, step, BITS)
    tl.store(out + place, z.to(out.dtype.element_ty), mask=place < count)
