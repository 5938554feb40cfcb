"""The library gptqmodel, whose modules hold GPTQ and AWQ layers: which can be taken over, and how they are given back.

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
from qzo.formats.layer import Quantized

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


def kernel_of(module: nn.Module) -> str | None:
    """The kernel of a quantized module of gptqmodel, one of `GPTQ` or `AWQ`; None for any other module.

    Raises QzoError for a kernel whose layout is not known, and for settings that no checkpoint layout here has.
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
    return kernel


def take_over(layer: Quantized, module: nn.Module) -> None:
    """Give a layer on meta the module's tensors, and remember the module, for `give_back`.

    The module's forward and the layer's then compute the same. Tensors made under torch.inference_mode, as those of a
    model quantized in this process are, cannot be changed in place: such scales are copied. Raises QzoError where a
    tensor has another layout than the layer's: the kernel has repacked its codes.
    """
    live: Any = module
    for name, wanted in list(layer.named_buffers(recurse=False)):
        tensor = getattr(live, name, None)
        if not isinstance(tensor, Tensor) or not _alike(tensor, wanted):
            raise QzoError(
                f"gptqmodel's kernel {type(module).__name__} has repacked its {name}, and computes with a copy of its "
                f"scales; adopt the model before its first forward, or {REMEDY}"
            )
    for name in layer._buffers:
        tensor = getattr(live, name).detach().to(live.qweight.device)  # on CUDA some kernels keep g_idx on the CPU
        layer._buffers[name] = tensor.clone() if name == "scales" and tensor.is_inference() else tensor
    if layer.bias is not None:
        layer.bias = nn.Parameter(live.bias.detach(), requires_grad=False)
    layer.came_from(live)


def give_back(layer: Quantized) -> nn.Module | None:
    """The module that a layer was made of, with the scales as they are now; None for a layer from elsewhere."""
    module: Any = layer.origin
    if module is None:
        return None
    assert layer.scales is not None
    module.to(layer.scales.device)
    module.scales = layer.scales.detach()
    module._clear_runtime_weight_cache()
    taken: nn.Module = module
    return taken


def _alike(tensor: Tensor, wanted: Tensor) -> bool:
    same_kind = tensor.is_floating_point() if wanted.is_floating_point() else tensor.dtype == wanted.dtype
    return same_kind and tensor.shape == wanted.shape
