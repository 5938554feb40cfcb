"""LitGPT's own model (lit_gpt/model.py, lora.py; fused qkv, LoRA inside of it) and its loss in chunks, without data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

HEAD_CHUNK = 128  # tokens: lm_head_chunk_size of finetune/lora.py, and the chunk of utils.chunked_cross_entropy
IGNORED = -1


@dataclass(frozen=True)
class Shape:
    """What a model is: `lora` are those of query, key, value, projection, mlp and head that are adapted."""

    layers: int
    width: int
    heads: int
    groups: int
    head_dim: int
    inner: int
    vocabulary: int
    gated: bool = True  # LLaMAMLP
    rms: bool = True
    norm_dtype: torch.dtype | None = None  # that RMSNorm computes in; None: the input's
    parallel: bool = False
    shared_norm: bool = False
    bias: bool = False
    head_bias: bool = False
    tied: bool = False
    rotated: float = 1.0
    rank: int = 0
    dropout: float = 0.0
    lora: tuple[str, ...] = ()


class RmsNorm(nn.Module):
    """In the input's dtype in 2023 (lit_gpt/rmsnorm.py), later in fp32 (litgpt/model.py)."""

    def __init__(self, width: int, dtype: torch.dtype, inner: torch.dtype | None) -> None:
        super().__init__()
        self.inner = inner or dtype
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.to(self.inner)
        norm = torch.mean(x * x, dim=-1, keepdim=True)
        return (x * torch.rsqrt(norm + 1e-5) * self.weight.to(self.inner)).to(dtype)


class Lora(nn.Module):
    """linear(x) + scaling * (dropout(x) A^T) B^T; for `parts` of a fused product B is a grouped convolution."""

    def __init__(self, rows: int, columns: int, shape: Shape, dtype: torch.dtype, parts: tuple[int, ...] = ()) -> None:
        super().__init__()
        bias = shape.head_bias if rows == shape.vocabulary else shape.bias
        self.linear = nn.Linear(columns, rows, bias, device="meta", dtype=dtype)
        self.dropout, self.parts, self.rows = shape.dropout, parts, rows
        adapted = sum(parts) or rows
        rank = shape.rank * max(1, len(parts))
        self.lora_A = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device="meta"))
        self.lora_B = nn.Parameter(torch.empty(adapted, shape.rank, dtype=dtype, device="meta"))
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


class Attention(nn.Module):
    """Causal attention with one product for queries, keys and values."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        queries, keys = shape.heads * shape.head_dim, shape.groups * shape.head_dim
        parts = [size for name, size in (("query", queries), ("key", keys), ("value", keys)) if name in shape.lora]
        self.attn = _linear(queries + 2 * keys, shape.width, shape, dtype, tuple(parts), bool(parts))
        self.proj = _linear(shape.width, queries, shape, dtype, (), "projection" in shape.lora)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        shape, each = self.shape, self.shape.heads // self.shape.groups
        qkv = self.attn(x).view(batch, tokens, shape.groups, each + 2, shape.head_dim).permute(0, 2, 3, 1, 4)
        query, key, value = qkv.split((each, 1, 1), dim=2)
        if shape.groups != 1:
            key, value = (item.expand(batch, shape.groups, each, tokens, shape.head_dim) for item in (key, value))
        query, key, value = (item.reshape(batch, -1, tokens, shape.head_dim) for item in (query, key, value))
        turned = int(shape.rotated * shape.head_dim)
        query, key = (torch.cat((_rope(item[..., :turned], cos, sin), item[..., turned:]), -1) for item in (query, key))
        if key.shape[1] != query.shape[1]:
            key, value = (item.expand(-1, query.shape[1], -1, -1) for item in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        return self.proj(out.reshape(batch, tokens, -1))


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class Mlp(nn.Module):
    """LLaMAMLP, or GptNeoxMLP where it is not gated."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        adapted = "mlp" in shape.lora
        self.fc_1 = _linear(shape.inner, shape.width, shape, dtype, (), adapted)
        self.fc_2 = _linear(shape.inner, shape.width, shape, dtype, (), adapted) if shape.gated else None
        self.proj = _linear(shape.width, shape.inner, shape, dtype, (), adapted)

    def forward(self, x: Tensor) -> Tensor:
        if self.fc_2 is None:
            return self.proj(F.gelu(self.fc_1(x)))
        first, second = self.fc_1(x), self.fc_2(x)
        return self.proj(F.silu(first) * second)


