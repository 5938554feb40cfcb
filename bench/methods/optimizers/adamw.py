"""AdamW for the two full fine-tuning conventions that need more than `torch.optim.AdamW(...)`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 24  # elements updated at a time: the fp32 temporaries stay at 64 MiB each


def fused_adamw(parameters: Iterable[Tensor], lr: float) -> torch.optim.AdamW:
    """torch's fused AdamW, the Trainer's default with torch 2.8 or newer: moments in the parameters' dtype, no copies.

    On parameters without data the state is made by a hook: torch refuses to make it there, but runs the step.
    """
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
    optimizer.register_step_pre_hook(make_state_without_data)
    return optimizer


def make_state_without_data(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Hook before a step of torch's fused AdamW: its state, as the step itself would make it on a device."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.is_meta and parameter.grad is not None and not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device="meta"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


class MixedAdamW(torch.optim.Optimizer):
    """AdamW with fp32 moments for 16-bit parameters and gradients, which torch's own refuses.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  w <- w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps),
    computed in fp32 chunk by chunk and rounded once. Source: Loshchilov and Hutter 2019, without weight decay.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 1e-5, eps: float = 1e-8) -> None:
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.999), "eps": eps})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        step_size = group["lr"] / (1 - beta1 ** state["step"])
        correction = 1 / (1 - beta2 ** state["step"])
        flat = [item.view(-1) for item in (parameter, grad, state["exp_avg"], state["exp_avg_sq"])]
        for part in _parts(parameter):
            weight, gradient, mean, square = (item[part] for item in flat)
            gradient = gradient.float()
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            torch.mul(square, correction, out=gradient).sqrt_().add_(group["eps"])
            weight.copy_(weight.float().addcdiv_(mean, gradient, value=-step_size))


def _parts(tensor: Tensor) -> list[slice]:
    """What is updated at a time; without data the first two and the last, as those between hold the same memory."""
    starts: Sequence[int] = range(0, tensor.numel(), CHUNK)
    if tensor.is_meta and len(starts) > 3:
        starts = (*starts[:2], starts[-1])
    return [slice(start, start + CHUNK) for start in starts]
