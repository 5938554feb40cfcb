"""The kernels of scaled_dot_product_attention as CUDA runs them, on tensors without data."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.simulator.cuda.attention import AMPERE, HALF, Call, Capability, choose_backend, preference, refuse_unable

aten = torch.ops.aten

HEAD_MULTIPLE = 8  # attention.cpp, pad_last_dim: FlashAttention takes no other heads
MASK_MULTIPLE = 8  # attention.cpp, preprocess_mask: strides of a mask that the memory-efficient kernel takes as it is


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
    *,
    gpu: Capability = AMPERE,
    strict: bool = False,
    ran: set[str] | None = None,
) -> Tensor:
    """What CUDA runs for q [batch, heads, tokens, head_dim] where `kernel` is preferred.

    With "efficient" key and value heads are repeated first, as that kernel wants them. What `kernel` cannot run goes
    to the next one in PyTorch's order; under `strict` it raises QzoError. A model whose attention is "eager" may call
    it elsewhere, and gets PyTorch's own choice. The name of what ran goes into `ran`.
    """
    if kernel == "eager":
        kernel, strict = preference(gpu)[0], False
    if kernel == "efficient" and enable_gqa:
        key, value = repeated(query, key, value)
    call = Call(
        query.dtype, query.shape[-1], attn_mask is not None, _needs_gradient(query, key, value), dropout_p, is_causal,
        query.shape[1] != key.shape[1], query.shape[2], key.shape[2], value.shape[-1],
    )  # fmt: skip
    if strict:
        refuse_unable(kernel, gpu, call)
    chosen = choose_backend(gpu, call, kernel)
    if ran is not None:
        ran.add(chosen)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        hidden = torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device)
        attn_mask = torch.where(attn_mask, 0.0, hidden)
    run: dict[str, Callable[..., Tensor]] = {"flash": _flash, "efficient": _efficient, "cudnn": _cudnn, "math": _math}
    return run[chosen](query, key, value, attn_mask, dropout_p, is_causal, scale)


def repeated(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value heads, each as often as query heads share it."""
    repeat = query.shape[1] // key.shape[1]
    if repeat == 1:
        return key, value
    return key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    head_dim = query.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    if head_dim % HEAD_MULTIPLE:
        padding = HEAD_MULTIPLE - head_dim % HEAD_MULTIPLE
        query, key, value = (F.pad(item, (0, padding)) for item in (query, key, value))
    out = aten._scaled_dot_product_flash_attention(query, key, value, dropout, causal, scale=scale)[0]
    return out[..., :head_dim]


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    if mask is not None:
        keys = mask.shape[-1]
        if any(stride % MASK_MULTIPLE for stride in mask.stride()[:-1]):
            mask = F.pad(mask, (0, MASK_MULTIPLE - keys % MASK_MULTIPLE))[..., :keys]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    log_sumexp = _needs_gradient(query, key, value)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, log_sumexp, dropout, causal, scale=scale
    )[0]


def _cudnn(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    log_sumexp = _needs_gradient(query, key, value)
    return aten._scaled_dot_product_cudnn_attention(
        query, key, value, mask, log_sumexp, dropout, causal, False, scale=scale
    )[0]


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    """Scores in full, in fp32 for half-precision inputs (attention.cpp, _scaled_dot_product_attention_math)."""
    dtype = query.dtype
    if dtype in HALF:
        query, key, value = query.float(), key.float(), value.float()
    factor = math.sqrt(query.shape[-1] ** -0.5 if scale is None else abs(scale))
    query = query * factor
    if causal:
        visible = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
        hidden = torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device)
        mask = torch.where(visible, 0.0, hidden)
        del visible
    key, value = repeated(query, key, value)
    scores = query @ (key.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    weights = aten._safe_softmax(scores, -1)
    del scores
    if dropout:
        weights = aten.native_dropout(weights, dropout, True)[0]
    return (weights @ value).to(dtype)
