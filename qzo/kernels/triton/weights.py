"""Kernels: a weight from its codes, and few rows times a weight that exists in registers alone."""

from __future__ import annotations

import triton
import triton.language as tl

from qzo.kernels.triton.tiles import elements_of, groups_of, spread, values_of


@triton.jit
def weights_of(
    codes, scales, zeros, order, offsets, table, n0, k0, stop, N, K,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, HEADER: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, EACH: tl.constexpr, ORDERED: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr,
    STRIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Wᵀ fp32 [BK, BN]; 0 in rows from K on."""
    n, rows = n0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
    k, group = groups_of(order, k0, K, GROUP, EACH, ORDERED, BK)
    inside = (k[:, None] < K) & (n[None, :] < stop)
    value = values_of(
        codes, zeros, table, n0, k0, k, group, stop, N, K, LAYOUT, BITS, BYTES, HEADER, ZERO, TABLE, BN, BK
    )
    place = elements_of(k, group, n, N, K, LAYOUT, GROUP) * STRIDE
    value *= spread(tl.load(scales + place, mask=inside, other=0).to(tl.float32), k.shape[0], BN, BK)
    if OFFSET:
        value += spread(tl.load(offsets + place, mask=inside, other=0).to(tl.float32), k.shape[0], BN, BK)
    return tl.where(rows[:, None] < K, value, 0)  # or infinite scales would make 0 times them a NaN


@triton.jit
def rebuild_kernel(
    out, codes, scales, zeros, order, offsets, table, start, stop, N, K, along_n, along_k,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, HEADER: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, EACH: tl.constexpr, ORDERED: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr,
    STRIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows start:stop of W into `out`, whose element (n - start, k) is at (n - start) * along_n + k * along_k."""
    n0, k0 = start + tl.program_id(0) * BN, tl.program_id(1) * BK
    weight = weights_of(
        codes, scales, zeros, order, offsets, table, n0, k0, stop, N, K,
        LAYOUT, BITS, BYTES, HEADER, GROUP, ZERO, EACH, ORDERED, OFFSET, TABLE, STRIDE, BN, BK,
    )  # fmt: skip
    n, k = n0 + tl.arange(0, BN), k0 + tl.arange(0, BK)
    place = (n - start)[None, :] * along_n + k[:, None] * along_k
    tl.store(out + place, weight.to(out.dtype.element_ty), mask=(n[None, :] < stop) & (k[:, None] < K))


@triton.jit(do_not_specialize=["M"])
def product_kernel(
    y, x, codes, scales, zeros, order, offsets, table, M, N, K, x_stride,
    LAYOUT: tl.constexpr, BITS: tl.constexpr, BYTES: tl.constexpr, HEADER: tl.constexpr, GROUP: tl.constexpr,
    ZERO: tl.constexpr, EACH: tl.constexpr, ORDERED: tl.constexpr, OFFSET: tl.constexpr, TABLE: tl.constexpr,
    STRIDE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x Wᵀ for x [M, K] with rows x_stride apart: W rounded to the dtype of x, sums in fp32."""
    m, n0 = tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN
    total = tl.full((BM, BN), 0, tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        side = tl.load(x + m[:, None] * x_stride + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0)
        weight = weights_of(
            codes, scales, zeros, order, offsets, table, n0, k0, N, N, K,
            LAYOUT, BITS, BYTES, HEADER, GROUP, ZERO, EACH, ORDERED, OFFSET, TABLE, STRIDE, BN, BK,
        )  # fmt: skip
        total = tl.dot(side, weight.to(side.dtype), total, input_precision="ieee")
    n = n0 + tl.arange(0, BN)
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(y + m[:, None] * N + n[None, :], total.to(y.dtype.element_ty), mask=inside)
