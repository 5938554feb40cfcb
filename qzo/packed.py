"""Reading GPTQ, AWQ and AQLM checkpoints: layers with the packed tensors in the places of the model's linear layers."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.aqlm import AqlmLinear
from qzo.awq import AwqLinear
from qzo.errors import QzoError
from qzo.folder import Header, one_line, read_tensors_of
from qzo.linear import QuantLinear
from qzo.packing import zeros_from_v1
from qzo.quantization import Quantization
from qzo.walk import Site, find_sites, freeze, replace_sites

PACKED = (QuantLinear, AwqLinear, AqlmLinear)
CODES = {"gptq": "qweight", "awq": "qweight", "aqlm": "codes"}  # the tensor that tells a quantized layer
AS_STORED = (".scales", ".codebooks")  # whatever the dtype of the rest
IMPLIED = "rotary_emb.inv_freq"  # old checkpoints store what the config implies
PER_WORD = 16  # codes of two bits, the most that a number can hold
FLOATING: tuple[str, ...] = ("F16", "BF16", "F32", "F64")
WHOLE = ("I32", "I64")
NAMED = {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}


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


def check_tensors(folder: Path, model: Any, headers: dict[str, Header], checked: Container[str] = ()) -> None:
    """Tie the weights of a model on meta. Raises QzoError unless the headers are those of just the tensors it expects.

    `checked` are names of the model's tensors that are known to be there, under other names.
    """
    model.tie_weights()
    expected = model.state_dict(keep_vars=True)
    for name, header in headers.items():
        if not name.endswith(IMPLIED):
            _check_fits(name, header, expected.get(name))
    given = {id(tensor) for name, tensor in expected.items() if name in headers or name in checked}
    missing = [name for name, tensor in expected.items() if tensor.is_meta and id(tensor) not in given]
    if missing:
        raise QzoError(f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}")


def check_architecture(folder: Path, config: dict[str, Any]) -> None:
    """Raise QzoError for a model that only code of its own could build; such code is never run."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if "auto_map" in config and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise QzoError(
            f'{folder}: config.json asks for code of its own (auto_map), which is never run, and model_type="{kind}" '
            "is not one that transformers knows; give a model of a known architecture"
        )


def skeleton(folder: Path, headers: dict[str, Header], dtype: torch.dtype, per_number: int = 1) -> Any:
    """The unquantized model on meta. Raises QzoError for one that cannot be built, or is far larger than its files.

    `per_number` is how many weights a stored number may hold. What is over twice what the files hold would take all
    memory, or forever, before the first tensor is found not to fit.
    """
    model = _build(folder, dtype)
    implied = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(header.numel for header in headers.values())
    if implied > 2 * per_number * stored:
        raise QzoError(f"{folder}: config.json implies {implied:,} weights, but the files hold {stored:,} numbers")
    return model


def _build(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as in _from_pretrained
        raise QzoError(f"{folder}: {one_line(error)}") from error


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


def _check_fits(name: str, header: Header, wanted: Tensor | None) -> None:
    """Raise QzoError unless a tensor is what config.json implies; only the floating dtype may differ."""
    file = header.file
    if wanted is None:
        raise QzoError(f"{file}: the model has no tensor {name}; config.json and weights do not belong together")
    dtypes = (NAMED[wanted.dtype],) if wanted.dtype in NAMED else FLOATING
    if name.endswith(".g_idx"):
        dtypes = WHOLE
    if header.shape != wanted.shape or header.dtype not in dtypes:
        raise QzoError(
            f"{file}: {name} is {header.dtype} {header.shape}, but config.json implies {dtypes[0]} "
            f"{tuple(wanted.shape)}"
        )


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


def finish(model: Any, device: torch.device, tie: bool = True) -> None:
    """Tie weights, and compute the buffers that no checkpoint holds (rotary tables, causal masks)."""
    if tie:
        model.tie_weights()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that _init_weights leaves it alone
    with torch.no_grad():
        for module in model.modules():
            unset = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in set(unset) & module._non_persistent_buffers_set:
                setattr(module, name, torch.empty_like(getattr(module, name), device=device))
            if unset:
                model._init_weights(module)
