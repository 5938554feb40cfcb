"""Checkpoints of AQLM, as the `aqlm` library and transformers write them."""

from __future__ import annotations

from dataclasses import asdict, fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from qzo.errors import QzoError, named
from qzo.files.settings import Source
from qzo.formats.aqlm.layer import AqlmLayout, AqlmLinear
from qzo.formats.packed import Layout, PackedCheckpoint
from qzo.models.walk import left_plain, output_head

LAYER = AqlmLinear
NAMES = ("aqlm",)


def find(source: Source) -> PackedCheckpoint | None:
    """The AQLM checkpoint in a folder; None where there is another one."""
    if source.method != "aqlm":
        return None
    settings = source.settings or {}
    about = {
        "version": "x".join(str(settings.get(name)) for name in ("num_codebooks", "nbits_per_codebook")),
        "n_bits": settings.get("nbits_per_codebook"),
        "group_size": settings.get("in_group_size"),
    }
    return PackedCheckpoint("aqlm", source, "codes", about, partial(_layout, source), "aqlm", "scales+codebooks")


def _layout(source: Source) -> Layout:
    """Raises QzoError for sizes that no layout has."""
    settings = source.settings or {}
    with named(str(source.path)):
        names = [field.name for field in fields(AqlmLayout) if field.name in settings]
        sizes = AqlmLayout(**{name: settings[name] for name in names})

    def build(_: str, weight: Tensor, bias: Tensor | None) -> AqlmLinear:
        rows, columns = weight.shape
        return AqlmLinear.empty(columns, rows, sizes, bias is not None, weight.dtype, weight.device)

    return Layout(build, lambda _: sizes.nbits_per_codebook, per_number=sizes.in_group_size * sizes.out_group_size)


def settings(model: nn.Module, layers: dict[str, Any], name: str, read: dict[str, Any] | None = None) -> dict[str, Any]:
    """The quantization_config of a model with these layers, the one that was read where there was one.

    Raises QzoError where they have several layouts.
    """
    if read is not None:
        return read
    layout = next(iter(layers.values())).layout
    for path, layer in layers.items():
        if layer.layout != layout:
            raise QzoError(f"{path}: {layer.layout}, but another layer has {layout}; a checkpoint holds one")
    head = [path for path, module in model.named_modules() if module is output_head(model)]
    plain = [*head, *left_plain(model)]
    both = [*plain, *(f"{path}.weight" for path in plain)]  # transformers 5 looks for layers, 4 for their weights
    return {"quant_method": name, **asdict(layout), "linear_weights_not_to_quantize": both}


def stored(layers: dict[str, Any], name: str) -> dict[str, Tensor]:
    """Nothing: tensors are stored as the layers have them."""
    return {}
