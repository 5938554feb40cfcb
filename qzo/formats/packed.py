"""Reading GPTQ, AWQ and AQLM checkpoints: layers with the packed tensors in the places of the model's linear layers."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.aqlm.layer import AqlmLinear
from qzo.formats.awq.layer import AwqLinear
from qzo.formats.gptq.codes import zeros_from_v1
from qzo.formats.gptq.layer import QuantLinear
from qzo.models.folder import Header, read_tensors_of
from qzo.models.settings import Quantization
from qzo.models.skeleton import IMPLIED, check_tensors, finish, skeleton
from qzo.models.walk import Site, find_sites, freeze, replace_sites

PACKED = (QuantLinear, AwqLinear, AqlmLinear)
CODES = {"gptq": "qweight", "awq": "qweight", "aqlm": "codes"}  # the tensor that tells a quantized layer
AS_STORED = (".scales", ".codebooks")  # whatever the dtype of the rest
PER_WORD = 16  # codes of two bits, the most that a number can hold


def load_packed(
    folder: Path, quantization: Quantization, headers: dict[str, Header], dtype: torch.dtype, device: torch.device
) -> Any:
    """Build the model on meta, put quantized layers in, and give every tensor its value file by file.

    Args:
        folder: of the checkpoint.
        quantization: its layout.
        headers: of all its tensors.
        dtype: of the unquantized tensors.
        device: where the tensors go.

    Extra memory: the tensors of one file, until they are in place. Raises QzoError for files that are damaged or do
    not belong together, before any tensor is read as far as the headers tell.
    """
    model = empty_model(folder, quantization, headers, dtype)
    for file in dict.fromkeys(header.file for header in headers.values()):
        _assign(model, file, quantization, dtype, device)
    finish(model, device)
    return freeze(model).eval()


def empty_model(folder: Path, quantization: Quantization, headers: dict[str, Header], dtype: torch.dtype) -> Any:
    """The model on meta with quantized layers, which expects just the tensors that are there. Raises QzoError."""
    layout = quantization.aqlm
    per_number = PER_WORD if layout is None else layout.in_group_size * layout.out_group_size
    model = skeleton(folder, headers, dtype, max(PER_WORD, per_number))
    _insert_layers(model, headers, quantization)
    check_tensors(folder, model, headers)
    return model


def _insert_layers(model: nn.Module, names: Container[str], quantization: Quantization) -> None:
    """A quantized layer for each layer whose codes are in the checkpoint, with a bias where that has one.

    So layers that the quantizer was told to leave alone (`modules_to_not_convert`) stay as they are.
    """
    group_size, codes = quantization.group_size, CODES[quantization.method]

    def stored(site: Site) -> bool:
        path = site.paths[0]
        return f"{path}.{codes}" in names or f"{path}.gate_up_proj.0.{codes}" in names

    def build(_: int, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if quantization.method == "gptq":
            return QuantLinear.from_weight(weight, bias, quantization.n_bits, group_size)
        rows, columns = weight.shape
        if quantization.aqlm is not None:
            return AqlmLinear.empty(columns, rows, quantization.aqlm, bias is not None, weight.dtype, weight.device)
        return AwqLinear.empty(columns, rows, group_size, bias is not None, weight.dtype, weight.device)

    replace_sites(model, [site for site in find_sites(model) if stored(site)], build)
    for path, module in model.named_modules():
        if isinstance(module, PACKED) and module.bias is None and f"{path}.bias" in names:
            bias = torch.empty(module.out_features, device="meta")
            module.bias = nn.Parameter(bias, requires_grad=False)


def _assign(model: nn.Module, file: Path, quantization: Quantization, dtype: torch.dtype, device: torch.device) -> None:
    """Give the tensors of one file to the model."""
    expected = model.state_dict()
    tensors = {}
    for name, tensor in read_tensors_of(file, str(device)):
        if name.endswith(IMPLIED):
            continue
        if name.endswith(".qzeros") and quantization.version == "gptq":
            tensor = zeros_from_v1(tensor, quantization.n_bits)
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
