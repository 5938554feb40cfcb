"""Checkpoints of GPTQ, as AutoGPTQ and gptqmodel write them: formats "gptq" and "gptq_v2"."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError, named
from qzo.files.settings import FORMATS, Source, either, whole_number
from qzo.formats.gptq.codes import zeros_from_v1, zeros_to_v1
from qzo.formats.gptq.dynamic import dynamic_of, rules_of
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.packed import Layout, PackedCheckpoint, facts, in_common
from qzo.models.walk import left_plain

LAYER = QuantLinear
NAMES = FORMATS
NAMED = ("checkpoint_format",)


def find(source: Source) -> PackedCheckpoint | None:
    """The GPTQ checkpoint in a folder; None where there is another one."""
    if source.method != "gptq":
        return None
    settings = source.settings or {}
    saved_as = str(either(settings, "checkpoint_format", "format") or "gptq")
    return PackedCheckpoint("gptq", source, "qweight", facts(settings), partial(_layout, source), saved_as)


def _layout(source: Source) -> Layout:
    """Raises QzoError for bits and groups that are no numbers, and for a format that is not known."""
    folder, settings = source.path, source.settings or {}
    n_bits = whole_number(folder, settings, "bits", "w_bit")
    group_size = whole_number(folder, settings, "group_size", "q_group_size")
    version = str(either(settings, "checkpoint_format", "format") or "gptq")
    if version not in FORMATS:
        raise QzoError(
            f'{folder}: checkpoint_format="{version}" is not supported; need gptq or gptq_v2: save it so with gptqmodel'
        )
    with named(str(folder)):
        dynamic = dynamic_of(n_bits, group_size, settings.get("dynamic") or rules_of(settings.get("extra_config")))

    def build(path: str, weight: Tensor, bias: Tensor | None) -> QuantLinear:
        rows, columns = weight.shape
        own = dynamic.of(path)
        rest = (bias is not None, weight.dtype, weight.device)
        layer = QuantLinear.empty(columns, rows, own.n_bits, own.group_size, *rest, short_group=True)
        layer.zero = 2 ** (own.n_bits - 1)
        return layer

    def g_idx(path: str, words: int) -> dict[str, Tensor]:
        """Where it is not stored (AutoRound) columns are in their own order."""
        own = dynamic.of(path)
        columns = words * 32 // own.n_bits
        return {
            "g_idx": torch.arange(columns, dtype=torch.int32) // (own.group_size if own.group_size > 0 else columns)
        }

    in_order = not settings.get("desc_act") or bool(settings.get("static_groups"))
    zeros = zeros_from_v1 if version == "gptq" else None
    return Layout(build, lambda path: dynamic.of(path).n_bits, zeros, implied=g_idx if in_order else None)


def settings(model: nn.Module, layers: dict[str, Any], name: str, read: dict[str, Any] | None = None) -> dict[str, Any]:
    """The quantization_config of a model with these layers, the one that was read where there was one.

    Raises QzoError where it takes more than one.
    """
    if read is not None:
        return {**read, **dict.fromkeys(("checkpoint_format", "format") if "format" in read else NAMED, name)}
    n_bits, group_size = in_common(layers)
    left: dict[str, Any] = {f"-:^{re.escape(path)}$": {} for path in left_plain(model)}  # as gptqmodel asks for them
    return {
        "quant_method": "gptq",
        "bits": n_bits,
        "group_size": group_size,
        "sym": all(bool((layer.zero_points() == 2 ** (n_bits - 1)).all()) for layer in layers.values()),
        "desc_act": any(layer.act_order for layer in layers.values()),
        "lm_head": False,
        "true_sequential": True,
        "checkpoint_format": name,
        "pack_dtype": "int32",
        **({"dynamic": left} if left else {}),
    }


def stored(layers: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Zero points minus 1, of format "gptq"."""
    if name != "gptq":
        return {}
    return {f"{path}.qzeros": zeros_to_v1(layer.qzeros, layer.n_bits) for path, layer in layers.items()}
