"""Checkpoints of AWQ, as AutoAWQ writes them: 4 bits, version "gemm"."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.files.settings import Source, either, whole_number
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.packed import Layout, PackedCheckpoint, facts, in_common
from qzo.models.walk import left_plain

LAYER = AwqLinear
NAMES = ("awq",)


def find(source: Source) -> PackedCheckpoint | None:
    """The AWQ checkpoint in a folder; None where there is another one."""
    if source.method != "awq":
        return None
    return PackedCheckpoint("awq", source, "qweight", facts(source.settings or {}), partial(_layout, source), "awq")


def _layout(source: Source) -> Layout:
    """Raises QzoError for bits and groups that are no numbers, and for another version than AutoAWQ's default."""
    folder, settings = source.path, source.settings or {}
    n_bits = whole_number(folder, settings, "bits", "w_bit")
    group_size = whole_number(folder, settings, "group_size", "q_group_size")
    version = str(either(settings, "version") or "gemm").lower()
    if version != "gemm":
        raise QzoError(f'{folder}: AWQ version="{version}" is not supported; need gemm, AutoAWQ\'s default')
    if n_bits != AwqLinear.n_bits:
        raise QzoError(f"{folder}: AWQ with bits={n_bits} is not supported; need {AwqLinear.n_bits}")
    if settings.get("zero_point") is False:
        raise QzoError(f"{folder}: AWQ with zero_point=false is not supported; need true, AutoAWQ's default")

    def build(path: str, weight: Tensor, bias: Tensor | None) -> AwqLinear:
        rows, columns = weight.shape
        if group_size > 0 and columns % group_size:
            raise QzoError(
                f"in_features={columns} is not divisible by group_size={group_size}, which no AWQ layer can be; take "
                "config.json and weights from one checkpoint"
            )
        return AwqLinear.empty(columns, rows, group_size, bias is not None, weight.dtype, weight.device)

    return Layout(build, lambda _: n_bits)


def settings(model: nn.Module, layers: dict[str, Any], name: str, read: dict[str, Any] | None = None) -> dict[str, Any]:
    """The quantization_config of a model with these layers, the one that was read where there was one.

    Raises QzoError where it takes more than one.
    """
    if read is not None:
        return read
    n_bits, group_size = in_common(layers)
    plain = left_plain(model) or None
    own = {"zero_point": True, "version": "gemm", "modules_to_not_convert": plain}
    return {"quant_method": name, "bits": n_bits, "group_size": group_size, **own}


def stored(layers: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Nothing: tensors are stored as the layers have them."""
    return {}
