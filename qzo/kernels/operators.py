"""Codes to weights by PyTorch's operators, where no compiled code does it."""

from __future__ import annotations

import torch
from torch import Tensor

BITS_OF_2_POW_23 = 0x4B000000  # of the fp32 number 2**23


def columns(codes: Tensor, zeros: Tensor | int, scale: Tensor) -> Tensor:
    """Wᵀ = (codes - zeros) * scale, fp32 [K, n], in the memory of `codes`; with a `scale` to be trained, beside it.

    Codes become fp32 where they are: an integer c < 2**23 in the mantissa of 2**23 is the number 2**23 + c, and taking
    2**23 + zero off it is exact.

    Args:
        codes: int32 [K, n], overwritten.
        zeros: int32 [G, n], overwritten, or the one zero point of all.
        scale: [G, n], fp32 or less; K // G rows of codes in turn share a row of it.
    """
    grouped = _plus_2_pow_23(codes).view(len(scale), -1, codes.shape[1])
    grouped.sub_(_plus_2_pow_23(zeros)[:, None] if isinstance(zeros, Tensor) else 2.0**23 + zeros)
    grouped = grouped * scale[:, None] if scale.requires_grad else grouped.mul_(scale[:, None])
    return grouped.view(codes.shape)


def _plus_2_pow_23(integers: Tensor) -> Tensor:
    return integers.bitwise_or_(BITS_OF_2_POW_23).view(torch.float32)
