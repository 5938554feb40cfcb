"""An optimizer with next to no state: a gradient's squares are remembered by their rows and columns alone."""

from __future__ import annotations

from collections.abc import Iterable
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
        for group in self.param_groups:
            for parameter in group["params"]:
                rows, columns = parameter.shape
                self.state[parameter] = {
                    "rows": parameter.new_zeros(rows, 1),
                    "columns": parameter.new_zeros(1, columns),
                }

    def fuse_into_backward(self) -> None:
        """From here on backward updates a matrix as soon as its gradient is complete, and drops the gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(FusedUpdate(self, group))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, group)

    def update(self, parameter: Tensor, grad: Tensor, group: dict) -> None:
        """Update one matrix by its gradient."""
        state = self.state[parameter]
        square = grad.square().add_(1e-30)
        rows, columns, kept = state["rows"], state["columns"], group["decay"]
        rows.lerp_(square.mean(1, keepdim=True), 1 - kept)
        columns.lerp_(square.mean(0, keepdim=True), 1 - kept)
        update = torch.mul(rows / rows.mean(), columns, out=square).rsqrt_().mul_(grad)
        update.div_(_rms(update).clamp(min=1.0)).mul_(_rms(parameter).clamp(min=1e-3))
        parameter.sub_(update, alpha=group["lr"])


class FusedUpdate:
    """A hook that updates a matrix when its gradient is complete, and drops the gradient."""

    repeatable = True  # its memory follows from the matrix's shape, see bench/ledger/repeat_training.py

    def __init__(self, optimizer: FactoredRms, group: dict) -> None:
        self.optimizer, self.group = optimizer, group

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.optimizer.update(parameter, parameter.grad, self.group)
        parameter.grad = None


def _rms(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor) / tensor.numel() ** 0.5
