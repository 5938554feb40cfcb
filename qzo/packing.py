"""Codes and zero points packed into 32-bit words, in the layout of GPTQ checkpoints.

    qweight int32 [K*b/32, N]   word r of column n holds codes k = r*p ... r*p + p-1, lowest bits first; p = 32 / b
    qzeros  int32 [K/g, N*b/32] word r of group i holds the zero points of columns n = r*p ... r*p + p-1
    scales        [K/g, N]
    g_idx   int32 [K]           group of weight k; k // g, or any order for checkpoints made with `desc_act`

In memory qzeros holds the true zero point ("gptq_v2"). Files of the older format "gptq" hold zero - 1, modulo 2^b:
`zeros_to_v1` and `zeros_from_v1` convert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qzo.errors import QzoError


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Pack codes [P * p, M] along dim 0 into int32 [P, M], p = 32 / n_bits; any integer dtype, values < 2^n_bits.

    Extra memory: two int32 tensors of the size of the result. Raises QzoError unless dim 0 is a multiple of p.
    """
    per_word = 32 // n_bits
    if codes.shape[0] % per_word:
        raise QzoError(
            f"{codes.shape[0]} codes of {n_bits} bits do not fill int32 words; need a multiple of {per_word}"
        )
    words = torch.zeros(codes.shape[0] // per_word, codes.shape[1], dtype=torch.int32, device=codes.device)
    for position in range(per_word):
        words.bitwise_or_(codes[position::per_word].to(torch.int32) << (position * n_bits))
    return words


def unpack(words: Tensor, n_bits: int) -> Tensor:
    """Undo `pack`: int32 [P, M] -> int32 [P * p, M]. No other memory than the result."""
    shifts = torch.arange(0, 32, n_bits, dtype=torch.int32, device=words.device)
    codes = torch.bitwise_right_shift(words[:, None, :], shifts[None, :, None]).bitwise_and_(2**n_bits - 1)
    return codes.reshape(-1, words.shape[1])


def pack_zeros(zero_points: Tensor, n_bits: int) -> Tensor:
    """Pack zero points [K // g, N] into int32 [K // g, N * n_bits // 32]."""
    return pack(zero_points.t(), n_bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, n_bits: int) -> Tensor:
    """Undo `pack_zeros`: int32 [K // g, N * n_bits // 32] -> int32 [K // g, N]."""
    shifts = torch.arange(0, 32, n_bits, dtype=torch.int32, device=qzeros.device)
    zeros = torch.bitwise_right_shift(qzeros[:, :, None], shifts).bitwise_and_(2**n_bits - 1)
    return zeros.reshape(qzeros.shape[0], -1)


def zeros_to_v1(qzeros: Tensor, n_bits: int) -> Tensor:
    """Packed true zero points -> packed zero - 1. Raises QzoError for a zero point of 0, which readers disagree on."""
    zeros = unpack_zeros(qzeros, n_bits)
    if bool((zeros == 0).any()):
        raise QzoError('a zero point is 0, which checkpoint format "gptq" cannot hold; choose "gptq_v2"')
    return pack_zeros(zeros.sub_(1), n_bits)


def zeros_from_v1(qzeros: Tensor, n_bits: int) -> Tensor:
    """Packed zero - 1 (modulo 2^n_bits) -> packed true zero points."""
    return pack_zeros(unpack_zeros(qzeros, n_bits).add_(1).bitwise_and_(2**n_bits - 1), n_bits)
