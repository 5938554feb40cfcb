"""Small constant tensors, made once for each device: making one takes as long as unpacking a small layer with it."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


def constant(values: tuple[int, ...], like: Tensor) -> Tensor:
    """`values` as a 1-D tensor of the dtype and device of `like`; not to be changed."""
    if like.is_meta or isinstance(like, FakeTensor):  # belong to the mode they were made in
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return _kept(values, like.dtype, like.device)


@cache
def _kept(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
