"""What quantized layers share: a forward that rebuilds the weight part by part, and the dtype of their scales."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from qzo.kernels.rebuilt import chunk_bounds, chunked_linear


def frozen(bias: Tensor | None) -> nn.Parameter | None:
    """A bias as a parameter that is not trained; its data is not copied."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)


class RebuiltLinear(nn.Module, ABC):
    """y = x Wᵀ + bias for a W [N, K] that a child rebuilds from codes and `scales`, a few rows at a time.

    `bias` is a frozen parameter [N] or None. `scales` is what QZO trains: the next forward sees a change of it.
    """

    in_features: int
    out_features: int
    scales: Tensor
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N] in x's dtype; differentiable in x and, where it requires a gradient, in `scales`."""
        y = self._product(x)
        return y if self.bias is None else y.add_(self.bias)

    def _product(self, x: Tensor) -> Tensor:
        """x Wᵀ as a tensor of its own, which may be changed in place."""
        return chunked_linear(x, self._rows, (self.out_features, self.in_features), self.scales)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The whole weight [N, K], for export and tests; forward never calls it."""
        bounds = chunk_bounds(self.out_features, self.in_features)
        return torch.cat([self._rows(start, stop, dtype, self.scales) for start, stop in bounds])

    @abstractmethod
    def _rows(self, start: int, stop: int, dtype: torch.dtype, scales: Tensor) -> Tensor:
        """Rows start:stop of W [stop - start, K], differentiable in `scales`."""


Device = torch.device | str | None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 scales beside fp32 weights, else fp16, the dtype of GPTQ checkpoints."""
    return torch.float32 if dtype == torch.float32 else torch.float16
