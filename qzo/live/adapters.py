"""LoRA adapters of the `peft` library on quantized layers, trained without gradients."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.files.folder import one_line
from qzo.live.scales import quantized_layers, scales
from qzo.models.towers import towers
from qzo.models.walk import freeze
from qzo.optim.mezo import MeZO
from qzo.optim.phases import Phases
from qzo.optim.qzo import QZO
from qzo.quiet import quiet_libraries


def add_adapters(
    model: Any, rank: int = 8, alpha: int = 16, targets: Sequence[str] = ("q_proj", "v_proj"), dropout: float = 0.0
) -> Any:
    """Put LoRA adapters on the layers named; returns peft's model, which holds `model`.

    y = W x + alpha / rank * B A x with A [rank, K] random and B [N, rank] zero, so y is unchanged at first. On a
    quantized layer this is QLoRA, through peft's own way to register layers it does not know. A is drawn from PyTorch's
    global RNG. The defaults are the paper's. `dropout` must be 0 for training without gradients.

    Towers of a multimodal model get none. Raises QzoError where no layer has such a name.
    """
    with quiet_libraries():
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import Linear

    beside = "|".join(map(re.escape, towers(model)))
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=list(targets),
        lora_dropout=dropout,
        exclude_modules=rf"({beside})\..*" if beside else None,
    )
    kinds = {type(layer) for layer in quantized_layers(model).values() if not layer.is_table}
    config._register_custom_module(dict.fromkeys(kinds, Linear))
    with quiet_libraries(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")  # it has in_features and out_features
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft calls an old name
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise QzoError(f"{one_line(error)}; name layers of this model as targets") from error


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


def adapters_then_scales(
    model: nn.Module,
    steps: int,
    adapter_options: dict[str, Any] | None = None,
    scale_options: dict[str, Any] | None = None,
) -> Phases:
    """The paper's QZO + QLoRA: the first half of the steps MeZO on the adapters, the second QZO on the other scales.

    Args:
        model: quantized, with adapters (`qzo.add_adapters`). Layers that carry one keep their scales.
        steps: of both halves together; 8,000 in the paper.
        adapter_options: for `qzo.MeZO`; clipping as in QZO unless given.
        scale_options: for `qzo.QZO`.

    Raises QzoError for a model without adapters or without quantized layers beside them, and fewer than 2 steps.
    """
    if steps < 2:
        raise QzoError(f"steps={steps} cannot be halved; choose at least 2")
    first = MeZO(adapters(model), **{"clip_threshold": 100.0, **(adapter_options or {})})
    second = QZO(scales_without_adapters(model), **(scale_options or {}))
    return Phases([(first, steps // 2), (second, steps - steps // 2)])


def put_adapters(model: nn.Module, seed: int) -> nn.Module:
    """LoRA adapters drawn from `seed`, the rest frozen; returns peft's wrapper. The global RNG stays what it was."""
    freeze(model)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        wrapper: nn.Module = add_adapters(model)
    return wrapper
