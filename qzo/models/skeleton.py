"""A model without data, checked against its configuration and its files, and finished once its tensors are there."""

from __future__ import annotations

import re
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.models.folder import Header, one_line
from qzo.quiet import quiet_libraries

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config.json names, bf16 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = DTYPES.get(name)
    if dtype is None:
        raise QzoError(f'dtype "{name}" in config.json is not known; need float32, float16 or bfloat16')
    return dtype


IMPLIED = "rotary_emb.inv_freq"  # old checkpoints store what the config implies
FLOATING: tuple[str, ...] = ("F16", "BF16", "F32", "F64")
WHOLE = ("I32", "I64")
NAMED = {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}


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
        with quiet_libraries():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with quiet_libraries(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # as in _from_pretrained
        raise QzoError(f"{folder}: {one_line(error)}") from error


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


COUNTS = re.compile(r"n(um)?_?(hidden_|decoder_|encoder_)?layers?")


def check_counts(folder: Path, config: dict[str, Any], tensors: int) -> None:
    """Raise QzoError for a config.json with more layers than there are tensors: it would take forever to build them."""
    for name, value in config.items():
        if COUNTS.fullmatch(name) and isinstance(value, int) and value > tensors:
            raise QzoError(
                f"{folder}: config.json has {name}={value}, but there are only {tensors} tensors; "
                "they do not belong together"
            )
