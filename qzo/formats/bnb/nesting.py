"""Double quantization of bitsandbytes: scales in 8 bits, undone for training and done again where they are stored.

    scale[b] = map[c[b]] absmax[b // 256] + offset

with codes c uint8 [B], absmax fp32 [ceil(B / 256)], a map fp32 [256] and a scalar offset, the mean of all scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzo.errors import required
from qzo.quiet import quiet_libraries

NESTED_BLOCK = 256


def unnest(codes: Tensor, absmax: Tensor, quant_map: Tensor, offset: float) -> Tensor:
    """Scales fp32 [B] of nested ones, to the bit those that the library computes with. Needs 8 bytes a scale more."""
    values = torch.nn.functional.embedding(codes.int().view(-1), quant_map.view(-1, 1)).view(-1)
    scale = absmax.repeat_interleave(NESTED_BLOCK)[: len(values)]
    return values.mul_(scale).add_(offset)


def nest(scales: Tensor, quant_map: Tensor) -> tuple[Tensor, Tensor, float]:
    """Scales fp32 [B] -> codes uint8 [B], absmax fp32 [ceil(B / 256)], offset: the library's own rounding, on a CPU.

    That rounding is not always to the nearest: on a CPU the library takes the neighbour for about 0.15 % of all scales,
    those that lie closest to the middle between two. Raises QzoError without the library.
    """
    scales = scales.detach().to("cpu", torch.float32)
    offset = scales.mean()
    codes, state = library().functional.quantize_blockwise(
        scales - offset, code=quant_map.cpu(), blocksize=NESTED_BLOCK
    )
    return codes, state.absmax, float(offset)


def library() -> Any:
    """The package bitsandbytes. Raises QzoError where it is missing."""
    with quiet_libraries():
        return required("bitsandbytes", "bitsandbytes")
