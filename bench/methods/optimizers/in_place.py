"""A kernel without tensors of its own, on a CPU: arithmetic in NumPy, which PyTorch's allocator knows nothing of."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_data(tensor: Tensor) -> bool:
    """Whether there is something to compute with: neither on meta nor what stands for a tensor of the CPU."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def numbers(tensor: Tensor) -> np.ndarray:
    """A copy in fp32."""
    if tensor.dtype is torch.bfloat16:
        return (tensor.view(torch.int16).numpy().astype(np.int32) << 16).view(np.float32)
    return tensor.detach().numpy().astype(np.float32)


def write(tensor: Tensor, values: np.ndarray) -> None:
    """`values` into the tensor's own memory, rounded to its dtype (bf16: to even)."""
    if tensor.dtype is torch.bfloat16:
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tensor.view(torch.int16).numpy()[...] = rounded.astype(np.uint16).view(np.int16)
    else:
        tensor.detach().numpy()[...] = values
