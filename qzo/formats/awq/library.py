"""AWQ layers of the library gptqmodel, taken over to be trained and given back, see `qzo.formats.gptqmodel`."""

from __future__ import annotations

from typing import Any

from torch import nn

from qzo.errors import QzoError
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.gptqmodel import AWQ, give_back, kernel_of, take_over

KINDS = (AwqLinear,)
release = give_back


def adopt(module: nn.Module) -> AwqLinear | None:
    """An AwqLinear on the tensors of an AWQ module of gptqmodel; None for any other module. Raises QzoError."""
    kernel = kernel_of(module)
    if kernel not in AWQ:
        return None
    live: Any = module
    if live.bits != AwqLinear.n_bits:
        raise QzoError(f"a {kernel} with {live.bits} bits cannot be taken over; AWQ needs {AwqLinear.n_bits}")
    sizes: dict[str, Any] = {"group_size": live.group_size, "bias": live.bias is not None, "device": "meta"}
    layer = AwqLinear.empty(live.in_features, live.out_features, **sizes)
    take_over(layer, module)
    return layer
