"""Parameter groups: what may be in one, told before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from qzo.errors import QzoError

Group = dict[str, Any]
TRAINABLE = (torch.float32, torch.float16, torch.bfloat16)


def unique(params: Any) -> list[Any]:
    """Tensors or (name, tensor) pairs, each tensor once: tied parameters must not move twice."""
    if isinstance(params, Tensor):
        params = [params]
    first: dict[int, Any] = {}
    for item in params.items() if isinstance(params, dict) else params:
        first.setdefault(id(item[1] if isinstance(item, tuple) else item), item)
    return list(first.values())


def check_options(group: Group) -> None:
    """Raise QzoError for lr, eps or clip_threshold out of range."""
    lr, eps, clip = group["lr"], group["eps"], group["clip_threshold"]
    if not lr >= 0:
        raise QzoError(f"lr={lr} is negative; choose lr >= 0")
    if not eps > 0:
        raise QzoError(f"eps={eps} is not positive; choose eps > 0, e.g. 1e-3")
    if clip is not None and not clip > 0:
        raise QzoError(f"clip_threshold={clip} is not positive; choose a positive one, or None for no clipping")


def check_tensor(item: Any) -> None:
    """Raise QzoError unless the tensor, or (name, tensor), can be trained in place."""
    name, tensor = item if isinstance(item, tuple) else ("a tensor", item)
    if not isinstance(tensor, Tensor):
        raise QzoError(f"{name} is a {type(tensor).__name__}, not a tensor; pass e.g. qzo.scales(model)")
    if tensor.dtype not in TRAINABLE:
        raise QzoError(
            f"{name} has dtype {tensor.dtype}; only float32, float16 and bfloat16 tensors can be trained: convert it, "
            "or leave it out"
        )
    if tensor.is_inference():
        raise QzoError(f"{name} was made under torch.inference_mode and cannot change; use torch.no_grad instead")
    try:
        tensor.detach().view(-1)
    except RuntimeError as error:
        strides = tuple(tensor.stride())
        raise QzoError(f"{name} has strides {strides} and no flat view; make it contiguous() first") from error


def check_sign(name: str, tensor: Tensor) -> None:
    """Raise QzoError for a negative scale, which max(Δ, 0) would wipe out."""
    if has_negative(tensor):
        raise QzoError(f"{name} has negative values, which max(Δ, 0) would set to 0; give its group nonnegative=False")


def has_negative(tensor: Tensor) -> bool:
    """Whether a number is below 0; meta and fake tensors hold no data."""
    has_data = not tensor.is_meta and not isinstance(tensor, FakeTensor)
    return has_data and tensor.numel() > 0 and float(tensor.detach().min()) < 0
