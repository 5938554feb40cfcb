"""Which attention kernel a case runs, and that kernel for the simulator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.case import BenchCase
from bench.catalog import ModelSource, supports_sdpa
from qzo.errors import QzoError

aten = torch.ops.aten
FLASH_HEAD_DIM = 256  # the largest head that FlashAttention takes


def attention_of(case: BenchCase, source: ModelSource, flash: bool) -> str:
    """The case's own choice; without one flash where the device has it, else efficient, eager where SDPA is no option.

    Raises QzoError if the case asks for a kernel that the architecture cannot use.
    """
    if supports_sdpa(source):
        return case.attention or ("flash" if flash else "efficient")
    if case.attention in (None, "eager"):
        return "eager"
    raise QzoError(f"{source.name} caps its attention scores, which {case.attention} attention cannot; choose eager")


def attend(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The attention kernel that CUDA runs for q, k, v [batch, heads, tokens, head_dim].

    Flash takes no mask and no fp32, so those go to the memory-efficient kernel, as PyTorch's own choice does.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if kernel == "flash" and half and attn_mask is None and query.shape[-1] <= FLASH_HEAD_DIM:
        head_dim = query.shape[-1]
        if head_dim % 8:  # PyTorch pads the head to a multiple of eight and slices the result
            query, key, value = (F.pad(item, (0, 8 - head_dim % 8)) for item in (query, key, value))
        out = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        return out[..., :head_dim]
    if enable_gqa:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype) if attn_mask.dtype is torch.bool else attn_mask
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    log_sumexp = torch.is_grad_enabled() and any(item.requires_grad for item in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, log_sumexp, dropout_p, is_causal, scale=scale
    )[0]
