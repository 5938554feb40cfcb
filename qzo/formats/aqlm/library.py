"""Modules of the library `aqlm`, taken over to be trained, and given back."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from qzo.errors import QzoError, required
from qzo.formats.aqlm.layer import AqlmLinear
from qzo.quiet import quiet_libraries

KINDS = (AqlmLinear,)


def adopt(module: nn.Module) -> AqlmLinear | None:
    """An AqlmLinear on the tensors of a module of the `aqlm` library; None for any other module.

    The library's CPU path turns `codes` to [K/ig, N/og, C] at the first forward, and leaves them so: they are seen in
    the old order, without a copy. Raises QzoError for codes of another shape.
    """
    library = sys.modules.get("aqlm")
    if library is None or not isinstance(module, library.QuantizedLinear):
        return None
    live: Any = module
    codes = live.codes.detach()
    layer = AqlmLinear(
        codes.transpose(0, 1) if _is_turned(live) else codes, live.codebooks.detach(), live.scales.detach(), live.bias
    )
    if (layer.out_features, layer.in_features) != (module.out_features, module.in_features):
        raise QzoError(f"codes have shape {tuple(codes.shape)}, which does not fit the layer; load it again")
    return layer


def release(layer: Any) -> nn.Module:
    """A module of the library on the same tensors, in the checkpoint's order, its kernel not chosen yet.

    Raises QzoError where the library is missing.
    """
    layout, bias = layer.layout, layer.bias
    with quiet_libraries():
        library = required("aqlm", "'qzo[aqlm]'")
    module: nn.Module = library.QuantizedLinear(
        layer.in_features,
        layer.out_features,
        layout.in_group_size,
        layout.out_group_size,
        layout.num_codebooks,
        layout.nbits_per_codebook,
        bias=bias is not None,
        device="meta",
    )
    for name, buffer in layer.named_buffers(recurse=False):
        setattr(module, name, nn.Parameter(buffer.contiguous(), requires_grad=False))
    if bias is not None:
        module.bias = bias
    return module


def _is_turned(module: Any) -> bool:
    """Whether the library has turned the codes. Where both orders have one shape, the forward that did it tells."""
    rows, columns = module.out_features // module.out_group_size, module.in_features // module.in_group_size
    if rows != columns:
        return bool(module.codes.shape[0] == columns)
    has_run = module.gemv_op is not None
    return has_run and module.codes.device.type != "cuda" and module.codebook_size == 256
