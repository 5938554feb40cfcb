"""The autograd functions of Liger's layers: what they allocate, in its order, and what they keep for backward.

A Triton kernel has no tensors of its own; what it computes is computed here on tensors with data, and not on those
without.

Source: Liger 0.8.2, ops/{rms_norm,swiglu,geglu,rope}.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.methods.optimizers.in_place import has_data, numbers, write

MULTIPROCESSORS = 132  # rows of the weight's partial gradients; of an H100, and another card's are as good as nothing
GELU = np.sqrt(2 / np.pi), 0.044715


class RmsNorm(torch.autograd.Function):
    """x [..., H], weight [H] -> x / rms(x) * (weight + offset). Keeps x and one fp32 number a row; the gradient of x
    takes the place of the output's where `in_place`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, in_place: bool) -> Tensor:
        rows = x.contiguous().view(-1, x.shape[-1])
        out = torch.empty_like(rows)
        scale = rows.new_empty(len(rows), dtype=torch.float32)
        if has_data(rows):
            values = numbers(rows)
            scale.numpy()[:] = 1 / np.sqrt((values**2).mean(-1) + eps)
            write(out, values * scale.numpy()[:, None] * (numbers(weight) + offset))
        ctx.offset, ctx.in_place = offset, in_place
        ctx.save_for_backward(rows, weight, scale)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        of_out = grad.contiguous().view(rows.shape)
        partial = torch.empty((MULTIPROCESSORS, rows.shape[1]), dtype=torch.float32, device=rows.device)
        of_rows = of_out if ctx.in_place else torch.zeros_like(of_out)
        if has_data(rows):
            x, incoming, each = numbers(rows), numbers(of_out), scale.numpy()[:, None]
            partial.numpy()[:] = 0
            partial.numpy()[0] = (incoming * x * each).sum(0)
            inner = incoming * (numbers(weight) + ctx.offset)
            write(of_rows, each * (inner - each**2 * (inner * x).mean(-1, keepdims=True) * x))
        return of_rows.view(grad.shape), partial.sum(dim=0).to(weight.dtype), None, None, None


class GatedProduct(torch.autograd.Function):
    """gate, up [..., F] -> activation(gate) * up. Keeps both, and puts their gradients in their place."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        shape = gate.shape
        gate, up = (item.contiguous().view(-1, item.shape[-1]) for item in (gate, up))
        out = torch.empty_like(gate)
        if has_data(out):
            write(out, _activation(numbers(gate), gelu)[0] * numbers(up))
        ctx.gelu = gelu
        ctx.save_for_backward(gate, up)
        return out.view(shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        shape, grad = grad.shape, grad.contiguous().view(gate.shape)
        if has_data(gate):
            value, slope = _activation(numbers(gate), ctx.gelu)
            incoming, other = numbers(grad), numbers(up)
            write(gate, incoming * slope * other)
            write(up, incoming * value)
        return gate.view(shape), up.view(shape), None


def _activation(x: np.ndarray, gelu: bool) -> tuple[np.ndarray, np.ndarray]:
    """SiLU, or GELU by tanh, and its slope."""
    if not gelu:
        sigmoid = 1 / (1 + np.exp(-x))
        return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))
    factor, cubic = GELU
    tanh = np.tanh(factor * (x + cubic * x**3))
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * factor * (1 + 3 * cubic * x**2)


class Rotary(torch.autograd.Function):
    """q, k [B, heads, T, D], cos, sin [B, T, D] -> q and k turned, in their own memory where it is [B, T, heads, D].

    Keeps cos and sin alone.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(q, cos, sin), _turned(k, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return (*(_turned(grad, cos, sin, back=True) for grad in grads), None, None)


def _turned(heads: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    rows = heads.transpose(1, 2).contiguous()  # [B, T, heads, D]
    if has_data(rows):
        x, half = numbers(rows), rows.shape[-1] // 2
        c, s = (numbers(item)[:, :, None, :half] for item in (cos, sin))
        s = -s if back else s
        first, second = x[..., :half], x[..., half:]
        write(rows, np.concatenate([first * c - second * s, second * c + first * s], -1))
    return rows.transpose(1, 2)
