"""AdamW whose states, and gradients too where it is asked for, wait in the host's memory; the step is taken there.

Parameters below 4,096 numbers stay with an optimizer on the device. A gradient goes as soon as it is complete; the
device keeps its own until the step, unless gradients are offloaded, which does not go with accumulating them.

Source: torchao 0.18, optim/cpu_offload.py, CPUOffloadOptimizer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.cases.recipes.recipe import Recipe
from qzo.errors import QzoError

LEAST = 4096  # numbers of a parameter whose states go
OFFLOADS = ("states", "gradients")


class HostStates(torch.optim.Optimizer):
    """On the device: the states of small parameters alone.

    Args:
        parameters: all that is trained.
        gradients: whether a gradient goes as soon as it is complete.
    """

    def __init__(self, parameters: list[nn.Parameter], gradients: bool) -> None:
        super().__init__(parameters, {"lr": 0.0})
        small = [parameter for parameter in parameters if parameter.numel() < LEAST]
        self.on_device = torch.optim.AdamW(small, lr=0.0, foreach=True) if small else None
        if gradients:
            for parameter in parameters:
                if parameter.numel() >= LEAST:
                    parameter.register_post_accumulate_grad_hook(_drop)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.on_device is not None:
            self.on_device.step()


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def host_states_of(recipe: Recipe, model: nn.Module) -> HostStates:
    """The optimizer of a recipe with `optimizer_offload`. Raises QzoError for another word, another optimizer than
    AdamW, a model that is in the host's memory already, and gradients that are accumulated and offloaded.
    """
    asked, optim = recipe.optimizer_offload, recipe.arguments.get("optim", "adamw_torch")
    if asked not in OFFLOADS:
        raise QzoError(f"optimizer_offload={asked!r} of a recipe is unknown; choose {' or '.join(OFFLOADS)}")
    if optim not in ("adamw_torch", "adamw_torch_fused"):
        raise QzoError(
            f"optimizer_offload is simulated with adamw_torch, not with optim={optim}; leave one of them out"
        )
    if asked == "gradients" and recipe.arguments.get("gradient_accumulation_steps", 1) > 1:
        raise QzoError("gradients that are offloaded cannot be accumulated; choose optimizer_offload=states")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.device.type == "cpu" for parameter in trained):
        raise QzoError(
            "optimizer_offload needs a model on a GPU; on the CPU there is nowhere to offload to: leave it out"
        )
    return HostStates(trained, asked == "gradients")
