"""Linear layers of LitGPT: plain, with LoRA (lora.py), with a scale and a bias behind them (adapter_v2.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.validation.frameworks.litgpt.shape import ADAPTER_V2, Shape


class Lora(nn.Module):
    """linear(x) + scaling * (dropout(x) A^T) B^T; for `parts` of a fused product B is a grouped convolution."""

    def __init__(self, linear: nn.Linear, shape: Shape, parts: tuple[int, ...]) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        self.linear, self.dropout, self.parts, self.rows = linear, shape.dropout, parts, rows
        adapted = sum(parts) or rows
        rank = shape.rank * max(1, len(parts))
        self.lora_A = _parameter(rank, columns, like=linear)
        self.lora_B = _parameter(adapted, shape.rank, like=linear)
        self.lora_ind: Tensor
        self.register_buffer("lora_ind", torch.empty(adapted, dtype=torch.long, device="meta"), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        dropped = F.dropout(x, self.dropout, self.training)
        if not self.parts:
            return out + (dropped @ self.lora_A.transpose(0, 1) @ self.lora_B.transpose(0, 1)) * 0.5
        inner = F.linear(dropped, self.lora_A).transpose(-2, -1)
        weights = self.lora_B.unsqueeze(-1).split(self.parts)
        pieces = [F.conv1d(a, b) for a, b in zip(inner.chunk(len(self.parts), dim=1), weights, strict=True)]
        after = torch.cat(pieces, dim=1).transpose(-2, -1)
        if after.shape[-1] != self.rows:
            padded = after.new_zeros(*after.shape[:-1], self.rows)
            after = padded.index_copy_(-1, self.lora_ind, after)
        return out + after * 0.5


class Scaled(nn.Module):
    """scale * (linear(x) + bias), both trained."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.adapter_bias, self.adapter_scale = (_parameter(linear.out_features, like=linear) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter_scale * (self.linear(x) + self.adapter_bias)


def linear(
    rows: int, columns: int, shape: Shape, dtype: torch.dtype, part: str, parts: tuple[int, ...] = (),
) -> nn.Module:  # fmt: skip
    """The layer [rows, columns] of a part of the model, adapted where the shape says so."""
    bias = shape.head_bias if part == "head" else shape.bias
    plain = nn.Linear(columns, rows, bias, device="meta", dtype=dtype)
    if shape.prompt == ADAPTER_V2:
        return Scaled(plain)
    return Lora(plain, shape, parts) if parts or part in shape.lora else plain


def _parameter(*sizes: int, like: nn.Linear) -> nn.Parameter:
    return nn.Parameter(torch.empty(*sizes, dtype=like.weight.dtype, device="meta"))
