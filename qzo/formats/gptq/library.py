"""GPTQ layers of the library gptqmodel, taken over to be trained and given back, see `qzo.formats.gptqmodel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.gptqmodel import GPTQ, give_back, kernel_of, take_over

KINDS = (QuantLinear,)
release = give_back


def adopt(module: nn.Module) -> QuantLinear | None:
    """A QuantLinear on the tensors of a GPTQ module of gptqmodel; None for any other module. Raises QzoError."""
    if kernel_of(module) not in GPTQ:
        return None
    live: Any = module
    sizes: dict[str, Any] = {"group_size": live.group_size, "bias": live.bias is not None, "device": "meta"}
    layer = QuantLinear.empty(live.in_features, live.out_features, live.bits, **sizes)
    take_over(layer, module)
    layer.read_layout()
    return layer
