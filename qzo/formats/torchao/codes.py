"""Three orders in which torchao and PyTorch store 4-bit codes q = -8 ... 7 of a weight [N, K].

    plain   int8 [N, K/2]               column 2i in the low half of byte i, 2i + 1 in the high one, two's complement
    tiles   int32 [N/8, K/128, 32, 4]   q + 8, for the tensor cores of `_weight_int4pack_mm`; N and K padded
    cpu     uint8 [N, K/2]              q + 8, for `_weight_int4pack_mm_for_cpu`: blocks of rows, column by column

In "tiles", lane t = 0 ... 31 of tile (n, k) holds in word w the row 8n + t / 4 and the columns 128k + 32w + 2 (t mod 4)
plus COLUMNS, lowest bits first. The order inside the blocks of "cpu" depends on the instructions of the machine and is
found by packing row numbers with the operator itself.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qzo.errors import QzoError

COLUMNS = (0, 8, 16, 24, 1, 9, 17, 25)  # of the eight codes of a word of "tiles"
TILE_ROWS, TILE_COLUMNS = 8, 128
ZERO = 8
WORD_DTYPE = {"plain": torch.int8, "tiles": torch.int32, "cpu": torch.uint8}


def words_shape(order: str, rows: int, columns: int) -> tuple[int, ...]:
    """Shape of the stored tensor for a weight [rows, columns]; of "tiles", after padding. Raises QzoError."""
    multiple = {"plain": (1, 2), "tiles": (TILE_ROWS, TILE_COLUMNS), "cpu": (16, 2)}[order]
    if rows % multiple[0] or columns % multiple[1]:
        raise QzoError(f"a weight {(rows, columns)} is not a multiple of {multiple}, as its order of codes needs")
    return (rows // TILE_ROWS, columns // TILE_COLUMNS, 32, 4) if order == "tiles" else (rows, columns // 2)


def unpacked(words: Tensor, order: str, start: int, stop: int) -> Tensor:
    """q of rows start:stop as fp32 [stop - start, K]."""
    if order == "plain":
        part = words[start:stop]
        low, high = (part << 4) >> 4, part >> 4  # int8: the shift to the right keeps the sign
        return torch.stack((low, high), dim=-1).flatten(1).float()
    if order == "tiles":
        return _from_tiles(words, start, stop)
    return _from_blocks(words, start, stop)


def _from_tiles(words: Tensor, start: int, stop: int) -> Tensor:
    first, last = start // TILE_ROWS, -(-stop // TILE_ROWS)
    part = words[first:last]  # [n, k, lane, word]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    codes = (part[..., None] >> shifts).bitwise_and_(15)  # [n, k, lane, word, place]
    codes = codes[..., torch.tensor(COLUMNS, device=words.device).argsort()]  # places by column: + 0, 1, 8, 9, ...
    codes = codes.unflatten(2, (8, 4)).unflatten(5, (4, 2))  # [n, k, row, lane mod 4, word, eight, pair]
    rows = codes.permute(0, 2, 1, 4, 5, 3, 6).flatten(2).flatten(0, 1)  # word, eight, lane mod 4, pair
    return rows[start - first * TILE_ROWS : stop - first * TILE_ROWS].float().sub_(ZERO)


def _from_blocks(words: Tensor, start: int, stop: int) -> Tensor:
    rows, columns, size = len(words), 2 * words.shape[1], _block_rows()
    first, last = start // size * size, min(-(-stop // size) * size, rows)
    whole = last // size * size  # rows before the last, shorter block
    numbers = torch.empty(last - first, columns, device=words.device)
    for low, high, length in ((first, whole, size), (max(first, whole), last, last - whole)):
        if low < high:
            part = words[low:high].view(-1, columns, length // 2)
            codes = torch.stack((part & 15, part >> 4), dim=-1).flatten(2)[:, :, _places(length).to(words.device)]
            numbers[low - first : high - first] = codes.transpose(1, 2).flatten(0, 1)
    return numbers[start - first : stop - first].sub_(ZERO)


@cache
def _block_rows() -> int:
    """Rows of a block: 64 with AVX512, else 32."""
    columns = torch.arange(32, dtype=torch.int32).repeat(64, 1) & 15
    return 2 * int((_packed(columns) != 0).int().argmax())  # bytes before column 1 begins


@cache
def _places(rows: int) -> Tensor:
    """For each row of a block its place among the codes of a column."""
    numbers = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, 32)
    low, high = (_packed(part.contiguous())[: rows // 2] for part in (numbers & 15, numbers >> 4))
    halves = [(low & 15) | ((high & 15) << 4), (low >> 4) | (high >> 4 << 4)]
    return torch.stack(halves, dim=-1).flatten().argsort()


def _packed(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
