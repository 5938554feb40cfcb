"""How many weights share a scale, chosen by the widths of a model's linear layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import nn

from qzo.errors import QzoError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_SIZES = (128, 64, 32)  # tried in this order


def default_group_size(model: PreTrainedModel) -> int:
    """The largest of 128, 64 and 32 that divides the in_features of every linear layer but the output head; layers that
    not even 32 divides do not count, for they stay in 16 bits.

    Linear layers are nn.Linear, GPT-2's Conv1D and the stacked experts of mixture models. Raises QzoError if none does.
    """
    widths = linear_widths(model)
    held = [width for width in widths if width % GROUP_SIZES[-1] == 0]
    if not held:
        raise QzoError(
            f"no group size of {', '.join(map(str, GROUP_SIZES))} divides in_features={min(widths)} of "
            f"{type(model).__name__}; choose {math.gcd(*widths)} or a divisor of it as group_size"
        )
    return next(size for size in GROUP_SIZES if all(width % size == 0 for width in held))


def linear_widths(model: PreTrainedModel) -> set[int]:
    """The in_features of every linear layer (as `default_group_size` counts them) but the output head."""
    from bench.cases.pretrained import Conv1D

    widths = set()
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            widths.add(module.in_features)
        elif isinstance(module, Conv1D):
            widths.add(module.weight.shape[0])  # [in, out]
        elif hasattr(module, "is_transposed"):  # stacked experts: [experts, out, in], or [experts, in, out] transposed
            side = 1 if module.is_transposed else 2
            widths |= {weight.shape[side] for weight in module.parameters(recurse=False) if weight.dim() == 3}
    return widths
