"""Mixtral's experts as transformers 4 had them: layers of their own, which can be quantized one by one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Expert(nn.Module):
    """w2(act(w1 x) * w3 x)."""

    def __init__(self, hidden: int, inner: int, act: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = nn.Linear(hidden, inner, bias=False, device="meta", dtype=dtype)
        self.w2 = nn.Linear(inner, hidden, bias=False, device="meta", dtype=dtype)
        self.w3 = nn.Linear(hidden, inner, bias=False, device="meta", dtype=dtype)
        self.act = act

    def forward(self, hidden: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(hidden)) * self.w3(hidden))


class SparseBlock(nn.Module):
    """Tokens gathered for one expert after the other (4.48: modeling_mixtral.py, MixtralSparseMoeBlock)."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        stacked, router = block.experts, block.gate
        dtype = stacked.down_proj.dtype
        self.top_k, self.number = router.top_k, stacked.num_experts
        self.gate = nn.Linear(router.hidden_dim, self.number, bias=False, device="meta", dtype=dtype)
        sizes = stacked.hidden_dim, stacked.intermediate_dim
        self.experts = nn.ModuleList(Expert(*sizes, stacked.act_fn, dtype) for _ in range(self.number))

    def forward(self, hidden: Tensor) -> Tensor:
        shape = hidden.shape
        hidden = hidden.view(-1, shape[-1])
        weights, chosen = torch.topk(F.softmax(self.gate(hidden), dim=1, dtype=torch.float), self.top_k, dim=-1)
        weights = (weights / weights.sum(dim=-1, keepdim=True)).to(hidden.dtype)
        total = torch.zeros_like(hidden)
        mask = F.one_hot(chosen, num_classes=self.number).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            position, token = torch.where(mask[index])
            found = expert(hidden[None, token].reshape(-1, shape[-1])) * weights[token, position, None]
            total.index_add_(0, token, found.to(hidden.dtype))
        return total.reshape(shape)


def separate_experts(model: nn.Module) -> None:
    """Put such blocks in the place of those whose experts are stacked."""
    for parent in list(model.modules()):
        for name, block in list(parent.named_children()):
            if type(block).__name__ == "MixtralSparseMoeBlock":
                setattr(parent, name, SparseBlock(block))
