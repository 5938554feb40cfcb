"""torchao: its tensor subclasses taken over to be trained and given back, and weights it quantizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import OTHER, QzoError, required
from qzo.formats.torchao.layer import AoInt4Linear, AoInt8Linear, AoOrigin
from qzo.quiet import quiet_libraries

KINDS = (AoInt8Linear, AoInt4Linear)
INT8 = ("Int8Tensor", "IntxUnpackedToInt8Tensor")
INT4 = {"Int4Tensor": "plain", "Int4TilePackedTo4dTensor": "tiles", "Int4OpaqueTensor": "cpu"}
DATA = ("qdata", "scale", "zero_point", "scale_and_zero")
OF_INPUTS = (  # what is set where inputs are changed too
    *("act_quant_kwargs", "activation_quantization", "act_mapping_type"),
    *("act_pre_scale", "act_quant_scale", "act_quant_zero_point"),
)
AoLinear = AoInt8Linear | AoInt4Linear


def adopt(module: nn.Module) -> AoLinear | None:
    """The layer for an nn.Linear whose weight is a quantized tensor of torchao, on its data; None for other modules.

    Raises QzoError for weights that torchao quantizes in another way, and where it quantizes the inputs too.
    """
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not type(weight).__module__.startswith("torchao"):
        return None
    names = [*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", [])]
    tensors = {name: value for name in names if (value := getattr(weight, name)) is not None}
    names = [*weight.tensor_attribute_names, *getattr(weight, "optional_tensor_attribute_names", [])]
    attributes = {name: getattr(weight, name) for name in names}
    bias = None if module.bias is None else module.bias.detach()
    return build(AoOrigin(type(weight), attributes, module), tensors, tuple(weight.shape), bias)


def build(origin: AoOrigin, tensors: dict[str, Tensor], shape: tuple[int, ...], bias: Tensor | None) -> AoLinear:
    """The layer for the data of a subclass, by the names that it has there. Raises QzoError."""
    kind = origin.kind if isinstance(origin.kind, str) else origin.kind.__name__
    if kind not in INT8 and kind not in INT4:
        known = ", ".join((*INT8, *INT4))
        raise QzoError(f"a weight of torchao's kind {kind} cannot be trained, only {known}; {OTHER}")
    active = [name for name in OF_INPUTS if origin.attributes.get(name) is not None or name in tensors]
    if active:
        raise QzoError(
            f"the {kind} changes its inputs too ({active[0]}); only weight-only quantization is trained; {OTHER}"
        )
    if len(shape) != 2 or tensors.keys() - set(DATA):
        raise QzoError(f"the {kind} has shape {shape} and the parts {', '.join(sorted(tensors))}, which are not known")
    missing = {"qdata", "scale"} if kind in INT8 else {"qdata", "scale", "zero_point"}
    missing = {"qdata", "scale_and_zero"} if INT4.get(kind, "plain") != "plain" else missing
    if missing - tensors.keys():
        raise QzoError(f"the {kind} has no {min(missing - tensors.keys())}")
    if kind in INT8:
        if tuple(tensors["qdata"].shape) != shape:
            raise QzoError(f"the {kind} of shape {shape} has codes of shape {tuple(tensors['qdata'].shape)}")
        return AoInt8Linear(tensors["qdata"], tensors["scale"], tensors.get("zero_point"), bias, origin)
    scale, offset = _parts(tensors) if "scale_and_zero" in tensors else (tensors["scale"], tensors["zero_point"])
    return AoInt4Linear(INT4[kind], (shape[0], shape[1]), tensors["qdata"], scale, offset, bias, origin)


def data_of(layer: AoLinear) -> dict[str, Tensor]:
    """The data of the subclass, by its names."""
    if isinstance(layer, AoInt8Linear):
        zeros = {} if layer.zero_points is None else {"zero_point": layer.zero_points}
        return {"qdata": layer.codes, "scale": layer.scales, **zeros}
    if layer.order == "plain":
        return {"qdata": layer.codes, "scale": layer.scales, "zero_point": layer.offsets}
    return {"qdata": layer.codes, "scale_and_zero": torch.stack((layer.scales, layer.offsets), dim=-1)}


def release(layer: Any) -> nn.Module:
    """An nn.Linear with the library's tensor on the layer's codes and scales."""
    origin = layer.origin
    kind: Any = getattr(_library(), origin.kind) if isinstance(origin.kind, str) else origin.kind
    module: Any = origin.module
    if module is None:
        module = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    attributes = dict(origin.attributes)
    if "dtype" in attributes:  # of the weight to those who ask
        attributes["dtype"] = layer.compute_dtype
    module.weight = nn.Parameter(kind(**data_of(layer), **attributes), requires_grad=False)
    module.bias = layer.bias
    return module


def quantize(weight: Tensor, bias: Tensor | None = None, group_size: int = -1) -> AoInt8Linear:
    """Quantize `weight` [N, K] as Int8WeightOnlyConfig does; -1 is a scale for the whole row.

    One on `meta` gives an empty layer. The bias is not copied. Raises QzoError, also where the library is missing.
    """
    if weight.is_meta:
        rest = (bias is not None, weight.dtype, weight.device)
        return AoInt8Linear.empty(weight.shape[1], weight.shape[0], group_size, *rest)
    library = _library()
    granularity = library.PerRow() if group_size == -1 else library.PerGroup(group_size)
    tensor = library.Int8Tensor.from_hp(weight.detach(), granularity)
    attributes = {"block_size": tensor.block_size, "dtype": tensor.dtype}
    return AoInt8Linear(tensor.qdata, tensor.scale, tensor.zero_point, bias, AoOrigin("Int8Tensor", attributes))


def _parts(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    both = tensors["scale_and_zero"]
    if both.ndim != 3 or both.shape[2] != 2:
        raise QzoError(f"scale_and_zero has shape {tuple(both.shape)}, need [K / g, N, 2]")
    return both[..., 0].contiguous(), both[..., 1].contiguous()


def _library() -> Any:
    with quiet_libraries():
        return required("torchao.quantization", "'qzo[torchao]'")
