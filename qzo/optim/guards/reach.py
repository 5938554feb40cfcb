"""Whether an update leaves every number finite, asked before it is made: afterwards it cannot be taken back exactly.

An exact answer needs z a second time, and nearly every update is far from the end of its dtype. So a bound is kept for
each parameter group, of a few Python numbers, that costs nothing a step:

    |z| <= 10 for whatever PyTorch draws in fp32, so |g| <= G = 10/n Σ_j |d'_j|
    plain       |u| <= lr G
    momentum    |b| <= B' = momentum B + G,   |u| <= lr B'
    betas       |u| <= lr R,  R the largest |m / (1 - β1^t)| / sqrt(v / (1 - β2^t)) of any g_1 ... g_t (Cauchy-Schwarz)
    |θ'| <= C + |u|, or C (1 + |u|) where updates are relative

Where C passes what the dtype holds, it is measured anew; where it still does, the update is tried out on copies.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

LARGEST_Z = 10.0
LARGEST_MOMENT = 1e18  # whose square is finite in fp32
SAFETY = 1.001  # for the rounding of all this
Options = dict[str, Any]


class Reach:
    """The bound of one parameter group; `None` of a part, that it is to be measured."""

    def __init__(self) -> None:
        self.largest: float | None = None  # C
        self.momentum: float | None = None  # B

    def forget(self) -> None:
        """The tensors were changed from outside."""
        self.largest = self.momentum = None

    def allows(self, group: Options, derivatives: tuple[float, ...], limit: float, updates: int) -> bool:
        """Whether an update by these d' certainly stays below `limit`; if so, it counts as made."""
        assert self.largest is not None
        g = LARGEST_Z * sum(abs(d) for d in derivatives) / len(derivatives)
        momentum, rate = self.momentum or 0.0, abs(float(group["lr"]))
        if rate > torch.finfo(torch.float32).max:  # infinite as a factor, and 0 times that is no number
            return False
        if group.get("betas"):
            beta1, beta2 = group["betas"]
            if g > LARGEST_MOMENT or rate / (1 - beta1) > torch.finfo(torch.float32).max:
                return False
            change = rate * adam_ratio(beta1, beta2, updates)
        elif group.get("momentum"):
            momentum = group["momentum"] * momentum + g
            change = rate * momentum
        else:
            change = rate * g
        largest = SAFETY * (self.largest * (1 + change) if group.get("relative") else self.largest + change)
        if not (largest < limit and max(g, momentum, SAFETY * change) < torch.finfo(torch.float32).max):
            return False
        self.largest, self.momentum = largest, SAFETY * momentum
        return True


def adam_ratio(beta1: float, beta2: float, updates: int) -> float:
    """R of the `updates`-th update, from 1."""
    if beta1 == 0:
        return math.sqrt((1 - beta2**updates) / (1 - beta2))
    if beta2 == 0:
        return math.inf
    r = beta1**2 / beta2
    powers = updates if r == 1 else (1 - r**updates) / (1 - r)
    return (1 - beta1) / (1 - beta1**updates) * math.sqrt((1 - beta2**updates) / (1 - beta2) * powers)


def has_data(tensor: Tensor) -> bool:
    """Whether a tensor has numbers that can be read; meta and fake ones have none."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def largest_of(tensor: Tensor) -> float:
    """max |tensor|, no copy made; 0 for an empty one."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return max(abs(float(low)), abs(float(high)))
