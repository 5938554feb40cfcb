"""A slow twin of QZO and MeZO, equation by equation with full-size tensors, for tests to compare with; and of Philox,
element by element with Python's integers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

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
        distribution: of z by Philox; None, N(0, 1) by PyTorch's generator.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        lr: float,
        eps: float,
        clip_threshold: float | None,
        seed: int,
        masters: bool,
        distribution: str | None = None,
    ) -> None:
        self.tensors, self.masters, self.distribution = tensors, masters, distribution
        self.lr, self.eps, self.clip_threshold, self.seed = lr, eps, clip_threshold, seed
        self.theta = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
        self.z: dict[str, Tensor] = {}  # of the last step
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Evaluate, clip, update; returns d before clipping."""
        z = self.z = {name: self._noise(tensor, index) for index, (name, tensor) in enumerate(self.tensors.items())}
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

    def _noise(self, tensor: Tensor, index: int) -> Tensor:
        key = (self.seed, self.steps, index)
        if self.distribution is None:
            return full_noise(tensor.shape, *key, tensor.device)
        z = [z_of(element, self.distribution, *key) for element in range(tensor.numel())]
        return torch.tensor(z, dtype=torch.float32).view(tensor.shape)

    def _loss_at(self, point: dict[str, Tensor], closure: Callable[[], Tensor]) -> float:
        self._write(point)
        return float(closure())

    def _write(self, point: dict[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(point[name].to(tensor.dtype))


def z_of(element: int, distribution: str, seed: int, step: int, index: int, direction: int = 0) -> float:
    """z of one element, as `qzo.kernels.philox` defines it."""
    bits = {"rademacher": 1, "binomial": 16}[distribution]
    share = 128 // bits
    number, part = 16 * (element // (16 * share)) + element % 16, element // 16 % share * bits
    words = philox_block((number, index, direction, step), (seed % 2**64 % 2**32, seed % 2**64 // 2**32))
    count = (words[part // 32] >> part % 32 & 2**bits - 1).bit_count()
    return 2 * count - 1 if distribution == "rademacher" else (count - 8) / 2


@cache
def philox_block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox 4x32-10, as Salmon et al. write it (Parallel random numbers: as easy as 1, 2, 3; 2011)."""
    mask = 2**32 - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & mask, (first >> 32) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3
