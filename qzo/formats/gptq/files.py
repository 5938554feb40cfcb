"""Checkpoints of GPTQ, as AutoGPTQ and gptqmodel write them: formats "gptq" and "gptq_v2"."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from qzo.errors import QzoError
from qzo.formats.gptq.codes import zeros_from_v1
from qzo.formats.gptq.layer import QuantLinear
from qzo.formats.packed import Layout, PackedCheckpoint, facts
from qzo.models.settings import FORMATS, Source, either, whole_number


def find(source: Source) -> PackedCheckpoint | None:
    """The GPTQ checkpoint in a folder; None where there is another one."""
    if source.method != "gptq":
        return None
    return PackedCheckpoint("gptq", source, "qweight", facts(source.settings or {}), partial(_layout, source))


def _layout(source: Source) -> Layout:
    """Raises QzoError for bits and groups that are no numbers, and for a format that is not known."""
    folder, settings = source.path, source.settings or {}
    n_bits = whole_number(folder, settings, "bits", "w_bit")
    group_size = whole_number(folder, settings, "group_size", "q_group_size")
    version = str(either(settings, "checkpoint_format", "format") or "gptq")
    if version not in FORMATS:
        raise QzoError(f'{folder}: checkpoint_format="{version}" is not supported; need gptq or gptq_v2')

    def build(weight: Tensor, bias: Tensor | None) -> QuantLinear:
        return QuantLinear.from_weight(weight, bias, n_bits, group_size)

    read = (".qzeros", partial(zeros_from_v1, n_bits=n_bits)) if version == "gptq" else None
    return Layout(n_bits, build, read)
