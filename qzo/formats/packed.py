"""Checkpoints whose tensors are those of our layers, under the same names: GPTQ, AWQ and AQLM."""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import OTHER, QzoError, advised
from qzo.files.folder import Header, headers_in, read_tensors_of, weight_files
from qzo.files.rewrite import Write, rewriting
from qzo.files.settings import Source, either
from qzo.models.inspection import WHOLE_ZEROS, Inspection
from qzo.models.parts import Counted, count
from qzo.models.stored import Build, Stored

PER_NUMBER = 16  # codes of two bits, the most that a number can hold
PARTS = {"scales": "scales", "qweight": "codes", "qzeros": "zero_points", "g_idx": "g_idx"}
PARTS |= {"codes": "codes", "codebooks": "codebooks"}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint holds its codes.

    Args:
        build: (stored path, weight [N, K] on meta, bias) -> a layer with the tensors that the checkpoint has for it.
        bits_of: stored path -> bits of a code.
        zeros: (words of zero points, bits) -> as the layer has them; None where they are stored so.
        per_number: weights that a stored number may stand for.
        implied: (stored path, rows of its words) -> by their names in the layer, tensors that need not be stored.
    """

    build: Callable[[str, Tensor, Tensor | None], nn.Module]
    bits_of: Callable[[str], int]
    zeros: Callable[[Tensor, int], Tensor] | None = None
    per_number: int = PER_NUMBER
    implied: Callable[[str, int], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class PackedCheckpoint(Stored):
    """A folder with such a checkpoint.

    Args:
        format: quant_method.
        source: the folder and its settings.
        codes: last part of the name of the tensor that tells a quantized layer.
        about: version, bits and group size as the settings have them, whatever they are.
        layout: what they mean. Raises QzoError for what is not supported.
        saved_as: `checkpoint_format` of `qzo.checkpoints.save`.
        more: the set of `qzo.trainable` that trains more than scales, of quantized layers.
    """

    format: str
    source: Source
    codes: str
    about: dict[str, Any]
    layout: Callable[[], Layout]
    saved_as: str | None
    more: str = "scales+offsets"
    by_name = True
    moving = WHOLE_ZEROS

    @cached_property
    def headers(self) -> dict[str, Header]:  # type: ignore[override]
        """Of all tensors. Raises QzoError for files that are damaged or not there."""
        return headers_in(weight_files(self.folder))

    @cached_property
    @advised(OTHER)
    def _laid_out(self) -> Layout:
        return self.layout()

    def write(self, tensors: dict[str, Tensor]) -> Write:
        """Tensors have the names of the checkpoint."""
        return rewriting(self.folder, tensors)

    def paths(self) -> Collection[str]:
        """Layers that have codes; so what the quantizer left alone (`modules_to_not_convert`) stays as it is."""
        return self._paths

    @cached_property
    def _paths(self) -> Collection[str]:
        return {name.removesuffix(f".{self.codes}") for name in self.headers if name.endswith(f".{self.codes}")}

    def builder(self) -> tuple[Build, int]:
        """By the settings, with the shapes of the model's weights."""
        layout = self._laid_out
        return layout.build, max(PER_NUMBER, layout.per_number)

    def implied(self) -> Container[str]:
        """Names in the model of what layers have without a tensor in the files."""
        placed = self.placed
        return {str(placed.named(name)) for path in placed.layers for name in self._not_stored(path)}

    def _not_stored(self, path: str) -> dict[str, Tensor]:
        """Name -> tensor of what a layer has and the files lack."""
        implied, codes = self._laid_out.implied, self.headers[f"{path}.{self.codes}"]
        if implied is None or not codes.shape:
            return {}
        own = {f"{path}.{name}": tensor for name, tensor in implied(path, codes.shape[0]).items()}
        return {name: tensor for name, tensor in own.items() if name not in self.headers}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each file; zero points as the layers have them. Raises QzoError for groups not there."""
        layout, paths = self._laid_out, self.placed.layers
        for file in dict.fromkeys(header.file for header in self.headers.values()):
            tensors: dict[str, Tensor] = {}
            for name, tensor in read_tensors_of(file):
                path, _, last = name.rpartition(".")
                if path in paths and last == "qzeros" and layout.zeros is not None:
                    tensor = layout.zeros(tensor, layout.bits_of(path))
                elif path in paths and last == "g_idx":
                    scales = self.headers[f"{path}.scales"]
                    tensor = _checked_groups(file, name, tensor, groups=scales.shape[0])
                elif path in paths and last == self.codes:
                    tensors |= self._not_stored(path)
                tensors[name] = tensor
            yield tensors

    def counted(self, left: Collection[str]) -> Counted:
        """By the headers; words of codes are counted."""
        return parts_of({name: header for name, header in self.headers.items() if name not in left})

    def inspect(self, name: str) -> Inspection:
        """As `Stored.inspect`; codes and zero points are counted where there is a layout for their words."""
        found = super().inspect(name)
        if found.reason is None and self.codes == "qweight":  # words of some codes
            bits_of = self._laid_out.bits_of
            for part, name in (("codes", "qweight"), ("zero_points", "qzeros")):
                words = ((self.headers[f"{path}.{name}"].numel, bits_of(path)) for path in self.placed.layers)
                found.counts[part] = sum(count * 32 // n_bits for count, n_bits in words)
        return found


def in_common(layers: dict[str, Any]) -> tuple[int, int]:
    """n_bits and group size of all layers, -1 for whole rows; one whose row is one group fits where K divides so.

    Raises QzoError, with the layer's name, where there are several.
    """
    n_bits = next(iter(layers.values())).n_bits
    sizes = (layer.group_size for layer in layers.values() if layer.group_size != layer.in_features)
    group_size = min(sizes, default=-1)
    for path, layer in layers.items():
        if (layer.n_bits, layer.group_size) != (n_bits, layer.in_features if group_size == -1 else group_size):
            raise QzoError(
                f"{path}: n_bits={layer.n_bits}, group_size={layer.group_size}, but another layer has n_bits={n_bits}, "
                f"group_size={group_size}; a checkpoint holds one of each"
            )
    return n_bits, group_size


def facts(settings: dict[str, Any]) -> dict[str, Any]:
    """Version, bits and group size under the names that GPTQ's and AWQ's writers have for them."""
    version = either(settings, "checkpoint_format", "format", "version")
    return {
        "version": None if version is None else str(version),
        "n_bits": either(settings, "bits", "w_bit"),
        "group_size": either(settings, "group_size", "q_group_size"),
    }


def _checked_groups(file: Path, name: str, g_idx: Tensor, groups: int) -> Tensor:
    """g_idx as int32. Raises QzoError for a group that is not there."""
    low, high = g_idx.aminmax()
    if low < 0 or high >= groups:
        raise QzoError(f"{file}: {name} has values outside 0 ... {groups - 1}")
    return g_idx.to(torch.int32)


def parts_of(headers: dict[str, Header]) -> Counted:
    """Numbers (words, where they are packed) and bytes of each part."""
    packed = {name.rpartition(".")[0] for name in headers if name.endswith((".qweight", ".codes"))}

    def part_of(name: str) -> str | None:
        path, _, last = name.rpartition(".")
        return PARTS.get(last) if path in packed else None

    return count(headers, dict.fromkeys(PARTS.values()), part_of)
