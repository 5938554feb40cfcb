"""A tiny model without transformers, quick to make and alike each time, and a layer of an offset format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qzo.formats.gptq.layer import QuantLinear

BATCH, WIDTH, CLASSES = 16, 64, 8


class OffsetLinear(QuantLinear):
    """w = q s + m as in GGUF Q4_1: the codes of a QuantLinear, an offset `offsets` [K/g, N] beside each scale."""

    offsets: Tensor

    @classmethod
    def from_quantized(cls, layer: QuantLinear) -> OffsetLinear:
        """The same weights: m = -zero * s."""
        made = cls(layer.in_features, layer.out_features, layer.n_bits, layer.group_size)
        made._register(layer.qweight, torch.zeros_like(layer.qzeros), layer.scales, layer.bias)
        made.register_buffer("offsets", -layer.zero_points().to(layer.scales.dtype) * layer.scales)
        return made

    def forward(self, x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, self.group_size)).sum(-1)  # each group's m is added to all its weights
        return super().forward(x) + groups @ self.offsets.to(x.dtype)


class Tiny(nn.Module):
    """Two quantized layers and a plain head on fixed inputs; `loss()` is the cross entropy of a batch."""

    def __init__(self, dtype: torch.dtype = torch.float32, offset: bool = False, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        weights = [torch.randn(WIDTH, WIDTH, generator=generator).to(dtype) * 0.2 for _ in range(2)]
        layers = [QuantLinear.from_weight(weight, None, 4, 32, symmetric=False) for weight in weights]
        self.first, self.second = [OffsetLinear.from_quantized(layer) if offset else layer for layer in layers]
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype).requires_grad_(False)
        self.head = nn.Linear(WIDTH, CLASSES, dtype=dtype).requires_grad_(False)
        self.head.weight.copy_(torch.randn(CLASSES, WIDTH, generator=generator) * 0.2)
        self.head.bias.zero_()
        self.x = torch.randn(64, BATCH, WIDTH, generator=generator).to(dtype)
        self.y = torch.randint(CLASSES, (64, BATCH), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x + self.second(torch.tanh(self.first(x)))))

    def loss(self, step: int = 0) -> Tensor:
        """Mean cross entropy of batch number `step`, in fp32."""
        return nn.functional.cross_entropy(self(self.x[step % 64]).float(), self.y[step % 64])
