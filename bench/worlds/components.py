"""What is resident before the first step, part by part."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from bench.methods.quantized.int8 import int8_tensors
from bench.methods.quantized.nf4 import nf4_tensors
from qzo.live.scales import quantized_tensors

FLOOR = ("codes", "codebooks", "scales", "quant_map", "offsets", "embeddings", "norms", "biases", "adapters", "linears",
         "buffers")  # fmt: skip
QUANTIZATION = ("codes", "scales", "zero_points", "g_idx", "codebooks", "quant_map", "offsets")


def components(model: nn.Module) -> dict[str, list[Tensor]]:
    """Part -> its tensors, every storage once: codes, scales, ..., then embeddings (head included), norms, biases,
    adapters, linears, saved buffers, and `working_buffers` (rotary tables and the like: in no checkpoint).
    """
    parts = {name: list(tensors) for name, tensors in quantized_tensors(model).items()}
    for low_bit in (nf4_tensors(model), int8_tensors(model)):
        for name, tensors in low_bit.items():
            parts.setdefault(name, []).extend(tensors)
    seen = {_storage(tensor) for tensors in parts.values() for tensor in tensors}
    for name, tensor in _unquantized(model):
        if _storage(tensor) not in seen:
            seen.add(_storage(tensor))
            parts.setdefault(name, []).append(tensor)
    return {name: tensors for name, tensors in parts.items() if tensors}


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def role(part: str) -> str:
    """The ledger's role of a part."""
    if part == "working_buffers":
        return "temporaries"
    return "quantization" if part in QUANTIZATION else "weights"


def _unquantized(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    head = model.get_output_embeddings()  # type: ignore[operator]  # PEFT's models forward it
    for path, module in model.named_modules():
        vocabulary = isinstance(module, nn.Embedding) or module is head
        for name, parameter in module.named_parameters(recurse=False):
            yield _part(f"{path}.{name}", parameter, vocabulary), parameter
        for name, buffer in module.named_buffers(recurse=False):
            yield "working_buffers" if name in module._non_persistent_buffers_set else "buffers", buffer


def _part(path: str, parameter: Tensor, vocabulary: bool) -> str:
    if "lora_" in path or path.startswith("prompt_encoder."):
        return "adapters"
    if vocabulary:
        return "embeddings"
    if parameter.dim() > 1:
        return "linears"
    return "biases" if path.endswith("bias") and "norm" not in path.lower() and ".ln_" not in path else "norms"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
