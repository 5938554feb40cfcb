"""Losses of closures: held where they are until the last of a step was evaluated, then read together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qzo.errors import QzoError


def held(loss: Tensor | float) -> Tensor | float:
    """A loss that is still to be read: a number, or a copy in fp64 on the device that it is on, which nobody waits for.

    Raises QzoError for a tensor of more than one number.
    """
    if not isinstance(loss, Tensor):
        return float(loss)
    if loss.numel() != 1:
        raise QzoError(f"the closure returned a tensor of shape {tuple(loss.shape)}; return a scalar loss")
    return float(loss) if loss.device.type == "cpu" else loss.detach().reshape(()).to(torch.float64, copy=True)


def read(losses: Sequence[Sequence[Tensor | float | None]]) -> list[float]:
    """The sum of each list of losses; the CPU waits for a GPU once, for all of them."""
    there = [loss for part in losses for loss in part if isinstance(loss, Tensor)]
    together = len({loss.device for loss in there}) == 1
    values = iter(torch.stack(there).tolist() if together else map(float, there))
    return [sum(next(values) if isinstance(loss, Tensor) else loss or 0.0 for loss in part) for part in losses]
