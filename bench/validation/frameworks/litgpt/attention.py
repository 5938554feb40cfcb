"""LitGPT's attention: one product for queries, keys and values, and a prompt that all tokens attend to (adapter.py)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.validation.frameworks.litgpt.linear import linear
from bench.validation.frameworks.litgpt.shape import Shape

PROMPT_LENGTH, FIRST_LAYER = 10, 2  # adapter_prompt_length, adapter_start_layer


class Attention(nn.Module):
    """Causal attention with one product for queries, keys and values.

    The prompt's keys and values are computed at validation, before the first step, and kept for good without gradients
    (`adapter_kv_cache`): only their gate is trained.
    """

    adapter_keys: Tensor
    adapter_values: Tensor

    def __init__(self, shape: Shape, dtype: torch.dtype, layer: int) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        sizes = (("query", queries), ("key", keys), ("value", keys))
        parts = tuple(size for name, size in sizes if name in shape.lora)
        self.attn = linear(queries + 2 * keys, shape.width, shape, dtype, "qkv", parts)
        self.proj = linear(shape.width, queries, shape, dtype, "projection")
        self.gating_factor: nn.Parameter | None = None
        if shape.prompt and layer >= FIRST_LAYER:
            self.adapter_wte = nn.Embedding(PROMPT_LENGTH, shape.width, device="meta", dtype=dtype)
            self.gating_factor = nn.Parameter(torch.empty(1, 1, shape.heads, 1, device="meta", dtype=dtype))
            for name in ("adapter_keys", "adapter_values"):
                cached = torch.empty(1, shape.heads, PROMPT_LENGTH, shape.head_dim, device="meta", dtype=dtype)
                self.register_buffer(name, cached, persistent=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        shape, each = self.shape, self.shape.heads // self.shape.groups
        qkv = self.attn(x).view(batch, tokens, shape.groups, each + 2, shape.head_dim).permute(0, 2, 3, 1, 4)
        query, key, value = qkv.split((each, 1, 1), dim=2)
        if each > 1:
            key, value = (item.expand(batch, shape.groups, each, tokens, shape.head_dim) for item in (key, value))
        query, key, value = (item.reshape(batch, -1, tokens, shape.head_dim) for item in (query, key, value))
        turned = int(shape.rotated * shape.head_dim)
        query, key = (torch.cat((_rope(item[..., :turned], cos, sin), item[..., turned:]), -1) for item in (query, key))
        attended = self._capped(query, key, value) if shape.softcapping else self._attended(query, key, value)
        return self.proj(attended.reshape(batch, tokens, -1))

    def _attended(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        if self.gating_factor is None:
            return out
        mask = torch.ones(query.shape[2], PROMPT_LENGTH, dtype=torch.bool, device=query.device)
        prompted = F.scaled_dot_product_attention(query, self.adapter_keys, self.adapter_values, mask).transpose(1, 2)
        return out + self.gating_factor * prompted

    def _capped(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * 1.0
        scores = torch.tanh(scores / 50.0) * 50.0
        mask = torch.ones(scores.shape[-2:], dtype=query.dtype, device=query.device).triu(diagonal=1)
        mask.masked_fill_(mask.bool(), torch.finfo(query.dtype).min)
        scores = scores + mask
        scores = F.softmax(scores, dim=-1, dtype=torch.float).to(query.dtype)
        return (scores @ value).transpose(1, 2)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables are in fp32: they are made anew for the longest text, outside of Fabric's 16 bits."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return ((x * cos) + (turned * sin)).to(x.dtype)
