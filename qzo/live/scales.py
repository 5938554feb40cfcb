"""The continuous scales of a quantized model as one live view, and the bytes of every part of it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import Quantized
from qzo.models.towers import of_text
from qzo.optim.offsets import bind

COMPONENT = {"qweight": "codes", "qzeros": "zero_points", "blocks": "codes"}  # other buffers are called what they are
COMPONENTS = ("codes", "scales", "zero_points", "g_idx", "codebooks")


def scales(model: nn.Module, layers: tuple[int, int] | None = None, vocabulary: bool = False) -> dict[str, Tensor]:
    """Name -> scale tensor of every quantized linear layer; the next forward sees what is written into one in place.

    This is what `qzo train` and `QZOTrainer` train. In formats with offsets (w = q s + m: GGUF Q4_1 and Q5_1, torchao
    int4) each of these tensors knows its own, and `qzo.QZO` moves it along by the same relative amount, whether it is
    given this dict, some of the tensors or a list; `qzo.trainable(model, follow=False)` leaves them still.

    The scales of a quantized vocabulary (embedding, and head where the two share a table) are left out: those of 8-bit
    codes are 17 times smaller than those of 4-bit ones, and no one eps and lr suit both.

    Args:
        model: with quantized layers.
        layers: (first, last), counted from 0 and both included, takes those of some decoder layers only.
        vocabulary: take those of a quantized vocabulary too; give them an eps of their own, or relative amounts.

    Of a multimodal model those of the text part are taken: text moves no other, and noise would.

    The name is the module's path and ".scales". Shapes are those that the format has, see the docstrings of its layers:
    [K/g, N] for GPTQ, [V, K/g] for an embedding (once, where the head shares it); fp32, fp16 or bf16. They stay
    the same tensors, of the same dtype, in `model.to(...)`, `.half()` and `.float()`; only those of a packed GGUF file,
    views into its blocks, must be asked for again after a move to another device. Raises QzoError for a model without
    quantized layers, for one that has K-quants only, whose scales are quantized themselves, or a vocabulary alone, and
    for layers that it does not have.
    """
    quantized = of_text(model, quantized_layers(model))
    if not quantized:
        raise QzoError(f"{type(model).__name__} has no quantized layer; call qzo.quantize(model) first")
    every = {path: layer for path, layer in quantized.items() if layer.scales is not None}
    if not every:
        names = sorted({layer.type_name for layer in quantized.values()})
        raise QzoError(f"the scales of {', '.join(names)} are quantized themselves; take a Q4_0, Q4_1 or Q8_0 file")
    found = {
        f"{path}.scales" if path else "scales": scale
        for path, layer in every.items()
        if (vocabulary or not layer.is_table) and (scale := bound_scales(layer)) is not None
    }
    if not found:
        raise QzoError(
            "only the vocabulary has scales that can be trained, which is left out unless asked for: "
            "qzo.scales(model, vocabulary=True); or take a Q4_0, Q4_1 or Q8_0 file"
        )
    return found if layers is None else in_layers(found, *layers, paths=[name for name, _ in model.named_modules()])


def bound_scales(layer: Quantized) -> Tensor | None:
    """The live scales of a layer, bound to the offsets beside them, where it has some."""
    scale, offset = layer.scales, getattr(layer, "offsets", None)
    if scale is not None and isinstance(offset, Tensor):
        bind(scale, offset)
    return scale


def quantized_layers(model: nn.Module) -> dict[str, Quantized]:
    """Path -> module with codes and scales, of whatever format; a shared one once."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Quantized)}


def has_signed_scales(model: nn.Module) -> bool:
    """Whether scales may be negative, as in GGUF Q4_0 and Q5_0, or are, in AQLM and after double quantization.

    QZO then needs `nonnegative=False`.
    """
    return any(layer.signed for layer in quantized_layers(model).values())


def in_layers(named: dict[str, Tensor], first: int, last: int, paths: Iterable[str] = ()) -> dict[str, Tensor]:
    """Those of some named tensors that belong to the decoder layers first ... last, which must be there.

    The number of a layer is the first one in its path, as in model.layers.12.mlp.up_proj. `paths` are more of the
    model's, of layers that have no such tensor. Raises QzoError for a layer that is not there, and where none of them
    has such a tensor.
    """
    places = {name: _place(name) for name in named}
    stacks = {place[0] for place in places.values() if place is not None}
    known = {place[1] for path in (*named, *paths) if (place := _place(path)) is not None and place[0] in stacks}
    if not known or last > max(known):
        has = f"layers {min(known)} ... {max(known)}" if known else "no numbered layers"
        raise QzoError(f"there are no layers {first} ... {last}; this model has {has}, a range must lie within")
    within = {name for name, place in places.items() if place is not None and first <= place[1] <= last}
    found = {name: tensor for name, tensor in named.items() if name in within}
    if not found:
        raise QzoError(f"layers {first} ... {last} have nothing that can be trained; choose others")
    return found


def _place(path: str) -> tuple[str, int] | None:
    """What comes before the first number of a path, and the number."""
    before: list[str] = []
    for part in path.split("."):
        if part.isdecimal():
            return ".".join(before), int(part)
        before.append(part)
    return None


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
