"""The order of HQQ's codes in memory: packed words, groups along either axis, and unpacking them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qzo.errors import QzoError

CODE_BITS = {"8bit_u8": 8, "4bit_u8": 4, "3bit_32": 3, "2bit_u8": 2, "1bit_u8": 1}  # of a code in its word
PACKING_OF: dict[float, str] = {
    8: "8bit_u8",
    6: "8bit_u8",
    5: "8bit_u8",
    4: "4bit_u8",
    3: "3bit_32",
    2: "2bit_u8",
    1.58: "2bit_u8",
}
PACKING_OF[1] = "1bit_u8"


@dataclass(frozen=True)
class HqqLayout:
    """Where the codes of a weight [out_features, in_features] are; checked when it is made.

    Args:
        in_features, out_features: K and N.
        n_bits: 1, 1.58, 2, 3, 4, 5, 6 or 8.
        group_size: weights that share a scale; need not divide K.
        axis: of the groups, see qzo/formats/hqq/layer.py.
    """

    in_features: int
    out_features: int
    n_bits: float = 4
    group_size: int = 64
    axis: int = 1

    def __post_init__(self) -> None:
        if self.n_bits not in PACKING_OF:
            raise QzoError(f"n_bits={self.n_bits} is not supported; HQQ has {', '.join(map(str, sorted(PACKING_OF)))}")
        if self.axis not in (0, 1):
            raise QzoError(f"axis={self.axis} is not 0 or 1")
        if min(self.in_features, self.out_features, self.group_size) < 1:
            raise QzoError(
                f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size} "
                "must be positive"
            )
        if self.in_features * self.out_features % self.group_size:
            raise QzoError(
                f"{self.out_features} x {self.in_features} weights do not fill groups of {self.group_size}; "
                "choose a divisor"
            )
        if self.code_bits != 3 and self.rows % self.per_word:
            raise QzoError(
                f"{self.rows} rows of groups do not fill words of {self.per_word} codes; choose another group_size"
            )

    @property
    def packing(self) -> str:
        """Name of the library for it."""
        return PACKING_OF[self.n_bits]

    @property
    def code_bits(self) -> int:
        """Bits of a code in its word."""
        return CODE_BITS[self.packing]

    @property
    def per_word(self) -> int:
        """Codes to a word."""
        return 10 if self.code_bits == 3 else 8 // self.code_bits

    @property
    def word_dtype(self) -> torch.dtype:
        """int32 for 3 bits, else uint8."""
        return torch.int32 if self.code_bits == 3 else torch.uint8

    @property
    def rows(self) -> int:
        """R of the matrix of groups."""
        return self.group_size if self.axis == 0 else self.in_features * self.out_features // self.group_size

    @property
    def columns(self) -> int:
        """C of the matrix of groups."""
        return self.in_features * self.out_features // self.rows

    @property
    def words_shape(self) -> tuple[int, int]:
        """P, C."""
        return -(-self.rows // self.per_word), self.columns

    @property
    def scales_shape(self) -> tuple[int, int]:
        """[R, 1] or [1, C]."""
        return (1, self.columns) if self.axis == 0 else (self.rows, 1)


def unpacked(words: Tensor, code_bits: int, first: int, last: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows first:last of the matrix of groups as numbers [last - first, C]; extra memory: as many words."""
    packed, wide = words.shape
    numbers = torch.empty(last - first, wide, dtype=dtype, device=words.device)
    per_word = 10 if code_bits == 3 else 8 // code_bits
    for place in range(first // packed, math.ceil(last / packed)):
        low, high = max(first, place * packed), min(last, (place + 1) * packed)
        part = words[low - place * packed : high - place * packed] >> code_bits * (per_word - 1 - place)
        numbers[low - first : high - first] = part.bitwise_and_(2**code_bits - 1)
    return numbers
