"""Device functions: a tile [BK, BN] of the transposed weight from its codes, in the layouts of `qzo.kernels.packed`.

A code is read once, in the words or bytes that hold it; scales and zero points once for each group that a tile touches.
Everything is integers, and then fp32 in the order of PyTorch's operators: code less zero, times scale, plus offset. So
kernels are launched without fused multiply-adds, and their weights have the bits that operators give.

A tile may reach beyond the weight: what lies outside is read as 0. Groups of a length that is no power of two, or that
do not begin where rows do, and groups that `order` names, are looked up weight by weight (`EACH`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from qzo.kernels import packed

WORDS = tl.constexpr(packed.WORDS)
INTERLEAVED = tl.constexpr(packed.INTERLEAVED)
BLOCKS = tl.constexpr(packed.BLOCKS)
PAIRS = tl.constexpr(packed.PAIRS)
BLOCK = tl.constexpr(packed.BLOCK)


@triton.jit
def codes_of(
    codes, n0, k0, stop, N, K, LAYOUT: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, HEADER: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Codes int32 [BK, BN]. `n0` and `k0` are multiples of 8 and of BK, `stop` is the first column left out."""
    n, k = n0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
    if LAYOUT == WORDS and BITS == 3:
        found = _three_bits(codes, k[:, None], n[None, :], N, (n < stop)[None, :], K)
    elif LAYOUT == WORDS:
        per_word: tl.constexpr = 32 // BITS
        row = k0 // per_word + tl.arange(0, BK // per_word)
        inside = (row[:, None] < K // per_word) & (n[None, :] < stop)
        words = tl.load(codes + row[:, None] * N + n[None, :], mask=inside, other=0)
        shifts = tl.arange(0, per_word) * BITS
        found = tl.reshape((words[:, None, :] >> shifts[None, :, None]) & ((1 << BITS) - 1), (BK, BN))
    elif LAYOUT == INTERLEAVED:
        word = n0 // 8 + tl.arange(0, BN // 8)
        inside = (k[:, None] < K) & (word[None, :] < N // 8)
        words = tl.load(codes + k[:, None] * (N // 8) + word[None, :], mask=inside, other=0)
        found = tl.reshape((words[:, :, None] >> _awq_shift(tl.arange(0, 8))[None, None, :]) & 15, (BK, BN))
    elif LAYOUT == BLOCKS:
        block = k0 // BLOCK + tl.arange(0, BK // BLOCK)
        first = (n[:, None] * (K // BLOCK) + block[None, :]) * BYTES + HEADER
        inside = (n[:, None] < stop) & (block[None, :] < K // BLOCK)
        length: tl.constexpr = BLOCK * BITS // 8
        read = tl.load(
            codes + first[:, :, None] + tl.arange(0, length)[None, None, :], mask=inside[:, :, None], other=0
        )
        if BITS == 8:
            found = tl.trans(tl.reshape(read.to(tl.int8, bitcast=True).to(tl.int32), (BN, BK)))
        else:
            halves = read.to(tl.int32)[:, :, None, :] >> (tl.arange(0, 2) * 4)[None, None, :, None]
            found = tl.trans(tl.reshape(halves & 15, (BN, BK)))
    else:
        byte = k0 // 2 + tl.arange(0, BK // 2)
        inside = (n[:, None] < stop) & (byte[None, :] < K // 2)
        read = tl.load(codes + n[:, None] * (K // 2) + byte[None, :], mask=inside, other=0).to(tl.int32)
        found = tl.trans(tl.reshape((read[:, :, None] >> (4 - tl.arange(0, 2) * 4)[None, None, :]) & 15, (BN, BK)))
    return found


@triton.jit
def _three_bits(words, along, across, stride, inside, count):
    """Code `along` of column `across`: three-bit codes, two of each 32 across the border of two words."""
    bit = along * 3
    place, shift = bit // 32, bit % 32
    there = inside & (along < count)
    low = tl.load(words + place * stride + across, mask=there, other=0).to(tl.uint32, bitcast=True)
    high = tl.load(words + (place + 1) * stride + across, mask=there & (shift > 29), other=0)
    high = high.to(tl.uint32, bitcast=True) << ((32 - shift) & 31).to(tl.uint32)
    return ((low >> shift.to(tl.uint32) | tl.where(shift > 29, high, 0)) & 7).to(tl.int32)


@triton.jit
def _awq_shift(column):
    """0, 16, 4, 20, 8, 24, 12, 28 for columns 0 ... 7 of a word."""
    return column % 8 // 2 * 4 + column % 2 * 16


@triton.jit
def values_of(
    codes, zeros, table, n0, k0, k, group, stop, N, K,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, HEADER: tl.constexpr, ZERO: tl.constexpr,
    TABLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """What the scales multiply, fp32 [BK, BN]: codes less their zero points, or entries of the table."""
    found = codes_of(codes, n0, k0, stop, N, K, LAYOUT, BITS, BYTES, HEADER, BN, BK)
    if TABLE:
        value = tl.load(table + found)
    elif ZERO >= 0:
        value = (found - ZERO).to(tl.float32)
    else:
        n = n0 + tl.arange(0, BN)
        zero = zeros_of(zeros, group, n, N, (k[:, None] < K) & (n[None, :] < stop), LAYOUT, BITS)
        value = (found - spread(zero, k.shape[0], BN, BK)).to(tl.float32)
    return value


@triton.jit
def groups_of(order, k0, K, GROUP: tl.constexpr, EACH: tl.constexpr, ORDERED: tl.constexpr, BK: tl.constexpr):
    """The first columns k of the groups that a tile touches, and the numbers of these groups, both [G]."""
    step: tl.constexpr = 1 if EACH else min(GROUP, BK)
    k = k0 + tl.arange(0, BK // step) * step
    group = tl.load(order + k, mask=k < K, other=0) if ORDERED else k // GROUP
    return k, group


@triton.jit
def elements_of(k, group, n, N, K, LAYOUT: tl.constexpr, GROUP: tl.constexpr):
    """Which element of the scales belongs to each group of each column, int32 [G, BN]."""
    if LAYOUT == BLOCKS:
        element = n[None, :] * (K // GROUP) + group[:, None]
    elif LAYOUT == PAIRS:
        element = (n[None, :] * K + k[:, None]) // GROUP
    else:
        element = group[:, None] * N + n[None, :]
    return element


@triton.jit
def zeros_of(zeros, group, n, N, inside, LAYOUT: tl.constexpr, BITS: tl.constexpr):
    """Zero points int32 [G, BN]."""
    if LAYOUT == INTERLEAVED:
        words = tl.load(zeros + group[:, None] * (N // 8) + n[None, :] // 8, mask=inside, other=0)
        found = (words >> _awq_shift(n)[None, :]) & 15
    elif BITS == 3:
        found = _three_bits(zeros + group[:, None] * (N * 3 // 32), n[None, :], 0, 1, inside, N)
    else:
        words = tl.load(zeros + group[:, None] * (N * BITS // 32) + n[None, :] * BITS // 32, mask=inside, other=0)
        found = (words >> (n * BITS % 32)[None, :]) & ((1 << BITS) - 1)
    return found


@triton.jit
def spread(tile, G: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """[G, BN] -> [BK, BN], each row BK / G times."""
    if G == 1:
        tile = tl.broadcast_to(tile, (BK, BN))
    elif G != BK:
        tile = tl.reshape(tl.broadcast_to(tile[:, None, :], (G, BK // G, BN)), (BK, BN))
    return tile
