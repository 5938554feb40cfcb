"""Block types whose codes are numbers of points in a table: IQ..., and the ternary and 4-bit ones with fixed levels.

d is the fp16 scale of a block, s a small code for 16 or 32 weights, g the point of a grid, ± the sign of a weight.

    IQ1_S   d, 32, 16 bytes          w = d (2 s + 1) (g ± 1/8)      g of 8 weights in {-1, 0, 1}
    IQ1_M   32, 16, 8 bytes          w = d (2 s + 1) (g ± 1/8)      d in the top four bits of four words
    IQ2_XXS d, 64 bytes              w = d (s + 1/2) / 4 (± g)      256 points of 8 weights; signs by a table of 128
    IQ2_XS  d, 64, 8 bytes           w = d (s + 1/2) / 4 (± g)      512 points of 8
    IQ2_S   d, 32, 32, 8, 8 bytes    w = d (s + 1/2) / 4 (± g)      1024 points of 8, each sign by itself
    IQ3_XXS d, 64, 32 bytes          w = d (s + 1/2) / 2 (± g)      256 points of 4
    IQ3_S   d, 64, 8, 32, 4 bytes    w = d (2 s + 1) (± g)          512 points of 4
    IQ4_NL  d, 16 bytes              w = d LEVELS[q]
    IQ4_XS  d, 2, 4, 128 bytes       w = d (s - 32) LEVELS[q]
    TQ1_0   48, 4 bytes, d           w = d (q - 1)                  five ternary digits a byte
    TQ2_0   64 bytes, d              w = d (q - 1)
    MXFP4   e, 16 bytes              w = 2^(e - 128) FP4[q]

Their scales stay as they are. Grids and signs are those of the package gguf. Source: `ggml-common.h` of ggml; held to
`gguf.dequantize`, bit for bit, by the tests.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qzo.formats.gguf.blocks import BlockType, bits, half_at, halves, words

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


@cache
def _levels(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


@cache
def _grid(name: str, device: torch.device) -> Tensor:
    """Points of a type, fp32 [points, weights]."""
    from gguf import quants

    kind = getattr(quants, name)
    kind.init_grid()
    return torch.from_numpy(kind.grid[0, 0].copy()).to(device)


@cache
def _sign_table(device: torch.device) -> Tensor:
    """Signs of 8 weights by their number, fp32 [128, 8]."""
    from gguf.quants import IQ2_XXS

    return _signs(torch.tensor(list(IQ2_XXS.ksigns), dtype=torch.uint8, device=device)[:, None]).flatten(1)


def _signs(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> ±1 [..., n, 8], the lowest bit first."""
    return 1 - 2 * bits(packed, 1).transpose(-1, -2).float()


