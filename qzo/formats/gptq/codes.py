"""Codes and zero points packed into 32-bit words, in the layout of GPTQ checkpoints.

    qweight int32 [K*b/32, N]   the codes of column n one after the other, lowest bits first: code k is in the bits
                                k*b ... k*b + b-1 of the column, bit i being bit i % 32 of word i // 32
    qzeros  int32 [K/g, N*b/32] the zero points of group i in the same way along N
    scales        [K/g, N]
    g_idx   int32 [K]           group of weight k; k // g, or any order for checkpoints made with `desc_act`

A block is the fewest codes that fill whole words: p = 32 / b codes in one word, and with 3 bits 32 codes in three
words, where codes 10 and 21 of a block lie across two words.

In memory qzeros holds the true zero point ("gptq_v2"). Files of the older format "gptq" hold zero - 1, modulo 2^b:
`zeros_to_v1` and `zeros_from_v1` convert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.kernels.constants import constant
from qzo.kernels.rounding.sizes import block_of


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Pack codes [C, M] along dim 0 into int32 [C * n_bits / 32, M]; any integer dtype, values < 2^n_bits.

    Extra memory: two int32 tensors of the size of the result. Raises QzoError unless C is a multiple of the block.
    """
    count, size = block_of(n_bits)
    if codes.shape[0] % count:
        raise QzoError(f"{codes.shape[0]} codes of {n_bits} bits do not fill int32 words; need a multiple of {count}")
    words = torch.zeros(codes.shape[0] // count * size, codes.shape[1], dtype=torch.int32, device=codes.device)
    for position in range(count):
        part = codes[position::count].to(torch.int32)
        word, shift = divmod(position * n_bits, 32)
        words[word::size].bitwise_or_(part << shift)
        if shift + n_bits > 32:
            words[word + 1 :: size].bitwise_or_(part >> (32 - shift))
    return words


def unpack(words: Tensor, n_bits: int) -> Tensor:
    """Undo `pack`: int32 [P, M] -> int32 [P * 32 / n_bits, M]. No other memory than the result."""
    if 32 % n_bits:
        return _unpack_across_words(words, n_bits)
    shifts = constant(tuple(range(0, 32, n_bits)), words)
    codes = torch.bitwise_right_shift(words[:, None, :], shifts[:, None]).bitwise_and_(2**n_bits - 1)
    return codes.view(-1, words.shape[1])


def _unpack_across_words(words: Tensor, n_bits: int) -> Tensor:
    """`unpack` of codes that may begin in one word and end in the next."""
    count, size = block_of(n_bits)
    blocks = words.unflatten(0, (-1, size))  # [C / count, size, M]
    codes = torch.empty(len(blocks), count, words.shape[1], dtype=torch.int32, device=words.device)
    for word in range(size):
        first, end = -(-32 * word // n_bits), -(-32 * (word + 1) // n_bits)  # codes that begin in this word
        shifts = torch.arange(first * n_bits - 32 * word, 32, n_bits, dtype=torch.int32, device=words.device)
        torch.bitwise_right_shift(blocks[:, word, None], shifts[:, None], out=codes[:, first:end])
        inside = 32 * (word + 1) - (end - 1) * n_bits  # bits of the last of them that are in this word
        if inside < n_bits:
            last = codes[:, end - 1].bitwise_and_(2**inside - 1)  # the shift has filled it up with the sign
            last.bitwise_or_(blocks[:, word + 1] << inside)
    return codes.bitwise_and_(2**n_bits - 1).view(-1, words.shape[1])


def pack_zeros(zero_points: Tensor, n_bits: int) -> Tensor:
    """Pack zero points [K // g, N] into int32 [K // g, N * n_bits // 32]."""
    return pack(zero_points.t(), n_bits).t().contiguous()


def unpack_zeros(qzeros: Tensor, n_bits: int) -> Tensor:
    """Undo `pack_zeros`: int32 [K // g, N * n_bits // 32] -> int32 [K // g, N]."""
    if 32 % n_bits:
        return _unpack_across_words(qzeros.t(), n_bits).t().contiguous()
    shifts = constant(tuple(range(0, 32, n_bits)), qzeros)
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
