"""Modules of the `gptqmodel` library in memory: GPTQ and AWQ layers taken over on the same tensors, and given back.

Of its many kernels, those here keep the checkpoint's layout until their first forward. Some then repack the codes and
copy the scales (TorchAtenLinear, TorchFusedLinear and their AWQ twins; on a CPU the library picks such a one unasked):
what is written into `scales` afterwards changes nothing. Such a module can be taken over before its first forward, not
after. Whatever a module's `qzero_format()` says, these kernels take `qzeros` for true zero points (gptqmodel 7.7.0).
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.gptq.layer import QuantLinear

GPTQ = ("TorchLinear", "TritonV2Linear", "TorchAtenLinear", "TorchFusedLinear", "TorchCpuAvx512Linear")
AWQ = (
    "AwqTorchLinear",
    "AwqGEMMLinear",
    "AwqGEMMTritonLinear",
    "TorchAtenAwqLinear",
    "TorchFusedAwqLinear",
    "TorchCpuAvx512AwqLinear",
)
REMEDY = "load it with backend=BACKEND.GPTQ_TORCH or BACKEND.AWQ_TORCH, or with qzo.load"


class AdoptedGptq(QuantLinear):
    """A QuantLinear on the tensors of a module of gptqmodel, which `release` gives back."""

    def release(self) -> nn.Module:
        """The module it was made of, with the scales as they are now."""
        return _given_back(self)


class AdoptedAwq(AwqLinear):
    """An AwqLinear on the tensors of a module of gptqmodel, which `release` gives back."""

    def release(self) -> nn.Module:
        """The module it was made of, with the scales as they are now."""
        return _given_back(self)


def adopt(module: nn.Module) -> AdoptedGptq | AdoptedAwq | None:
    """A layer on the tensors of a quantized module of gptqmodel; None for any other module.

    The module's forward and the layer's compute the same. Tensors made under torch.inference_mode, as those of a model
    quantized in this process are, cannot be changed in place: such scales are copied.

    Raises QzoError for a kernel whose layout is not known, one that has repacked its codes, and settings that no
    checkpoint layout here has.
    """
    library = sys.modules.get("gptqmodel.nn_modules.qlinear")
    if library is None or not isinstance(module, library.BaseQuantLinear):
        return None
    live: Any = module
    kernel = type(module).__name__
    if kernel not in GPTQ + AWQ:
        raise QzoError(f"the codes of gptqmodel's kernel {kernel} are not known here; {REMEDY}")
    if live.adapter is not None or live.online_full_had or live.online_partial_had:
        raise QzoError(f"a {kernel} with an adapter or a rotation cannot be taken over; {REMEDY}")
    if getattr(live, "planar", False):
        raise QzoError(f"a {kernel} with planar {live.bits}-bit codes cannot be taken over; load another format")
    layer = _layer(live, kernel)
    _take_tensors(layer, live, kernel)
    return layer


def _layer(live: Any, kernel: str) -> AdoptedGptq | AdoptedAwq:
    """The layer, on meta as yet."""
    sizes: dict[str, Any] = {"group_size": live.group_size, "bias": live.bias is not None, "device": "meta"}
    if kernel in GPTQ:
        made: Any = AdoptedGptq.empty(live.in_features, live.out_features, live.bits, **sizes)
    elif live.bits == AwqLinear.n_bits:
        made = AdoptedAwq.empty(live.in_features, live.out_features, **sizes)
    else:
        raise QzoError(f"a {kernel} with {live.bits} bits cannot be taken over; AWQ needs {AwqLinear.n_bits}")
    layer: AdoptedGptq | AdoptedAwq = made
    return layer


def _take_tensors(layer: Any, live: Any, kernel: str) -> None:
    """Give the layer the module's tensors. Raises QzoError where they have another layout than it."""
    for name, wanted in list(layer.named_buffers(recurse=False)):
        tensor = getattr(live, name, None)
        if not isinstance(tensor, Tensor) or not _alike(tensor, wanted):
            raise QzoError(
                f"gptqmodel's kernel {kernel} has repacked its {name}, and computes with a copy of its scales; adopt "
                f"the model before its first forward, or {REMEDY}"
            )
    for name in layer._buffers:
        tensor = getattr(live, name).detach().to(live.qweight.device)  # on CUDA some kernels keep g_idx on the CPU
        layer._buffers[name] = tensor.clone() if name == "scales" and tensor.is_inference() else tensor
    if layer.bias is not None:
        layer.bias = nn.Parameter(live.bias.detach(), requires_grad=False)
    if isinstance(layer, QuantLinear):
        layer.read_layout()
    layer.__dict__["origin"] = live  # not a submodule: its tensors are the layer's


def _alike(tensor: Tensor, wanted: Tensor) -> bool:
    same_kind = tensor.is_floating_point() if wanted.is_floating_point() else tensor.dtype == wanted.dtype
    return same_kind and tensor.shape == wanted.shape


def _given_back(layer: Any) -> nn.Module:
    origin: Any = layer.origin
    origin.to(layer.scales.device)
    origin.scales = layer.scales.detach()
    origin._clear_runtime_weight_cache()
    module: nn.Module = origin
    return module
