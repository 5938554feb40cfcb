"""The continuous scales of a quantized model as one live view, and the bytes of every part of it."""

from __future__ import annotations

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import Quantized

COMPONENT = {"qweight": "codes", "qzeros": "zero_points", "blocks": "codes"}  # other buffers are called what they are
COMPONENTS = ("codes", "scales", "zero_points", "g_idx", "codebooks")


def scales(model: nn.Module, layers: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Name -> scale tensor of every quantized layer; the next forward sees what is written into one in place.

    `layers` (first, last), counted from 0 and both included, takes those of some decoder layers only.

    The name is the module's path and ".scales". Shapes are those that the format has, see the docstrings of its layers:
    [K/g, N] for GPTQ, [V, K/g] for an embedding (once, where the head shares it); fp32, fp16 or bf16. Ask again after
    `model.to(...)`, which makes new tensors. Raises QzoError for a model without quantized layers, and for one that has
    K-quants only, whose scales are quantized themselves.
    """
    quantized = quantized_layers(model)
    found: dict[str, Tensor] = {
        f"{path}.scales" if path else "scales": layer.scales
        for path, layer in quantized.items()
        if layer.scales is not None
    }
    if not quantized:
        raise QzoError(f"{type(model).__name__} has no quantized layer; call qzo.quantize(model) first")
    if not found:
        names = sorted({layer.type_name for layer in quantized.values()})
        raise QzoError(f"the scales of {', '.join(names)} are quantized themselves; take a Q4_0, Q4_1 or Q8_0 file")
    return found if layers is None else in_layers(found, *layers)


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Path -> module with codes and scales, of whatever format; a shared one once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def linear_scales(model: nn.Module) -> dict[str, Tensor]:
    """Those of `scales(model)` that `qzo train` and `QZOTrainer` train: of linear layers, not of the vocabulary.

    The scales of an 8-bit vocabulary are so much smaller than those of 4-bit layers that no one eps suits both. Raises
    QzoError where `scales` does, and where the vocabulary alone has scales.
    """
    tables = {f"{path}.scales" for path, layer in quantized_layers(model).items() if layer.is_table}
    found = {name: tensor for name, tensor in scales(model).items() if name not in tables}
    if not found:
        raise QzoError("only the vocabulary has scales that can be trained; take a Q4_0, Q4_1 or Q8_0 file")
    return found


def has_signed_scales(model: nn.Module) -> bool:
    """Whether scales may be negative, as in GGUF Q4_0 and Q5_0, or are, in AQLM and after double quantization.

    QZO then needs `nonnegative=False`.
    """
    return any(layer.signed for layer in quantized_layers(model).values())


def in_layers(named: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """Those of some named tensors that belong to the decoder layers first ... last.

    The number of a layer is the first one in its path, as in model.layers.12.mlp.up_proj. Raises QzoError where there
    is none of them.
    """
    numbers = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in named}
    found = {name: tensor for name, tensor in named.items() if (n := numbers[name]) is not None and first <= n <= last}
    if not found:
        known = [number for number in numbers.values() if number is not None]
        has = f"layers {min(known)} ... {max(known)}" if known else "no numbered layers"
        raise QzoError(f"there are no layers {first} ... {last}; this model has {has}")
    return found


def quantized_tensors(model: nn.Module) -> dict[str, list[Tensor]]:
    """Component ("codes", "scales", "zero_points", "g_idx", "codebooks", ...) -> its tensors, every storage once.

    The blocks of a GGUF file, which hold codes, scales and offsets, are among the codes.
    """
    tensors: dict[str, list[Tensor]] = {component: [] for component in COMPONENTS}
    seen: set[int] = set()
    for layer in quantized_layers(model).values():
        for name, buffer in layer.named_buffers(recurse=False):
            storage = buffer.untyped_storage()._cdata
            if storage not in seen:
                seen.add(storage)
                tensors.setdefault(COMPONENT.get(name, name), []).append(buffer)
    return tensors


def quantized_bytes(model: nn.Module) -> dict[str, int]:
    """Exact bytes of each component, every storage once, and `scale_count`, the number of scales."""
    tensors = quantized_tensors(model)
    sizes = {component: sum(tensor.nbytes for tensor in parts) for component, parts in tensors.items()}
    count = sum(tensor.numel() for tensor in tensors["scales"])
    for layer in quantized_layers(model).values():
        for component, part in layer.views().items():
            sizes[component] = sizes.get(component, 0) + part.nbytes
            sizes["codes"] -= part.nbytes
            count += part.numel() if component == "scales" else 0
    return {**sizes, "scale_count": count}
