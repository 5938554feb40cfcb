"""torchao's AdamW with moments of 8 or 4 bits, on tensors without data.

A moment of at least 4,096 numbers that blocks divide is codes, an fp32 scale a block and a table of fp32 values; any
other is kept in the parameter's dtype. Its step is compiled into kernels that hold no other tensors.

Source: torchao 0.18, optim/{adam,subclass_8bit,subclass_4bit}.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST = 4096  # numbers of a moment that is quantized
BLOCKS = {8: 256, 4: 128}  # numbers that share a scale
KINDS = {"AdamW8bit": 8, "AdamW4bit": 4}


class LowBitStates(torch.optim.Optimizer):
    """The states of torchao's AdamW, and a step that allocates nothing else."""

    def __init__(self, groups: Any, n_bits: int) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.n_bits = n_bits

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if parameter.grad is not None and not state:
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state |= {f"{moment} {part}": item for part, item in moment_of(parameter, self.n_bits).items()}


def moment_of(parameter: Tensor, n_bits: int) -> dict[str, Tensor]:
    """The tensors of one moment."""
    number, block = parameter.numel(), BLOCKS[n_bits]
    if number < LEAST or number % block:
        return {"values": torch.zeros_like(parameter)}
    codes = torch.zeros(number * n_bits // 8, dtype=torch.uint8, device=parameter.device)
    scale = torch.zeros(number // block, device=parameter.device)
    return {"codes": codes, "scale": scale, "table": torch.zeros(2**n_bits, device=parameter.device)}
