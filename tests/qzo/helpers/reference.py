"""A slow twin of QZO and MeZO, equation by equation with full-size tensors, for tests to compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qzo.optim.noise import full_noise


class ReferenceSpsa:
    """One step at a time of arXiv 2505.13430, Algorithm 1.

    θ is fp32. QZO (`masters=True`): θ stays fp32 beside the live tensors and never falls below 0. MeZO
    (`masters=False`): θ is rounded to the dtype of the live tensors after each update. Extra memory: z and two fp32
    copies of everything.

    Args:
        tensors: name -> live tensor; changed in place. Names must come in the optimizer's order.
        lr, eps, clip_threshold, seed: η, ε, C (None: no clipping), and what makes z.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        lr: float,
        eps: float,
        clip_threshold: float | None,
        seed: int,
        masters: bool,
    ) -> None:
        self.tensors, self.masters = tensors, masters
        self.lr, self.eps, self.clip_threshold, self.seed = lr, eps, clip_threshold, seed
        self.theta = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Evaluate, clip, update; returns d before clipping."""
        z = {
            name: full_noise(tensor.shape, self.seed, self.steps, index, tensor.device)
            for index, (name, tensor) in enumerate(self.tensors.items())
        }
        loss_plus = self._loss_at({name: theta + self.eps * z[name] for name, theta in self.theta.items()}, closure)
        loss_minus = self._loss_at({name: theta + -self.eps * z[name] for name, theta in self.theta.items()}, closure)
        d = (loss_plus - loss_minus) / (2 * self.eps)  # Eq. 5
        bound = float("inf") if self.clip_threshold is None else self.clip_threshold
        clipped = min(max(d, -bound), bound)  # Eq. 6
        for name, theta in self.theta.items():
            moved = theta + (-self.lr * clipped) * z[name]
            self.theta[name] = moved.clamp(min=0) if self.masters else moved.to(self.tensors[name].dtype).float()
        self._write(self.theta)
        self.steps += 1
        return d

    def _loss_at(self, point: dict[str, Tensor], closure: Callable[[], Tensor]) -> float:
        self._write(point)
        return float(closure())

    def _write(self, point: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(point[name].to(tensor.dtype))
