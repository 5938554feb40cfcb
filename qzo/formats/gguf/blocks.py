"""What a block type of GGUF files is, and how bits are taken out of its bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qzo.kernels.by_row import Order, Rows

Codes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class BlockType:
    """How a block is laid out.

    Args:
        name: as in ggml.
        n_weights: weights a block.
        n_bytes: bytes a block.
        rebuild: blocks uint8 [..., n_bytes] -> fp32 [..., n_weights]: the codes q (with what is taken off them) where
            `has_scale`, the weights else.
        has_scale: d is the first fp16 number of a block, for all its weights.
        has_offset: m is the second one.
        signed: d may be negative, since its sign tells on which side the largest weight lies.
        order, zero: where compiled code finds the codes behind d (and m), and what it takes off them.
    """

    name: str
    n_weights: int
    n_bytes: int
    rebuild: Codes
    has_scale: bool = False
    has_offset: bool = False
    signed: bool = False
    order: Order | None = None
    zero: int = 0

    def by_row(self, blocks: Tensor, scales: Tensor | None = None, offsets: Tensor | None = None) -> Rows | None:
        """What compiled code makes the same weights of; None where it cannot."""
        if self.order is None or scales is None:
            return None
        rows, shape = blocks.flatten(1), (len(blocks), blocks.shape[1] * self.n_weights)
        at = 4 if self.has_offset else 2
        return Rows(rows, self.order, shape, scales, offsets=offsets, zero=self.zero, at=at, run_bytes=self.n_bytes)

    def weights(self, blocks: Tensor, scales: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        """Weights fp32 [n, B * n_weights] of rows of blocks uint8 [n, B, n_bytes].

        `scales` and `offsets` [n, B] stand in for those in the blocks; the result is differentiable in them.
        """
        values = self.rebuild(blocks)
        if self.has_scale:
            scale = (half_at(blocks, 0) if scales is None else scales).float()[..., None]
            values = values * scale if scale.requires_grad else values.mul_(scale)
        if self.has_offset:
            offset = (half_at(blocks, 1) if offsets is None else offsets).float()[..., None]
            values = values + offset if values.requires_grad or offset.requires_grad else values.add_(offset)
        return values.flatten(-2)


def half_at(blocks: Tensor, position: int) -> Tensor:
    """The fp16 number at a position (0, 1, ... -1) of each block: a live view [...] of blocks uint8 [..., n_bytes]."""
    return blocks.view(torch.float16)[..., position]


def halves(packed: Tensor) -> Tensor:
    """uint8 [..., n] -> [..., 2 n]: all low halves, then all high halves."""
    return torch.cat((packed & 15, packed >> 4), -1)


def bits(packed: Tensor, n_bits: int) -> Tensor:
    """uint8 [..., n] -> [..., 8 / n_bits, n]: the lowest bits of every byte, then the next ones."""
    shifts = torch.arange(0, 8, n_bits, dtype=torch.uint8, device=packed.device)
    return (packed[..., None, :] >> shifts[:, None]) & (2**n_bits - 1)


def words(packed: Tensor, n_bytes: int) -> Tensor:
    """uint8 [..., n_bytes * n] -> [..., n] of little-endian words of 2 or 4 bytes, of which 4 may come out negative."""
    if n_bytes == 4:
        return packed.contiguous().view(torch.int32)
    return packed.contiguous().view(torch.int16).int() & 0xFFFF
