"""Checkpoints of AQLM, as the `aqlm` library and transformers write them."""

from __future__ import annotations

from dataclasses import fields
from functools import partial

from torch import Tensor

from qzo.errors import named
from qzo.formats.aqlm.layer import AqlmLayout, AqlmLinear
from qzo.formats.packed import Layout, PackedCheckpoint
from qzo.models.settings import Source


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
    return PackedCheckpoint("aqlm", source, "codes", about, partial(_layout, source), "scales+codebooks")


def _layout(source: Source) -> Layout:
    """Raises QzoError for sizes that no layout has."""
    settings = source.settings or {}
    with named(str(source.path)):
        names = [field.name for field in fields(AqlmLayout) if field.name in settings]
        sizes = AqlmLayout(**{name: settings[name] for name in names})

    def build(weight: Tensor, bias: Tensor | None) -> AqlmLinear:
        rows, columns = weight.shape
        return AqlmLinear.empty(columns, rows, sizes, bias is not None, weight.dtype, weight.device)

    return Layout(sizes.nbits_per_codebook, build, per_number=sizes.in_group_size * sizes.out_group_size)
