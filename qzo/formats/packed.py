"""Checkpoints whose tensors are those of our layers, under the same names: GPTQ, AWQ and AQLM."""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.layer import Quantized
from qzo.models.folder import Header, headers_in, read_tensors_of, weight_files
from qzo.models.inspection import WHOLE_ZEROS, Inspection, obstacle
from qzo.models.rewrite import Write, rewriting
from qzo.models.settings import Source, either
from qzo.models.skeleton import (
    FLOATING,
    IMPLIED,
    check_architecture,
    check_counts,
    check_tensors,
    dtype_of,
    finish,
    skeleton,
)
from qzo.models.walk import Site, find_sites, freeze, replace_sites

AS_STORED = (".scales", ".codebooks")  # whatever the dtype of the rest
PER_NUMBER = 16  # codes of two bits, the most that a number can hold
PARTS = {"scales": "scales", "qweight": "codes", "qzeros": "zero_points", "g_idx": "g_idx"}
PARTS |= {"codes": "codes", "codebooks": "codebooks"}


@dataclass(frozen=True)
class Layout:
    """How a checkpoint holds its codes.

    Args:
        n_bits: of a code.
        build: (weight [N, K] on meta, bias) -> a layer with the tensors that the checkpoint has for it.
        read: a tensor of a file under a name that ends so -> as the layer has it.
        per_number: weights that a stored number may stand for.
    """

    n_bits: int
    build: Callable[[Tensor, Tensor | None], Quantized]
    read: tuple[str, Callable[[Tensor], Tensor]] | None = None
    per_number: int = PER_NUMBER


@dataclass(frozen=True)
class PackedCheckpoint:
    """A folder with such a checkpoint.

    Args:
        format: quant_method.
        source: the folder and its settings.
        codes: last part of the name of the tensor that tells a quantized layer.
        about: version, bits and group size as the settings have them, whatever they are.
        layout: what they mean. Raises QzoError for what is not supported.
        saved_as: `checkpoint_format` of `qzo.checkpoints.save`.
        with_scales: the set of `qzo.trainable` that trains more than scales, of quantized layers.
    """

    format: str
    source: Source
    codes: str
    about: dict[str, Any]
    layout: Callable[[], Layout]
    saved_as: str
    with_scales: str = "scales+offsets"

    @property
    def folder(self) -> Path:
        """Of the checkpoint."""
        return self.source.path

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """Build the model on meta, put quantized layers in, and give every tensor its value file by file.

        Extra memory: the tensors of one file, until they are in place. Raises QzoError for files that are damaged or do
        not belong together, before any tensor is read as far as the headers tell.
        """
        layout = self.layout()
        headers = headers_in(weight_files(self.folder))
        dtype = dtype or dtype_of(self.source.config)
        model = self._empty(layout, headers, dtype)
        for file in dict.fromkeys(header.file for header in headers.values()):
            _assign(model, file, layout, dtype, device)
        finish(model, device)
        return freeze(model).eval()

    def inspect(self, name: str) -> Inspection:
        """What headers and settings tell; `reason` is None just where loading needs no more than sound data."""
        headers = headers_in(weight_files(self.folder))
        counts, sizes = parts_of(headers)
        reason = obstacle(self.folder, lambda: self._empty(self.layout(), headers, dtype_of(self.source.config)))
        if reason is None and self.codes == "qweight":  # words of n_bits, a number that there is a layout for
            n_bits = self.layout().n_bits
            counts |= {part: counts[part] * 32 // n_bits for part in ("codes", "zero_points")}
        scales, unquantized = counts["scales"], counts["unquantized"]
        return Inspection(
            name,
            self.format,
            **self.about,
            settings=self.source.settings or {},
            layers=sum(stored.endswith(f".{self.codes}") for stored in headers),
            counts=counts,
            sizes=sizes,
            trainable={
                "scales": scales,
                self.with_scales: scales + counts["codebooks"],
                "scales+unquantized": scales + unquantized,
            },
            reason=reason,
            moving=WHOLE_ZEROS,
        )

    def writing(self, tensors: dict[str, Tensor]) -> Write:
        """Tensors have the names of the checkpoint."""
        return rewriting(self.folder, tensors)

    def _empty(self, layout: Layout, headers: dict[str, Header], dtype: torch.dtype) -> Any:
        """The model on meta with quantized layers, which expects just the tensors that are there. Raises QzoError."""
        check_counts(self.folder, self.source.config, len(headers))
        check_architecture(self.folder, self.source.config)
        if not any(name.endswith(f".{self.codes}") for name in headers):
            raise QzoError(f"{self.folder}: no tensor holds codes, and config.json says {self.format}")
        model = skeleton(self.folder, headers, dtype, max(PER_NUMBER, layout.per_number))
        _insert_layers(model, headers, self.codes, layout)
        check_tensors(self.folder, model, headers)
        return model


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


def _insert_layers(model: nn.Module, names: Container[str], codes: str, layout: Layout) -> None:
    """A quantized layer for each layer whose codes are in the checkpoint, with a bias where that has one.

    So layers that the quantizer was told to leave alone (`modules_to_not_convert`) stay as they are.
    """

    def stored(site: Site) -> bool:
        path = site.paths[0]
        return f"{path}.{codes}" in names or f"{path}.gate_up_proj.0.{codes}" in names

    sites = [site for site in find_sites(model) if stored(site)]
    replace_sites(model, sites, lambda _, weight, bias: layout.build(weight, bias))
    for path, module in model.named_modules():
        if isinstance(module, Quantized) and module.bias is None and f"{path}.bias" in names:
            bias = torch.empty(module.out_features, device="meta")
            module.bias = nn.Parameter(bias, requires_grad=False)


def _assign(model: nn.Module, file: Path, layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    """Give the tensors of one file to the model."""
    expected = model.state_dict()
    tensors = {}
    for name, tensor in read_tensors_of(file, str(device)):
        if name.endswith(IMPLIED):
            continue
        if layout.read is not None and name.endswith(layout.read[0]):
            tensor = layout.read[1](tensor)
        elif name.endswith(".g_idx"):
            scales = expected[f"{name.removesuffix('g_idx')}scales"]
            tensor = _checked_groups(file, name, tensor, groups=len(scales))
        elif tensor.is_floating_point() and not name.endswith(AS_STORED):
            tensor = tensor.to(dtype)
        tensors[name] = tensor
    model.load_state_dict(tensors, strict=False, assign=True)


def _checked_groups(file: Path, name: str, g_idx: Tensor, groups: int) -> Tensor:
    """g_idx as int32. Raises QzoError for a group that is not there."""
    low, high = g_idx.aminmax()
    if low < 0 or high >= groups:
        raise QzoError(f"{file}: {name} has values outside 0 ... {groups - 1}")
    return g_idx.to(torch.int32)


def parts_of(headers: dict[str, Header]) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers (words, where they are packed) and bytes of each part; of "unquantized" only floating numbers count."""
    counts = dict.fromkeys((*PARTS.values(), "unquantized"), 0)
    sizes = dict.fromkeys(counts, 0)
    packed = {name.rpartition(".")[0] for name in headers if name.endswith((".qweight", ".codes"))}
    for name, header in headers.items():
        path, _, last = name.rpartition(".")
        part = PARTS.get(last, "unquantized") if path in packed else "unquantized"
        sizes[part] += header.nbytes
        if part != "unquantized" or (header.dtype in FLOATING and not name.endswith(IMPLIED)):
            counts[part] += header.numel
    return counts, sizes
