"""Checkpoints of torchao in safetensors, as transformers 5 saves them.

A weight of the subclass C with the parts a and b is stored as "path._weight_a" and "path._weight_b"; the metadata of
the file says under "path.weight" in JSON: {"_type": "C", "_data": {attributes}, "_tensor_data_names": ["a", "b"]}.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import OTHER, QzoError, named
from qzo.files.folder import Header, headers_in, opened, read_tensors_of, weight_files
from qzo.files.rewrite import Write, rewriting
from qzo.files.settings import Source
from qzo.formats.torchao.layer import AoInt4Linear, AoOrigin
from qzo.formats.torchao.library import INT4, AoLinear, build
from qzo.models.stored import StoredModel, on_meta

PART = "._weight_"
MOVING = "offsets of int4 weights move with their scales"


def find(source: Source) -> StoredModel | None:
    """The torchao checkpoint in a folder; None where there is another one. Raises QzoError for a damaged one."""
    if source.method != "torchao":
        return None
    folder = source.path
    files = weight_files(folder)
    headers = headers_in(files)
    parts: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        path, mark, part = name.partition(PART)
        if mark:
            parts.setdefault(path, {})[part] = header
    if not parts:
        raise QzoError(f"{folder}: no tensor holds codes, and config.json says torchao")
    metadata: dict[str, str] = {}
    for file in files:
        with opened(file) as tensors:
            metadata |= tensors.metadata() or {}
    layers = {}
    for path, found in parts.items():
        with named(f"{folder}: {path}"):
            layers[path] = _layer(path, metadata.get(f"{path}.weight"), found, headers.get(f"{path}.bias"))
    writing = partial(_writing, folder, headers)
    return StoredModel("torchao", source, headers, layers, partial(_read, files, layers), writing, MOVING)


def _writing(source: Path, headers: dict[str, Header], tensors: dict[str, Tensor]) -> Write:
    """Scales and offsets, as `qzo.trainable` names them, into the tensors of the checkpoint.

    Where scales and offsets are stored as one tensor, what was not tuned is taken from the file. Raises QzoError for a
    shape that is not that of the checkpoint.
    """
    found: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        alone = {"scales": f"{path}{PART}scale", "offsets": f"{path}{PART}zero_point"}.get(last, "")
        both = f"{path}{PART}scale_and_zero"
        if alone in headers:
            place = torch.empty(headers[alone].shape, device="meta")
            found[name] = {alone: tensor}
        elif alone and both in headers:
            if both not in whole:
                with opened(headers[both].file) as file:
                    whole[both] = file.get_tensor(both)
            place = whole[both][..., 0 if last == "scales" else 1]
            found[name] = {both: whole[both]}
        else:
            continue
        if place.shape != tensor.shape:
            raise QzoError(f"{source} has no place for {name} with shape {tuple(tensor.shape)}")
        if both in whole:
            place.copy_(tensor)
    return rewriting(source, tensors, found)


def _layer(path: str, about: str | None, parts: dict[str, Header], bias: Header | None) -> AoLinear:
    """The layer on meta that metadata and headers describe."""
    try:
        parsed = json.loads(about or "null")
    except (ValueError, RecursionError):
        parsed = None
    kind, data = (parsed.get(key) for key in ("_type", "_data")) if isinstance(parsed, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(data, dict):
        raise QzoError("the file's metadata does not say what its weight is; save it again")
    attributes = {key: _decoded(key, value) for key, value in data.items()}
    tensors = {part: on_meta(f"{path}{PART}{part}", header) for part, header in parts.items()}
    shape = attributes.get("shape") if kind in INT4 else tuple(tensors["qdata"].shape) if "qdata" in tensors else ()
    if not isinstance(shape, list | tuple) or not all(type(size) is int and 0 < size < 2**31 for size in shape):
        raise QzoError(f"the {kind} has no shape of positive numbers")
    own_bias = None if bias is None else on_meta(f"{path}.bias", bias)
    layer = build(AoOrigin(kind, attributes), tensors, tuple(shape), own_bias)
    block = [layer.out_features // len(layer.scales), layer.group_size]
    block = [1, layer.group_size] if isinstance(layer, AoInt4Linear) else block
    if attributes.get("block_size") != block:
        raise QzoError(f"block_size={attributes.get('block_size')}, but its scales imply {block}")
    return layer


def _decoded(key: str, value: Any) -> Any:
    """A dtype by its name, plain JSON as it is. Raises QzoError for anything else."""
    if isinstance(value, dict):
        dtype = getattr(torch, str(value.get("_data")), None) if value.get("_type") == "torch.dtype" else None
        if not isinstance(dtype, torch.dtype):
            raise QzoError(f"{key} is a {value.get('_type')}; only weight-only quantization is trained; {OTHER}")
        return dtype
    return value


def _read(files: list[Path], layers: dict[str, AoLinear]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file by their names in the model."""
    for file in files:
        tensors = {}
        for name, tensor in read_tensors_of(file):
            path, found, part = name.partition(PART)
            if not found:
                tensors[name] = tensor
            elif part == "scale_and_zero":
                tensors[f"{path}.scales"], tensors[f"{path}.offsets"] = tensor[..., 0], tensor[..., 1]
            else:
                zeros = "offsets" if isinstance(layers[path], AoInt4Linear) else "zero_points"
                tensors[f"{path}.{ {'qdata': 'codes', 'scale': 'scales'}.get(part, zeros) }"] = tensor
        yield tensors
