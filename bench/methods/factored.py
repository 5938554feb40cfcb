"""An optimizer with next to no state: a gradient's squares are remembered by their rows and columns alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor


class FactoredRms(torch.optim.Optimizer):
    """Adafactor without a first moment, for matrices; `fuse_into_backward` updates each where its gradient is made.

    With G the gradient [R, C] of W:  r <- b r + (1 - b) mean_c(G^2 + 1e-30);  c <- b c + (1 - b) mean_r(G^2 + 1e-30);
    U = G / sqrt(r c / mean(r));  W <- W - lr max(1e-3, rms(W)) U / max(1, rms(U)).
    Source: Shazeer and Stern 2018 (arXiv 1804.04235), algorithm 4; fused as in AdaLomo (arXiv 2310.10195).
    Extra memory of an update: two of the gradient's size.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float, decay: float = 0.999) -> None:
        super().__init__(parameters, {"lr": lr, "decay": decay})

    def fuse_into_backward(self) -> None:
        """From here on backward updates a matrix as soon as its gradient is complete, and drops the gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update_and_drop, group))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    @torch.no_grad()
    def _update_and_drop(self, group: dict, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._update(parameter, parameter.grad, group)
        parameter.grad = None

    def _update(self, parameter: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["rows"] = grad.new_zeros(len(grad), 1)
            state["columns"] = grad.new_zeros(1, grad.shape[1])
        square = grad.square().add_(1e-30)
        rows, columns, kept = state["rows"], state["columns"], group["decay"]
        rows.lerp_(square.mean(1, keepdim=True), 1 - kept)
        columns.lerp_(square.mean(0, keepdim=True), 1 - kept)
        update = torch.mul(rows / rows.mean(), columns, out=square).rsqrt_().mul_(grad)
        update.div_(_rms(update).clamp(min=1.0)).mul_(_rms(parameter).clamp(min=1e-3))
        parameter.sub_(update, alpha=group["lr"])


def _rms(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor) / tensor.numel() ** 0.5
