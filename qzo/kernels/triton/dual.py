"""Kernel: both sides of a step in one pass over the codes, along a z that is drawn where it is used."""

from __future__ import annotations

import triton
import triton.language as tl

from qzo.kernels.triton.noise import noise_of
from qzo.kernels.triton.tiles import elements_of, groups_of, spread, values_of


@triton.jit
def offset_at(scale, start, offset):
    """m0 (s' / s0), m0 where s0 is 0 (qzo/optim/offsets.py)."""
    return tl.where(start == 0, 1.0, tl.div_rn(scale, tl.where(start == 0, 1.0, start))) * offset


@triton.jit(do_not_specialize=["key_0", "key_1", "tensor", "direction", "step", "M"])
def dual_kernel(
    y_plus, y_minus, x_plus, x_minus, codes, masters, zeros, order, offsets, table, scale_starts, offset_starts,
    eps, key_0, key_1, tensor, direction, step, M, N, K, stride_plus, stride_minus,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, HEADER: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, EACH: tl.constexpr, ORDERED: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr,
    STRIDE: tl.constexpr, SCALE: tl.constexpr, RELATIVE: tl.constexpr, FOLLOWS: tl.constexpr, NOISE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y± [M, N] = x± W±ᵀ, W± with the scales s ± eps z (or s ± eps z s) of fp32 masters s, rounded to SCALE.

    Weights are rounded to the dtype of x, sums are fp32. Offsets are the live ones, or follow the scales.
    """
    m, n0 = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    total_plus, total_minus = tl.full((BM, BN), 0, tl.float32), tl.full((BM, BN), 0, tl.float32)
    for start in range(0, K, BK):
        rows = start + tl.arange(0, BK)
        there = (m[:, None] < M) & (rows[None, :] < K)
        plus = tl.load(x_plus + m[:, None] * stride_plus + rows[None, :], mask=there, other=0)
        minus = tl.load(x_minus + m[:, None] * stride_minus + rows[None, :], mask=there, other=0)

        k, group = groups_of(order, start, K, GROUP, EACH, ORDERED, BK)
        inside = (k[:, None] < K) & (n[None, :] < N)
        value = values_of(
            codes, zeros, table, n0, start, k, group, N, N, K, LAYOUT, BITS, BYTES, HEADER, ZERO, TABLE, BN, BK
        )
        element = elements_of(k, group, n, N, K, LAYOUT, GROUP)
        master = tl.load(masters + element, mask=inside, other=0)
        moved = noise_of(element, key_0, key_1, tensor, direction, step, NOISE) * eps
        if RELATIVE:
            moved *= master
        above, below = master + moved, master - moved
        weight_plus = value * spread(above.to(SCALE).to(tl.float32), k.shape[0], BN, BK)
        weight_minus = value * spread(below.to(SCALE).to(tl.float32), k.shape[0], BN, BK)
        if OFFSET:
            if FOLLOWS:
                first = tl.load(scale_starts + element, mask=inside, other=0)
                offset = tl.load(offset_starts + element, mask=inside, other=0)
                offset_plus = offset_at(above, first, offset).to(SCALE).to(tl.float32)
                offset_minus = offset_at(below, first, offset).to(SCALE).to(tl.float32)
            else:
                offset_plus = tl.load(offsets + element * STRIDE, mask=inside, other=0).to(tl.float32)
                offset_minus = offset_plus
            weight_plus += spread(offset_plus, k.shape[0], BN, BK)
            weight_minus += spread(offset_minus, k.shape[0], BN, BK)
        weight_plus = tl.where(rows[:, None] < K, weight_plus, 0)
        weight_minus = tl.where(rows[:, None] < K, weight_minus, 0)
        total_plus = tl.dot(plus, weight_plus.to(plus.dtype), total_plus, input_precision="ieee")
        total_minus = tl.dot(minus, weight_minus.to(minus.dtype), total_minus, input_precision="ieee")
    inside = (m[:, None] < M) & (n[None, :] < N)
    place = m[:, None] * N + n[None, :]
    tl.store(y_plus + place, total_plus.to(y_plus.dtype.element_ty), mask=inside)
    tl.store(y_minus + place, total_minus.to(y_minus.dtype.element_ty), mask=inside)
