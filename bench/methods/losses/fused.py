"""Cross entropy fused with the head: gradients are made in forward, one chunk of logits at a time.

A Triton kernel turns a chunk of logits into its own gradient; here `_loss_and_gradient` does so on tensors with data,
and nothing on those without, since the kernel has no tensors of its own.

Source: Liger 0.8.2, ops/fused_linear_cross_entropy.py and transformers/model/loss_utils.py; for a head in fp32 under
autocast what it does on compute capability 8.0 and above.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.methods.losses.logits import IGNORED, bent
from bench.methods.losses.tiled import add_product
from bench.methods.optimizers.in_place import has_data, numbers, write


class FusedLoss:
    """Cross entropy whose gradients are made in forward, one chunk of logits at a time (Liger).

    A chunk has the power of two of tokens at or above tokens / ceil(V / H), so that its logits are about as large as
    the hidden states. Gradients of hidden states and of a trained head live from forward to backward.
    """

    def __init__(self, scale: float, softcap: float | None) -> None:
        self.scale, self.softcap = scale, softcap

    def __call__(self, hidden: Tensor, head: Any, labels: Tensor, items: Any) -> Tensor:
        targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous()
        loss = _Fused.apply(
            hidden.view(-1, hidden.size(-1)), head.weight, targets.view(-1), head.bias, self.softcap, items
        )
        return loss if items is None else loss / items


def fused_chunk(tokens: int, words: int, width: int) -> int:
    """Tokens of a chunk, for hidden states [tokens, width] and a head [words, width]."""
    share = -(-tokens // -(-words // width))
    return 1 << (share - 1).bit_length()


class _Fused(torch.autograd.Function):
    """(hidden [N, H], weight [V, H], targets [N], bias) -> the sum of losses, or their mean where `items` is None."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: Any, items: Any
    ) -> Tensor:
        wanted = hidden.requires_grad
        size = fused_chunk(len(hidden), *weight.shape)
        of_hidden = torch.zeros_like(hidden)
        of_weight = torch.zeros_like(weight) if wanted and weight.requires_grad else None
        of_bias = torch.zeros_like(bias) if wanted and bias is not None else None
        losses = hidden.new_zeros(len(hidden), dtype=torch.float32)
        mask = targets != IGNORED
        counted = mask.sum()
        mean = 1.0 if items is not None or not has_data(mask) else 1.0 / max(int(counted), 1)
        for start in range(0, len(hidden), size):
            span = slice(start, start + size)
            rows = hidden[span]
            logits = rows @ weight.t()
            if bias is not None:
                logits = logits + bias
            _loss_and_gradient(logits, losses[span], targets[span], mean, softcap)
            if wanted:
                of_hidden[span] = logits @ weight
            if of_weight is not None and wanted:
                if of_weight.dtype is torch.float32 and logits.dtype in (torch.float16, torch.bfloat16):
                    add_product(of_weight, logits.t(), rows.to(logits.dtype))
                else:
                    of_weight += torch.mm(logits.t(), rows).float()
            if of_bias is not None:
                torch.add(of_bias, logits.sum(dim=0), out=of_bias)
        ctx.save_for_backward(of_hidden.detach(), of_weight, of_bias)
        return torch.sum(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        for gradient in (of_hidden, of_weight, of_bias):
            if gradient is not None and has_data(gradient):
                write(gradient, numbers(gradient) * float(grad))
        return of_hidden, of_weight, None, of_bias, None, None


def _loss_and_gradient(logits: Tensor, losses: Tensor, targets: Tensor, mean: float, softcap: float | None) -> None:
    """Losses of a chunk; its logits become their gradient."""
    if not has_data(logits):
        return
    z = bent(numbers(logits), 1.0, softcap)
    slope = 1.0 if softcap is None else 1 - (z / softcap) ** 2
    maximum = z.max(-1, keepdims=True)
    log_z = maximum[:, 0] + np.log(np.exp(z - maximum).sum(-1))
    label = targets.numpy()
    valid = label != IGNORED
    at = np.arange(len(label))[valid], label[valid]
    losses.numpy()[valid] = (log_z[valid] - z[at]) * mean
    p = np.exp(z - log_z[:, None])
    p[at] -= 1
    p[~valid] = 0
    write(logits, p * mean * slope)
