"""GPTQ layers of 4 or 8 bits as AutoGPTQ's Triton kernels train on them, on tensors without data.

A product unpacks the layer's whole weight in 16 bits, forward and backward (AutoGPTQ, nn_modules/triton_utils/
dequant.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

GROUP_SIZE = 128  # what GPTQ checkpoints have that do not say another
WORD_BITS = 32


class Product(Function):
    """x [N, K] times the unpacked weight [K, N]; nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        ctx.layer = layer
        return x @ layer.unpacked(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad @ ctx.layer.unpacked(grad).t(), None


class GptqLinear(nn.Linear):
    """A linear layer of packed codes; PEFT adapts it as it adapts a linear layer."""

    def __init__(self, layer: nn.Linear, bits: int, group_size: int | None) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        del self.weight
        self.weight = None  # type: ignore[assignment]
        rows, columns, groups = (
            layer.in_features,
            layer.out_features,
            -(-layer.in_features // (group_size or layer.in_features)),
        )
        each = WORD_BITS // bits
        self.register_buffer("qweight", torch.empty(rows // each, columns, dtype=torch.int32, device="meta"))
        self.register_buffer("qzeros", torch.empty(groups, columns // each, dtype=torch.int32, device="meta"))
        self.register_buffer("scales", torch.empty(groups, columns, dtype=torch.float16, device="meta"))
        self.register_buffer("g_idx", torch.empty(rows, dtype=torch.int32, device="meta"))
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.data.half(), requires_grad=False)

    def unpacked(self, like: Tensor) -> Tensor:
        """The weight [K, N] in fp16."""
        return torch.empty(self.in_features, self.out_features, dtype=torch.float16, device=like.device)

    def forward(self, x: Tensor) -> Tensor:
        out = Product.apply(x.reshape(-1, self.in_features).half(), self)
        out = out.reshape(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def to_gptq(bits: int, group_size: int | None = GROUP_SIZE) -> Callable[[nn.Module], None]:
    """The change that packs all linear layers but the head; PEFT leaves what is not packed in 16 bits.

    `group_size` None: one scale a column.
    """

    def change(model: nn.Module) -> None:
        head = model.get_output_embeddings()  # type: ignore[operator]
        for parent in list(model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear) and layer is not head:
                    setattr(parent, name, GptqLinear(layer, bits, group_size))
        model.quantization_method = "gptq"  # type: ignore[assignment]  # what PEFT's preparation looks at
        model.is_loaded_in_4bit = True  # type: ignore[assignment]

    return change
