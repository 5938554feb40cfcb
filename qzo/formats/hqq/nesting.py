"""Scales and zero points of HQQ that are quantized themselves, as old versions of the library wrote them.

A tensor t becomes 8-bit codes in groups of its own, with meta = {nbits, group_size, axis, shape, packing, scale, zero}:
t = (codes - meta.zero) * meta.scale. Such scales are un-nested to be trained, and nested again to be written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.formats.hqq.codes import unpacked
from qzo.formats.layer import SCALE_DTYPES

LEAST_SCALE = 5e-5  # the library's too: below it, zero points leave the range of fp16


def unnest(codes: Any, meta: Any, shape: tuple[int, int]) -> Tensor:
    """The numbers, in the dtype that the library computes them in. Raises QzoError for other layouts than 8 bits."""
    settings = meta if isinstance(meta, dict) else {}
    scale: Any = settings.get("scale")
    zero: Any = settings.get("zero")
    dtype = settings.get("compute_dtype", torch.float16)
    tensors = [tensor for tensor in (codes, scale, zero) if isinstance(tensor, Tensor)]
    if len(tensors) < 3 or settings.get("packing") != "8bit_u8" or codes.dtype != torch.uint8 or codes.ndim != 2:
        raise QzoError("scales or zero points are quantized in a way that is not known; need 8 bits")
    if dtype not in SCALE_DTYPES or codes.numel() != shape[0] * shape[1] or not _fits(codes, scale, zero):
        raise QzoError(f"scales or zero points are {codes.numel()} quantized numbers, need {shape}")
    numbers = unpacked(codes, 8, 0, len(codes), dtype)
    return ((numbers - zero) * scale).to(dtype).reshape(shape)


def nest(values: Tensor, codes: Tensor, meta: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Codes and meta of new values, in the groups of the old ones."""
    old: Tensor = meta["scale"]
    matrix = values.float().reshape(codes.shape)
    axes = [axis for axis in range(2) if old.ndim < 2 or old.shape[axis] == 1]
    low, high = matrix.amin(axes, keepdim=True), matrix.amax(axes, keepdim=True)
    scale = ((high - low) / 255).clamp_(min=LEAST_SCALE if old.dtype == torch.float16 else 1e-12).to(old.dtype)
    zero = (-low / scale.float()).to(old.dtype)
    new = (matrix / scale.float() + zero.float()).round_().clamp_(0, 255).to(torch.uint8)
    return new, {**meta, "scale": scale.view(old.shape), "zero": zero.view(old.shape)}


def _fits(codes: Tensor, scale: Tensor, zero: Tensor) -> bool:
    """Whether scale and zero are one number, or one of each row or column."""
    return scale.shape == zero.shape and tuple(scale.shape) in ((), (1, 1), (len(codes), 1), (1, codes.shape[1]))
