"""Sets of tensors to train, as parameter groups for `qzo.QZO`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.live.scales import has_signed_scales, quantized_layers, scales
from qzo.models.towers import of_text
from qzo.optim.guards.groups import TRAINABLE

PARTS = ("scales", "offsets", "vocabulary", "codebooks", "unquantized")
CALLED = {"vocabulary": "quantized vocabulary", "codebooks": "codebook", "unquantized": "unquantized parameter"}


def trainable(model: nn.Module, what: str = "scales", follow: bool = True) -> list[dict[str, Any]]:
    """Parameter groups of a quantized model for `qzo.QZO`.

        "scales"               Δ of every quantized linear layer, `qzo.scales(model)`. In offset formats (w = q s + m,
                               layers with a tensor `offsets` beside `scales`) each offset follows its scale by the same
                               relative amount, one z a scale: the paper's Δ ⊙ W_int, see `qzo.optim.offsets`. With
                               `follow=False` it stays where it is, which is another perturbation, and a rougher one:
                               each weight then moves in proportion to its distance from the offset. Integer zero points
                               always move with their scale, so for GPTQ layers it is all the same.
        "scales+offsets"       the same under its old name, from when offsets had to be asked for.
        "scales+vocabulary"    also the scales of a quantized vocabulary, in a group of their own: give it an eps that
                               suits them, or train all by relative amounts.
        "scales+codebooks"     also the codebooks of AQLM layers by plain SPSA, without max(., 0): 65,536 entries of 8
                               numbers a layer for 1x16. The codes stay.
        "scales+unquantized"   also every other floating-point parameter (norms, biases, embeddings, head) by plain
                               SPSA, their z after those of the scales from the same stream, without max(., 0). For
                               AQLM models the paper trains this set.

    Models with Q4_0 or Q5_0 blocks of GGUF files, whose scales may be negative, get `nonnegative=False` for all scales,
    and so do models of other formats with a negative scale.

    All of them may be joined. Groups are in the order scales, vocabulary, codebooks, unquantized, and take options of
    their own before they are given to QZO: `groups[-1]["lr"] = 1e-7`. QZO keeps fp32 masters of all it trains: 4 bytes
    a number, for an embedding table too. Adapters are left out.

    Raises QzoError for an unknown set, offsets asked for with follow=False, and a model without quantized layers.
    """
    parts = what.split("+")
    if "scales" not in parts or not set(parts) <= set(PARTS) or len(set(parts)) < len(parts):
        sets = ", ".join(f'"scales+{part}"' for part in PARTS[1:])
        raise QzoError(f'what="{what}" is not known; choose "scales", {sets}')
    if "offsets" in parts and not follow:
        raise QzoError(f'what="{what}" moves the offsets, follow=False does not; choose one')
    groups = [scale_group(model, scales(model), follow)]
    if "vocabulary" in parts:
        groups.append(scale_group(model, _of_vocabulary(model), follow))
    for part, find in (("codebooks", codebooks), ("unquantized", _unquantized)):
        if part in parts:
            groups.append({"params": find(model), "nonnegative": False})
    for part, group in zip([part for part in PARTS if part in parts and part != "offsets"], groups, strict=True):
        if not group["params"]:
            raise QzoError(f'{type(model).__name__} has no {CALLED[part]}; choose "scales"')
    return groups


def _of_vocabulary(model: nn.Module) -> dict[str, Tensor]:
    own = scales(model)
    return {name: tensor for name, tensor in scales(model, vocabulary=True).items() if name not in own}


def scale_group(model: nn.Module, named: dict[str, Tensor], follow: bool = True) -> dict[str, Any]:
    """Parameter group of some of a model's scales: name -> live scale, as from `qzo.scales`.

    With `follow`, the offsets beside these scales move with them, see `trainable`; without, they stay.
    """
    group: dict[str, Any] = {"params": named}
    if has_signed_scales(model):
        group["nonnegative"] = False
    beside = offsets(model) if follow else {}
    group["offsets"] = {name: offset for name, offset in beside.items() if name in named}
    return group


def codebooks(model: nn.Module) -> dict[str, Tensor]:
    """Name -> live codebooks [C, 2^b, og, ig] of every AQLM layer; empty where there is none."""
    return {
        f"{path}.codebooks" if path else "codebooks": buffer
        for path, layer in quantized_layers(model).items()
        for name, buffer in layer.named_buffers(recurse=False)
        if name == "codebooks"
    }


def offsets(model: nn.Module) -> dict[str, Tensor]:
    """Name of the scale -> live offset, of every quantized layer that has offsets; empty where none has."""
    found: dict[str, Tensor] = {}
    for path, layer in quantized_layers(model).items():
        offset = getattr(layer, "offsets", None)
        if isinstance(offset, Tensor):
            found[f"{path}.scales" if path else "scales"] = offset
    return found


def _unquantized(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter
        for name, parameter in of_text(model, dict(model.named_parameters())).items()
        if parameter.dtype in TRAINABLE and "lora_" not in name
    }


def live_named(model: nn.Module) -> dict[str, Tensor]:
    """Name -> live tensor, of all that any optimizer here may train: parameters, buffers, scales and offsets."""
    found: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    found |= dict(model.named_buffers(remove_duplicate=False))
    for path, layer in quantized_layers(model).items():
        found |= {f"{path}.{name}" if path else name: view for name, view in layer.views().items()}
    return found