class Block(nn.Module):
    """Attention and MLP one after the other, or side by side."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.parallel = shape.parallel
        self.norm_1 = _norm(shape, dtype)
        self.attn = Attention(shape, dtype)
        self.norm_2 = None if shape.shared_norm else _norm(shape, dtype)
        self.mlp = Mlp(shape, dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first = self.norm_1(x)
        attended = self.attn(first, cos, sin)
        if self.parallel:
            return x + attended + self.mlp(first if self.norm_2 is None else self.norm_2(x))
        x = x + attended
        return x + self.mlp(self.norm_2(x)) if self.norm_2 is not None else x


class Gpt(nn.Module):
    """The model; a call gives `loss`, and keeps the chunks of logits as long as its result lives."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, torch.device("meta")
        self.config = SimpleNamespace(use_cache=False, model_type="litgpt")
        self._keep_in_fp32_modules, self.all_tied_weights_keys = None, dict[str, str]()  # its quantizer asks for them
        self.wte = nn.Embedding(shape.vocabulary, shape.width, device="meta", dtype=dtype)
        self.h = nn.ModuleList(Block(shape, dtype) for _ in range(shape.layers))
        self.ln_f = _norm(shape, dtype)
        self.lm_head = _linear(shape.vocabulary, shape.width, shape, dtype, (), "head" in shape.lora, shape.head_bias)
        if shape.tied:
            getattr(self.lm_head, "linear", self.lm_head).weight = self.wte.weight

    def get_output_embeddings(self) -> nn.Module:
        """The head, which stays in 16 bits."""
        return getattr(self.lm_head, "linear", self.lm_head)

    def requires_grad_(self, requires_grad: bool = True) -> Gpt:
        """Of what can have a gradient: packed codes cannot."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and parameter.is_floating_point())
        return self

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        turned = int(self.shape.rotated * self.shape.head_dim)
        cos, sin = (self.wte.weight.new_empty(input_ids.shape[1], turned) for _ in range(2))
        x = self.wte(input_ids)
        for block in self.h:
            x = block(x, cos, sin)
        logits = [self.lm_head(part) for part in self.ln_f(x).split(HEAD_CHUNK, dim=1)]
        logits[-1] = logits[-1][..., :-1, :]
        return SimpleNamespace(loss=_chunked_loss(logits, labels[..., 1:]), logits=logits)


def _chunked_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Cross entropy chunk by chunk, then the mean of what is no padding (lit_gpt/utils.py, chunked_cross_entropy)."""
    sizes = [part.shape[1] for part in logits]
    flat = [part.reshape(-1, part.shape[-1]) for part in logits]
    wanted = [part.reshape(-1) for part in targets.split(sizes, dim=1)]
    losses = [F.cross_entropy(a, b, ignore_index=IGNORED, reduction="none") for a, b in zip(flat, wanted, strict=True)]
    return torch.cat(losses).sum() / (targets != IGNORED).sum()


def _linear(
    rows: int, columns: int, shape: Shape, dtype: torch.dtype, parts: tuple[int, ...], adapted: bool,
    bias: bool | None = None,
) -> nn.Module:  # fmt: skip
    if adapted:
        return Lora(rows, columns, shape, dtype, parts)
    return nn.Linear(columns, rows, shape.bias if bias is None else bias, device="meta", dtype=dtype)


def _norm(shape: Shape, dtype: torch.dtype) -> nn.Module:
    return (
        RmsNorm(shape.width, dtype, shape.norm_dtype)
        if shape.rms
        else nn.LayerNorm(shape.width, device="meta", dtype=dtype)
    )


def built(shape: Shape) -> Callable[[torch.dtype], nn.Module]:
    """The model in a dtype."""
    return lambda dtype: Gpt(shape, dtype)


def only_adapters(model: nn.Module) -> None:
    """`mark_only_lora_as_trainable`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def keep_inputs(model: nn.Module) -> None:
    """bitsandbytes 0.41 keeps what goes into a 4-bit product for a backward that does not look at it
    (autograd/_functions.py, MatMul4Bit: `ctx.tensors = (A, B)`).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.forward = partial(_keeping, module.forward)


def _keeping(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return KeptInput.apply(forward(x), x)


class KeptInput(Function):
    """`out`, whose node holds `x` until its backward."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