def _shifted(values: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """[..., n] -> [..., n, len(shifts)]."""
    return values[..., None] >> torch.tensor(shifts, dtype=values.dtype, device=values.device) & mask


def _nibbles(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> fp32 [..., 2 n]: low and high half of each byte in turn."""
    return _shifted(packed, (0, 4), 15).flatten(-2).float()


def _scale(blocks: Tensor) -> Tensor:
    return half_at(blocks, 0).float()[..., None]


def _iq2_xxs(blocks: Tensor) -> Tensor:
    packed = blocks[..., 2:].unflatten(-1, (8, 8))
    word = words(packed[..., 4:], 4)[..., 0]  # [..., 8]
    scale = _scale(blocks) * (0.5 + (word >> 28 & 15).float()) * 0.25
    signs = _sign_table(blocks.device)[_shifted(word, (0, 7, 14, 21), 127).long()]
    points = _grid("IQ2_XXS", blocks.device)[packed[..., :4].long()]  # [..., 8, 4, 8]
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq2_xs(blocks: Tensor) -> Tensor:
    word = words(blocks[..., 2:66], 2)  # [..., 32]
    scale = _scale(blocks) * (0.5 + _nibbles(blocks[..., 66:])) * 0.25  # [..., 16]
    points = _grid("IQ2_XS", blocks.device)[(word & 511).long()]
    signs = _sign_table(blocks.device)[(word >> 9).long()]
    return (scale[..., None, None] * points.unflatten(-2, (16, 2)) * signs.unflatten(-2, (16, 2))).flatten(-3)


def _iq2_s(blocks: Tensor) -> Tensor:
    scale = _scale(blocks) * (0.5 + _nibbles(blocks[..., 74:])) * 0.25  # [..., 16]
    high = _shifted(blocks[..., 66:74], (0, 2, 4, 6), 3).flatten(-2).int()
    points = _grid("IQ2_S", blocks.device)[(blocks[..., 2:34].int() | high << 8).long()]
    signs = _signs(blocks[..., 34:66])  # [..., 32, 8]
    return (scale[..., None, None] * points.unflatten(-2, (16, 2)) * signs.unflatten(-2, (16, 2))).flatten(-3)


def _iq3_xxs(blocks: Tensor) -> Tensor:
    word = words(blocks[..., 66:], 4)  # [..., 8]
    scale = _scale(blocks) * (0.5 + (word >> 28 & 15).float()) * 0.5
    signs = _sign_table(blocks.device)[_shifted(word, (0, 7, 14, 21), 127).long()]  # [..., 8, 4, 8]
    points = _grid("IQ3_XXS", blocks.device)[blocks[..., 2:66].long()].unflatten(-2, (8, 4, 2)).flatten(-2)
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq3_s(blocks: Tensor) -> Tensor:
    scale = _scale(blocks) * (1 + 2 * _nibbles(blocks[..., 106:]))  # [..., 8]
    high = _shifted(blocks[..., 66:74], tuple(range(8)), 1).flatten(-2).int()
    points = _grid("IQ3_S", blocks.device)[(blocks[..., 2:66].int() | high << 8).long()]
    signs = _signs(blocks[..., 74:106]).unflatten(-2, (8, 4))
    return (scale[..., None, None] * points.unflatten(-2, (8, 4, 2)).flatten(-2) * signs).flatten(-3)


def _iq1_s(blocks: Tensor) -> Tensor:
    word = words(blocks[..., 34:], 2)  # [..., 8]
    scale = _scale(blocks) * (2 * (word >> 12 & 7) + 1).float()
    delta = 0.125 - 0.25 * (word >> 15 & 1).float()
    index = blocks[..., 2:34].int() | _shifted(word, (0, 3, 6, 9), 7).flatten(-2) << 8
    points = _grid("IQ1_S", blocks.device)[index.long()].unflatten(-2, (8, 4))
    return (scale[..., None, None] * (points + delta[..., None, None])).flatten(-3)


def _iq1_m(blocks: Tensor) -> Tensor:
    word = words(blocks[..., 48:], 2)  # [..., 4]
    top = word >> 12
    number = (top * torch.tensor([1, 16, 256, 4096], dtype=torch.int32, device=blocks.device)).sum(-1)
    d = number.to(torch.int16).view(torch.float16).float()[..., None]
    scale = d * (2 * _shifted(word, (0, 3, 6, 9), 7).flatten(-2) + 1).float()  # [..., 16]
    high = _shifted(blocks[..., 32:48], (0, 4), 15).flatten(-2).int()  # [..., 32]
    delta = 0.125 - 0.25 * (high >> 3).float()
    points = _grid("IQ1_M", blocks.device)[(blocks[..., :32].int() | (high & 7) << 8).long()]  # [..., 32, 8]
    return (scale[..., None, None] * (points + delta[..., None]).unflatten(-2, (16, 2))).flatten(-3)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _levels(LEVELS, blocks.device)[halves(blocks[..., 2:]).long()] * _scale(blocks)


def _iq4_xs(blocks: Tensor) -> Tensor:
    high = _shifted(words(blocks[..., 2:4], 2), tuple(range(0, 16, 2)), 3).flatten(-2)
    small = _nibbles(blocks[..., 4:8]) + 16 * high.float() - 32
    codes = halves(blocks[..., 8:].unflatten(-1, (8, 16)))  # [..., 8, 32]
    return (_levels(LEVELS, blocks.device)[codes.long()] * (_scale(blocks) * small)[..., None]).flatten(-2)


def _tq1_0(blocks: Tensor) -> Tensor:
    parts = []
    for packed, powers in ((blocks[..., :32], 5), (blocks[..., 32:48], 5), (blocks[..., 48:52], 4)):
        factors = torch.tensor([3**power for power in range(powers)], dtype=torch.uint8, device=blocks.device)
        parts.append((packed[..., None, :] * factors[:, None]).flatten(-2))  # each wraps at 256
    digits = (torch.cat(parts, -1).int() * 3 >> 8) - 1
    return digits.float() * half_at(blocks, -1).float()[..., None]


def _tq2_0(blocks: Tensor) -> Tensor:
    codes = bits(blocks[..., :64].unflatten(-1, (2, 32)), 2).flatten(-3)
    return codes.float().sub_(1) * half_at(blocks, -1).float()[..., None]


def _mxfp4(blocks: Tensor) -> Tensor:
    exponent = blocks[..., 0].int()
    half = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23).view(torch.float32)
    return _levels(FP4, blocks.device)[halves(blocks[..., 1:]).long()] * half[..., None]


LATTICES: dict[int, BlockType] = {  # number in the file -> type
    16: BlockType("IQ2_XXS", 256, 66, _iq2_xxs),
    17: BlockType("IQ2_XS", 256, 74, _iq2_xs),
    18: BlockType("IQ3_XXS", 256, 98, _iq3_xxs),
    19: BlockType("IQ1_S", 256, 50, _iq1_s),
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl),
    21: BlockType("IQ3_S", 256, 110, _iq3_s),
    22: BlockType("IQ2_S", 256, 82, _iq2_s),
    23: BlockType("IQ4_XS", 256, 136, _iq4_xs),
    29: BlockType("IQ1_M", 256, 56, _iq1_m),
    34: BlockType("TQ1_0", 256, 54, _tq1_0),
    35: BlockType("TQ2_0", 256, 66, _tq2_0),
    39: BlockType("MXFP4", 32, 17, _mxfp4),
}
