"""CUDA's autocast for tensors without data.

`torch.autocast` passes meta tensors by, so the simulator makes its casts by hand: the operator lists are those of
PyTorch's CUDA autocast (documented under "Autocast Op Reference"), and like there the bf16 copy of a trainable fp32
leaf is made once and kept until the context ends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

LOWER = {
    F.linear, F.conv1d, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.mm, torch.bmm, torch.addmm,
    torch.baddbmm, torch.mv, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, Tensor.mm, Tensor.bmm, Tensor.addmm,
    Tensor.baddbmm, torch.einsum,  # the last by the products it is made of
}  # fmt: skip
FULL = {
    F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.nll_loss, F.softplus, F.group_norm, F.mse_loss,
    torch.softmax, torch.log_softmax, torch.pow, torch.rsqrt, torch.exp, torch.log, torch.cumsum, torch.sum, torch.prod,
    torch.norm, torch.cosine_similarity, Tensor.softmax, Tensor.log_softmax, Tensor.pow, Tensor.__pow__, Tensor.rsqrt,
    Tensor.exp, Tensor.log, Tensor.cumsum, Tensor.sum, Tensor.prod, Tensor.norm,
}  # fmt: skip


class MetaAutocast(TorchFunctionMode):
    """What `torch.autocast("cuda", dtype)` does, on meta tensors.

    Args:
        keep_copies: False makes a copy for each use.
        dtype: bf16 or fp16.
    """

    def __init__(self, keep_copies: bool = True, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.keep_copies, self.dtype = keep_copies, dtype
        self._copies: dict[int, Tensor] = {}
        self._before: tuple[bool, torch.dtype] | None = None

    def __enter__(self) -> MetaAutocast:
        """PEFT and others ask whether autocast is on; for meta tensors the answer changes nothing else."""
        self._before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", self.dtype)
        super().__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._copies.clear()
        if self._before is not None:
            torch.set_autocast_enabled("cuda", self._before[0])
            torch.set_autocast_dtype("cuda", self._before[1])

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        dtype = self.dtype if func in LOWER else torch.float32 if func in FULL else None
        if dtype is not None and kwargs.get("dtype") is None:
            args = tuple(self._cast(item, dtype) for item in args)
            kwargs = {name: self._cast(item, dtype) for name, item in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, item: Any, dtype: torch.dtype) -> Any:
        if not isinstance(item, Tensor) or not item.is_floating_point() or item.dtype is dtype:
            return item
        if not (self.keep_copies and item.is_leaf and item.requires_grad and dtype is self.dtype):
            return item.to(dtype)
        if id(item) not in self._copies:
            self._copies[id(item)] = item.to(dtype)
        return self._copies[id(item)]
