"""Cross entropy of some tokens at a time, each chunk's logits made again in backward.

Source: TRL 1.10, trainer/sft_trainer.py, `_chunked_cross_entropy_loss`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.methods.losses.logits import IGNORED


class ChunkedLoss:
    """Cross entropy of `size` tokens at a time, each chunk's logits made again in backward (TRL 1.10).

    Head and hidden states are made fp32 for each chunk; accuracy and entropy, which TRL logs, are part of a chunk.
    """

    def __init__(self, size: int, options: dict[str, Any], scale: float, softcap: float | None) -> None:
        self.size, self.options, self.scale, self.softcap = size, options, scale, softcap

    def __call__(self, hidden: Tensor, head: Any, labels: Tensor, items: Any) -> Tensor:
        rows = hidden[..., :-1, :].reshape(-1, hidden.size(-1))
        targets = labels[..., 1:].reshape(-1)
        valid = targets != IGNORED
        order = valid.to(torch.int8).argsort(descending=True, stable=True)
        rows, targets = rows[order], targets[order]
        sums = [rows.new_zeros((), dtype=torch.float32) for _ in range(3)]
        for start in range(0, len(rows), self.size):
            span = slice(start, start + self.size)
            parts = checkpoint(self._chunk, rows[span], head.weight, head.bias, targets[span], **self.options)
            sums = [total + part for total, part in zip(sums, parts, strict=True)]
        return sums[0] / (valid.sum() if items is None else items)

    def _chunk(self, rows: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, ...]:
        logits = rows.float() @ weight.float().t()
        if bias is not None:
            logits = logits + bias.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        log_p = F.log_softmax(logits, dim=-1)
        loss = F.nll_loss(log_p, targets, ignore_index=IGNORED, reduction="sum")
        valid = targets != IGNORED
        correct = ((logits.argmax(dim=-1) == targets) & valid).sum().float()
        entropy = (-(log_p.exp() * log_p).sum(dim=-1) * valid).sum()
        return loss, correct, entropy
