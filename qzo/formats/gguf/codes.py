"""The block types of GGUF files: packed bytes become weights, a few rows at a time and in fp32.

A row of K weights is K / 32 blocks (K / 256 for the K-quants), stored one after the other. fp16 numbers are
little-endian; q is a code, i counts the weights of a block. The types IQ..., TQ... and MXFP4 are in `lattices`.

    Q4_0   d, 16 bytes           w = d (q - 8)           byte j holds weight j (low half) and weight j + 16
    Q4_1   d, m, 16 bytes        w = d q + m             as Q4_0
    Q5_0   d, 4 bytes, 16 bytes  w = d (q - 16)          as Q4_0, bit 4 of weight i is bit i of the first four
    Q5_1   d, m, 4, 16 bytes     w = d q + m             as Q5_0
    Q8_0   d, 32 bytes           w = d q                 int8
    Q2_K   16, 64 bytes, d, m    w = (d a) q - (m b)     4-bit a and b for each 16 weights
    Q3_K   32, 64, 12 bytes, d   w = (d a) q             6-bit a for each 16 weights, the third bit of q negated
    Q4_K   d, m, 12, 128 bytes   w = (d a) q - (m b)     6-bit a and b for each 32 weights
    Q5_K   d, m, 12, 32, 128     w = (d a) q - (m b)     as Q4_K, with a fifth bit
    Q6_K   128, 64, 16 bytes, d  w = (d a) (q - 32)      int8 a for each 16 weights

The first five have one fp16 scale d, and perhaps one fp16 minimum m, for each 32 weights: these can be trained. The
scales of K-quants are themselves quantized: they stay as they are. Source: `ggml-common.h` of ggml; held to
`gguf.dequantize`, bit for bit, by the tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qzo.formats.gguf.blocks import BlockType as BlockType
from qzo.formats.gguf.blocks import Codes, bits, halves
from qzo.formats.gguf.blocks import half_at as half_at
from qzo.formats.gguf.lattices import LATTICES
from qzo.kernels.by_row import Order


def _q4(first: int, zero: int) -> Codes:
    """Codes of 4 bits from byte `first`, less `zero`."""
    return lambda blocks: halves(blocks[..., first:]).float().sub_(zero)


def _q5(first: int, zero: int) -> Codes:
    """Codes of 5 bits: the fifth ones in the four bytes at `first`, the others after them."""

    def codes(blocks: Tensor) -> Tensor:
        fifth = bits(blocks[..., first : first + 4], 1).transpose(-1, -2).flatten(-2)
        return (halves(blocks[..., first + 4 :]) | fifth << 4).float().sub_(zero)

    return codes


def _q8(blocks: Tensor) -> Tensor:
    return blocks[..., 2:].view(torch.int8).float()


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 [..., 12] -> a and b, fp32 [..., 8]: 0 ... 3 whole in bytes 0 ... 7, 4 ... 7 in pieces.

    The low four bits of a[4 + j] and b[4 + j] share byte 8 + j; the high two are on top of a[j] and b[j].
    """
    first, second, shared = packed.unflatten(-1, (3, 4)).unbind(-2)
    a = torch.cat((first & 63, (shared & 15) | (first >> 6) << 4), -1)
    b = torch.cat((second & 63, (shared >> 4) | (second >> 6) << 4), -1)
    return a.float(), b.float()


def _k_weights(blocks: Tensor, codes: Tensor) -> Tensor:
    """(d a) q - (m b) for codes [..., 8, 32] of Q4_K and Q5_K."""
    a, b = _six_bits(blocks[..., 4:16])
    scale = a * half_at(blocks, 0).float()[..., None]
    low = b * half_at(blocks, 1).float()[..., None]
    return codes.float().mul_(scale[..., None]).sub_(low[..., None]).flatten(-2)


def _q2_k(blocks: Tensor) -> Tensor:
    packed = blocks[..., :16]
    scale = (packed & 15).float() * half_at(blocks, -2).float()[..., None]
    low = (packed >> 4).float() * half_at(blocks, -1).float()[..., None]
    codes = bits(blocks[..., 16:80].unflatten(-1, (2, 32)), 2).flatten(-3).unflatten(-1, (16, 16))
    return codes.float().mul_(scale[..., None]).sub_(low[..., None]).flatten(-2)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[..., 96:108]
    low, high = bits(packed[..., :8], 4).flatten(-2), bits(packed[..., 8:], 2).flatten(-2)  # [..., 16]
    scale = (low | high << 4).float().sub_(32) * half_at(blocks, -1).float()[..., None]
    codes = bits(blocks[..., 32:96].unflatten(-1, (2, 32)), 2).flatten(-3).float()
    absent = (bits(blocks[..., :32], 1) ^ 1).flatten(-2)
    return codes.sub_(4 * absent.float()).unflatten(-1, (16, 16)).mul_(scale[..., None]).flatten(-2)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_weights(blocks, bits(blocks[..., 16:].unflatten(-1, (4, 32)), 4).flatten(-3, -2))


def _q5_k(blocks: Tensor) -> Tensor:
    fourth = bits(blocks[..., 48:].unflatten(-1, (4, 32)), 4).flatten(-3, -2)
    return _k_weights(blocks, fourth | bits(blocks[..., 16:48], 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = bits(blocks[..., :128].unflatten(-1, (2, 64)), 4).unflatten(-1, (2, 32)).flatten(-3, -2)  # [..., 2, 4, 32]
    high = bits(blocks[..., 128:192].unflatten(-1, (2, 32)), 2)  # [..., 2, 4, 32]
    scale = blocks[..., 192:208].view(torch.int8).float() * half_at(blocks, -1).float()[..., None]
    codes = (low | high << 4).flatten(-3).unflatten(-1, (16, 16))
    return codes.float().sub_(32).mul_(scale[..., None]).flatten(-2)


BLOCK_TYPES: dict[int, BlockType] = {  # number in the file -> type
    2: BlockType("Q4_0", 32, 18, _q4(2, 8), has_scale=True, signed=True, order=Order.HALVES, zero=8),
    3: BlockType("Q4_1", 32, 20, _q4(4, 0), has_scale=True, has_offset=True, order=Order.HALVES),
    6: BlockType("Q5_0", 32, 22, _q5(2, 16), has_scale=True, signed=True, order=Order.FIFTHS, zero=16),
    7: BlockType("Q5_1", 32, 24, _q5(4, 0), has_scale=True, has_offset=True, order=Order.FIFTHS),
    8: BlockType("Q8_0", 32, 34, _q8, has_scale=True, order=Order.BYTES),
    10: BlockType("Q2_K", 256, 84, _q2_k),
    11: BlockType("Q3_K", 256, 110, _q3_k),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    **LATTICES,
}
PLAIN_TYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
