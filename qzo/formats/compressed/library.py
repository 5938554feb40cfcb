"""Modules of the library compressed-tensors, taken over to be trained and given back.

It keeps a quantized layer as an nn.Linear with parameters named as in a checkpoint, without `weight`: a hook of the
whole model makes weights of all of them before its first forward, and lets go of the codes. The same hook would move
every other module, ours too, into the library's caches; layers get one of their own in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qzo.errors import QzoError, required
from qzo.files.folder import one_line
from qzo.formats.compressed.layer import CompressedLinear
from qzo.formats.compressed.scheme import PACKED, scheme_of
from qzo.quiet import quiet_libraries

KINDS = (CompressedLinear,)
SHAPE = "weight_shape"
REMEDY = "load the model, and adopt it before its first forward"


def adopt(module: nn.Module) -> CompressedLinear | None:
    """The layer for a linear layer of the library, on its tensors; None for any other module.

    The hook of a model is taken off, and each of its layers gets one that does the same. Raises QzoError for a layer
    that quantizes more than its weight, or in another way, and for one whose codes are gone or not made yet.
    """
    live: Any = module
    if hasattr(module, "ct_decompress_hook"):
        for part in module.modules():
            if _is_quantized(part):
                _hook(part)
        live.ct_decompress_hook.remove()
        del live.ct_decompress_hook
    if not _is_quantized(module):
        return None
    about = live.quantization_scheme.model_dump(mode="json")
    scheme = scheme_of(about, PACKED)  # a layer that is not compressed yet has no format
    if scheme is None:
        return None
    if not isinstance(module, nn.Linear):
        raise QzoError(f"a {type(module).__name__} that compressed-tensors quantizes cannot be trained, only nn.Linear")
    if live.quantization_status != "compressed":
        raise QzoError(f"its weight is {live.quantization_status.value}, without codes; {REMEDY}")
    tensors = {name: tensor.detach() for name, tensor in module._parameters.items() if tensor is not None}
    bias, _ = tensors.pop("bias", None), tensors.pop(SHAPE, None)
    return CompressedLinear(scheme, (module.out_features, module.in_features), tensors, bias, module)


def release(layer: Any) -> nn.Module:
    """The library's module with the layer's tensors, which makes a weight of them before its first forward."""
    module: Any = layer.origin if layer.origin is not None else _new(layer)
    for name, tensor in layer.stored().items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    module.bias = layer.bias
    return _hook(module)


def _is_quantized(module: nn.Module) -> bool:
    scheme = getattr(module, "quantization_scheme", None)
    return type(scheme).__module__.startswith("compressed_tensors.")


def _hook(module: nn.Module) -> nn.Module:
    if _decompress not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_decompress)
    return module


def _decompress(module: Any, _: Any) -> None:
    """What the library does to a layer with codes before its first forward."""
    if module.quantization_status == "compressed":
        _library("compressors").decompress_module(module)


def _new(layer: CompressedLinear) -> nn.Module:
    """A module of the library without tensors, for a layer that came from a file. Raises QzoError."""
    if layer.g_idx is not None:
        raise QzoError("compressed-tensors no longer has columns in an order of their own (g_idx)")
    quantization: Any = _library("quantization")
    module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    try:
        scheme = quantization.QuantizationScheme.model_validate({**layer.scheme.group, "format": layer.scheme.format})
    except ValueError as error:
        raise QzoError(f"compressed-tensors does not take its config group: {one_line(error)}") from error
    quantization.initialize_module_for_quantization(module, scheme, force_zero_point=False)
    del module.weight
    if layer.scheme.is_packed:
        sizes = torch.tensor([layer.out_features, layer.in_features])
        module.register_parameter(SHAPE, nn.Parameter(sizes, requires_grad=False))
    module.quantization_status = quantization.QuantizationStatus.COMPRESSED
    return module


def _library(part: str) -> Any:
    with quiet_libraries():
        return required(f"compressed_tensors.{part}", "'qzo[compressed-tensors]'")
