"""A model without data, checked against its configuration and its files, and finished once its tensors are there."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import AGAIN, QzoError, advised, named
from qzo.files.budget import at_most, check_buffers, check_counts, check_factors
from qzo.files.folder import Header, headers_in, weight_files
from qzo.files.names import Placed, check_known, place
from qzo.models.build import build
from qzo.quiet import quiet_libraries

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config.json names, bf16 where it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = DTYPES.get(name)
    if dtype is None:
        raise QzoError(
            f'dtype "{name}" in config.json is not known; need float32, float16 or bfloat16; mend config.json'
        )
    return dtype


FLOATING: tuple[str, ...] = ("F16", "BF16", "F32", "F64")
WHOLE = ("I32", "I64")
CODES = (".qweight", ".qzeros", ".scales", ".g_idx")
NAMED = {torch.int32: "I32", torch.int16: "I16", torch.int8: "I8"}


def check_tensors(
    folder: Path, model: Any, headers: dict[str, Header], placed: Placed, known: Container[str] = ()
) -> None:
    """Tie the weights of a model on meta. Raises QzoError unless the headers are those of just the tensors it expects.

    Args:
        folder: for messages.
        model: with layers of a format in their places.
        headers: of all tensors that are checked here.
        placed: where they go.
        known: names of the model's tensors that are there, though not among the headers.
    """
    model.tie_weights()
    expected = model.state_dict(keep_vars=True)
    given = set()
    for name, header in headers.items():
        target = placed.named(name)
        if target is not None:
            _check_fits(name, header, expected.get(target))
            given.add(target)
    check_known(placed, headers)
    for target, joined in placed.joined.items():
        sources = {name: torch.empty(headers[name].shape, device="meta") for name in joined.sources}
        file = headers[next(iter(sources))].file
        with named(str(file)):
            shape = tuple(joined.join(target, sources, model).shape)
        if shape != tuple(expected[target].shape):
            raise QzoError(
                f"{file}: {next(iter(sources))} and {len(sources) - 1} others make up {target} {shape}, but "
                f"config.json implies {tuple(expected[target].shape)}; take config.json and weights from one checkpoint"
            )
        given.add(target)
    found = {id(tensor) for name, tensor in expected.items() if name in given or name in known}
    missing = [name for name, tensor in expected.items() if tensor.is_meta and id(tensor) not in found]
    if missing:
        raise QzoError(
            f"{folder}: {len(missing)} tensors are missing, the first is {missing[0]}; download all files again, or "
            "take config.json and weights from one checkpoint"
        )


def check_architecture(folder: Path, config: dict[str, Any]) -> None:
    """Raise QzoError for a model that only code of its own could build; such code is never run."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    kind = config.get("model_type")
    methods = sorted(name for name in config if callable(getattr(PreTrainedConfig, name, None)))
    if methods:  # transformers would put the value in its place, and call it
        raise QzoError(f"{folder}: config.json has {methods[0]}, which is no setting of a model; remove it")
    if "auto_map" in config and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise QzoError(
            f'{folder}: config.json asks for code of its own (auto_map), which is never run, and model_type="{kind}" '
            "is not one that transformers knows; give a model of a known architecture"
        )


def skeleton(
    folder: Path, headers: dict[str, Header], dtype: torch.dtype, per_number: int = 1, part: bool = False
) -> tuple[Any, bool]:
    """The unquantized model on meta, and whether it is a part, see `build`.

    `per_number` is how many weights a stored number may hold. What is over twice what the files hold would take all
    memory, or forever, before the first tensor is found not to fit. Raises QzoError for such a one, and for one that
    cannot be built.
    """
    stored = sum(header.numel for header in headers.values())
    with at_most(per_number * stored, len(headers)):
        model, is_part = build(folder, dtype, part)
    implied = sum(parameter.numel() for parameter in model.parameters())
    if implied > 2 * per_number * stored:
        raise QzoError(
            f"{folder}: config.json implies {implied:,} weights, but the files hold {stored:,} numbers; take "
            "config.json and weights from one checkpoint"
        )
    with named(str(folder)):
        check_buffers(model, sum(header.nbytes for header in headers.values()))
        check_factors(model)
    return model, is_part


@advised(AGAIN)
def check_unquantized(folder: Path, config: dict[str, Any], headers: dict[str, Header]) -> None:
    """Raise QzoError unless the files hold just what the unquantized model expects."""
    check_counts(folder, config, len(headers))
    check_architecture(folder, config)
    model, _ = skeleton(folder, headers, dtype_of(config))
    check_known(place(model, headers), headers)


def as_stored(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an unquantized model by the names that its files have for them. Raises QzoError."""
    headers = headers_in(weight_files(folder))
    if all(name in headers for name in tensors):
        return tensors
    model, _ = skeleton(folder, headers, dtype_of(config))
    with named(str(folder)):
        return place(model, headers).apart(tensors, model)


def _check_fits(name: str, header: Header, wanted: Tensor | None) -> None:
    """Raise QzoError unless a tensor is what config.json implies; only the floating dtype may differ."""
    file = header.file
    if wanted is None:
        raise QzoError(
            f"{file}: the model has no tensor {name}; config.json and weights do not belong together: take both from "
            "one checkpoint"
        )
    dtypes = (NAMED[wanted.dtype],) if wanted.dtype in NAMED else FLOATING
    if name.endswith(".g_idx"):
        dtypes = WHOLE
    cause = ' (by bits, group_size and "dynamic" of its quantization_config)' if name.endswith(CODES) else ""
    if header.shape != wanted.shape or header.dtype not in dtypes:
        raise QzoError(
            f"{file}: {name} is {header.dtype} {header.shape}, but config.json implies {dtypes[0]} "
            f"{tuple(wanted.shape)}{cause}; take config.json and weights from one checkpoint"
        )


def finish(model: Any, device: torch.device, tie: bool = True) -> None:
    """Tie weights, and compute the buffers that no checkpoint holds (rotary tables, causal masks)."""
    if tie:
        _tie(model)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # so that _init_weights leaves it alone
    with torch.no_grad():
        for module in model.modules():
            unset = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
            for name in set(unset) & module._non_persistent_buffers_set:
                setattr(module, name, torch.empty_like(getattr(module, name), device=device))
            if unset:
                model._init_weights(module)


def _tie(model: Any) -> None:
    """As `from_pretrained` does: where the files hold both of two tied weights, and they differ, both stay."""
    missing = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta}
    before = dict(model.all_tied_weights_keys)
    with quiet_libraries():
        model.tie_weights(missing_keys=missing)
    if before and not model.all_tied_weights_keys:
        model.config.tie_word_embeddings = False
