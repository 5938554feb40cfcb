"""A packed weight as a kernel sees it: which bits are whose, and nothing of the layer or the file they come from."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

WORDS, INTERLEAVED, BLOCKS, PAIRS = range(4)
BLOCK = 32  # weights of a block


class Packed(NamedTuple):
    """W[n, k] = (code[n, k] - zero) * scale, or table[code[n, k]] * scale, plus an offset in some formats; [N, K].

    layout: how `codes`, contiguous, hold a code of `n_bits`.
        WORDS        int32 [K * n_bits / 32, N], one after the other down a column (qzo/formats/gptq/codes.py)
        INTERLEAVED  int32 [K, N / 8], eight columns in a word (qzo/formats/awq/layer.py)
        BLOCKS       uint8 [N, K / 32, bytes]; after two bytes for a scale, and two for an offset where there are
                     offsets, 8-bit codes with a sign, or 4-bit ones, weight j in the low half of a byte and j + 16 in
                     the high one (qzo/formats/gguf/codes.py)
        PAIRS        uint8, 4-bit indices of `table`, the first of a byte in its high half, row after row
    shape: N, K.
    scales: one for each group of `group_size` weights along K, [groups, N] with WORDS and INTERLEAVED, [N, groups] with
        BLOCKS, and with PAIRS one for each `group_size` weights of the flat weight. Their elements are at a constant
        distance.
    zeros: packed as the codes are, with WORDS along N; or the one zero point of all.
    order: int32 [K], the group of each column; None where it is k // group_size.
    offsets: as `scales`. table: fp32 [16].
    """

    layout: int
    codes: Tensor
    n_bits: int
    shape: tuple[int, int]
    group_size: int
    scales: Tensor
    zeros: Tensor | int = 0
    order: Tensor | None = None
    offsets: Tensor | None = None
    table: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        every = (self.codes, self.scales, self.zeros, self.order, self.offsets, self.table)
        return [tensor for tensor in every if isinstance(tensor, Tensor)]
