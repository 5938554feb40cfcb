"""Products with 4-bit weights as bitsandbytes 0.41 and 0.42 run them (autograd/_functions.py, MatMul4Bit).

What goes into a product is an attribute of its node (`ctx.tensors = (A, B)`), which a backward does not free: it lives
until the last name of the loss is bound anew, in a loop of one's own after the next forward. The weight is rebuilt in
the dtype that it was quantized from, and then cast to the input's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function


def old_products(model: nn.Module) -> None:
    """Give every Linear4bit that product; Fabric quantizes from fp16 (plugins/precision/bitsandbytes.py)."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            layer: Any = module
            layer.weight.quant_state.dtype = torch.float16
            layer.forward = partial(_forward, layer)


def _forward(layer: Any, x: Tensor) -> Tensor:
    return MatMul4Bit.apply(x, layer.weight.quant_state, layer.bias)


def _weight(state: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of a nested state the absmax is rebuilt first (functional.py, dequantize_4bit)."""
    absmax = torch.empty(state.absmax.shape, device=device) if state.nested else None
    weight = torch.empty(state.shape, dtype=state.dtype, device=device).to(dtype)
    del absmax
    return weight


class MatMul4Bit(Function):
    """x W^T + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Any, bias: Tensor | None) -> Tensor:
        ctx.state, ctx.tensors = state, (x if ctx.needs_input_grad[0] else None,)
        return F.linear(x, _weight(state, x.dtype, x.device), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = ctx.needs_input_grad[0]
        return torch.matmul(grad, _weight(ctx.state, grad.dtype, grad.device)) if needed else None, None, None
