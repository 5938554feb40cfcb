"""LitGPT's model (lit_gpt/model.py) and its loss in chunks (utils.py), as Fabric runs them in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.validation.frameworks.litgpt.attention import Attention
from bench.validation.frameworks.litgpt.linear import linear
from bench.validation.frameworks.litgpt.shape import ADAPTER_V2, Shape

HEAD_CHUNK = 128  # tokens: lm_head_chunk_size of finetune/lora.py, and the chunk of utils.chunked_cross_entropy
IGNORED = -1


class RmsNorm(nn.Module):
    """In fp32 since October 2023 (lit_gpt/rmsnorm.py), before the resource tables were published."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.offset = shape.unit_offset
        self.weight = nn.Parameter(torch.empty(shape.width, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        norm = torch.mean(x * x, dim=-1, keepdim=True)
        normed = x * torch.rsqrt(norm + 1e-5)
        weight = (1 + self.weight) if self.offset else self.weight
        return (normed * weight.float()).to(dtype)


class Mlp(nn.Module):
    """LLaMAMLP or GemmaMLP, or GptNeoxMLP where it is not gated."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc_1 = linear(shape.inner, shape.width, shape, dtype, "mlp")
        self.fc_2 = linear(shape.inner, shape.width, shape, dtype, "mlp") if shape.gated else None
        self.proj = linear(shape.width, shape.inner, shape, dtype, "mlp")
        self.act = F.gelu if shape.gelu or not shape.gated else F.silu

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc_1(x)
        if self.fc_2 is None:
            return self.proj(self.act(first))
        second = self.fc_2(x)
        return self.proj(self.act(first) * second)


class Block(nn.Module):
    """Attention and MLP one after the other, or side by side."""

    def __init__(self, shape: Shape, dtype: torch.dtype, layer: int) -> None:
        super().__init__()
        self.parallel = shape.parallel
        self.norm_1 = _norm(shape, dtype)
        self.attn = Attention(shape, dtype, layer)
        self.norm_2 = None if shape.shared_norm else _norm(shape, dtype)
        self.mlp = Mlp(shape, dtype)
        after = [_norm(shape, dtype) if shape.norms_after else nn.Identity() for _ in range(2)]
        self.post_attention_norm, self.post_mlp_norm = after

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first = self.norm_1(x)
        attended = self.post_attention_norm(self.attn(first, cos, sin))
        if self.parallel:
            return self.mlp(first if self.norm_2 is None else self.norm_2(x)) + attended + x
        x = attended + x
        return self.post_mlp_norm(self.mlp(self.norm_2(x))) + x if self.norm_2 is not None else x


class Gpt(nn.Module):
    """The model; a call gives `loss`. `logits` is the loop's own name, bound anew before the next loss is computed.

    The head comes first, as in LitGPT, and is a layer as all others: Fabric quantizes every nn.Linear.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.device = shape, dtype, torch.device("meta")
        self.config = SimpleNamespace(use_cache=False, model_type="litgpt")
        self._keep_in_fp32_modules, self.all_tied_weights_keys = None, dict[str, str]()  # its quantizer asks for them
        self.logits: list[Tensor] = []
        self.chunked = bool(shape.lora or shape.prompt)  # full.py has one product for the head
        self.lm_head = linear(shape.vocabulary, shape.width, shape, dtype, "head")
        self.wte = nn.Embedding(shape.vocabulary, shape.width, device="meta", dtype=dtype)
        self.h = nn.ModuleList(Block(shape, dtype, layer) for layer in range(shape.layers))
        self.ln_f = _norm(shape, dtype)

    def get_output_embeddings(self) -> None:
        """None that a quantizer should leave in 16 bits."""

    def requires_grad_(self, requires_grad: bool = True) -> Gpt:
        """Of what can have a gradient: packed codes cannot."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad and parameter.is_floating_point())
        return self

    def forward(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Any:
        turned = int(self.shape.rotated * self.shape.head_dim)
        size = input_ids.shape[1], turned
        cos, sin = (torch.empty(size, dtype=torch.float32, device=input_ids.device) for _ in range(2))
        x = self.wte(input_ids)
        if self.shape.scaled:
            x = x * self.shape.width**0.5
        for block in self.h:
            x = block(x, cos, sin)
        parts = self.ln_f(x).split(HEAD_CHUNK if self.chunked else x.shape[1], dim=1)
        logits = [self.lm_head(part) for part in parts]
        del x, parts
        logits = [part.float() for part in logits]  # what Fabric does to all outputs (HalfPrecision.convert_output)
        self.logits = logits
        return SimpleNamespace(loss=_chunked_loss(logits, labels[..., 1:]))


def _chunked_loss(logits: list[Tensor], targets: Tensor) -> Tensor:
    """Cross entropy by 128 tokens, then the mean of what is no padding (lit_gpt/utils.py, chunked_cross_entropy)."""
    logits = [*logits[:-1], logits[-1][:, :-1]]  # nothing follows the last token: where it is a chunk, none is left
    flat = [part.reshape(-1, part.shape[-1]) for part in logits]
    wanted = [part.reshape(-1) for part in targets.split(logits[0].shape[1], dim=1)]
    if len(flat) == 1:
        flat, wanted = list(flat[0].split(HEAD_CHUNK)), list(wanted[0].split(HEAD_CHUNK))
    losses = [F.cross_entropy(a, b, ignore_index=IGNORED, reduction="none") for a, b in zip(flat, wanted, strict=False)]
    return torch.cat(losses).sum() / (targets != IGNORED).sum()


def _norm(shape: Shape, dtype: torch.dtype) -> nn.Module:
    return RmsNorm(shape, dtype) if shape.rms else nn.LayerNorm(shape.width, device="meta", dtype=dtype)


def built(shape: Shape) -> Callable[[torch.dtype], nn.Module]:
    """The model in a dtype."""
    return lambda dtype: Gpt(shape, dtype)


def only_adapters(model: nn.Module) -> None:
    """`mark_only_lora_as_trainable`, `mark_only_adapter_as_trainable`, and Adapter V2's, which trains norms too."""
    shape: Any = getattr(model, "shape", None)
    parts = ["lora_", "adapter_", "gating_factor"] + ["norm_", "ln_f"] * (shape.prompt == ADAPTER_V2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in parts))
