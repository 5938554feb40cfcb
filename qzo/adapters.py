"""LoRA adapters of the `peft` library on quantized layers, trained without gradients."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.scales import QUANTIZED, TABLES, scales


def add_adapters(
    model: Any, rank: int = 8, alpha: int = 16, targets: Sequence[str] = ("q_proj", "v_proj"), dropout: float = 0.0
) -> Any:
    """Put LoRA adapters on the layers named; returns peft's model, which holds `model`.

    y = W x + alpha / rank * B A x with A [rank, K] random and B [N, rank] zero, so y is unchanged at first. On a
    quantized layer this is QLoRA, through peft's own way to register layers it does not know. A is drawn from PyTorch's
    global RNG. The defaults are the paper's. `dropout` must be 0 for training without gradients.

    Raises QzoError where no layer has such a name.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import Linear

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), lora_dropout=dropout)
    quantized = [kind for kind in QUANTIZED if kind not in TABLES]
    config._register_custom_module(dict.fromkeys(quantized, Linear))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # it has in_features and out_features
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise QzoError(str(error).splitlines()[0]) from error


def adapters(model: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter of every LoRA adapter, for `qzo.MeZO`. Raises QzoError for a model without any."""
    found: dict[str, Tensor] = {name: tensor for name, tensor in model.named_parameters() if "lora_" in name}
    if not found:
        raise QzoError(f"{type(model).__name__} has no LoRA adapter; call qzo.add_adapters(model) first")
    return found


def scales_without_adapters(model: nn.Module) -> dict[str, Tensor]:
    """`qzo.scales(model)` without those of layers that carry an adapter. Raises QzoError where none is left."""
    found = {name: scale for name, scale in scales(model).items() if ".base_layer." not in name}
    if not found:
        raise QzoError("every quantized layer carries an adapter; give add_adapters fewer targets")
    return found
