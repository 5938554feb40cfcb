"""Where each tensor of a GGUF file goes in transformers' model, which is built without data and compared with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qzo.errors import QzoError, advised
from qzo.files.folder import one_line
from qzo.formats.gguf.codes import BLOCK_TYPES, PLAIN_TYPES
from qzo.formats.gguf.header import TensorInfo
from qzo.formats.gguf.metadata.rope import FACTORS
from qzo.formats.gguf.source import GgufSource, open_gguf, type_name
from qzo.models.causal import check_causal
from qzo.models.experts import check_experts, looks_like_experts
from qzo.models.walk import output_head
from qzo.quiet import quiet_libraries

UNUSED = ".attn_rot_embd.weight"  # in files of 2023, by layer: what the metadata say too, read by nobody
AGAIN = "download or convert it again"
STACKS = ("gate", "up", "down")  # of the experts of a layer: in the model, gate and up are one


@dataclass(frozen=True)
class Place:
    """Where a tensor of the file goes.

    Args:
        path: of the module.
        parameter: of it; for experts, the one that the tensor is all or half of.
        shape: in the file, for blocks that of the weights.
        module: without data.
        heads: whose rows are stored in pairs; None for a tensor that is stored as it is.
        shift: what the file has added to it.
        stack: which of the tensors of the experts it is; None for any other.
    """

    path: str
    parameter: str
    shape: tuple[int, ...]
    module: nn.Module
    heads: int | None = None
    shift: float = 0.0
    stack: str | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether blocks stay packed here: in linear layers, tables and experts, not in a small router."""
        return self.stack is not None or isinstance(self.module, nn.Linear | nn.Embedding)


@dataclass(frozen=True)
class Plan:
    """A file and its model on meta, with a place for each tensor of both.

    Args:
        source: the file.
        model: on meta.
        places: name in the file -> place.
        zeros: places that the file has no tensor for, and that are 0.
    """

    source: GgufSource
    model: Any
    places: dict[str, Place]
    zeros: list[Place]


def plan(path: Path, dtype: torch.dtype = torch.bfloat16) -> Plan:
    """How a file becomes a model. Raises QzoError for all that its header has against it, with what would help."""
    with advised(AGAIN):
        return _plan(path, dtype)


def _plan(path: Path, dtype: torch.dtype) -> Plan:
    source = open_gguf(path)
    model = _skeleton(source, dtype)
    places, zeros = _places(source, model)
    unknown = sorted(source.header.tensors.keys() - places.keys() - set(FACTORS))
    unknown = [name for name in unknown if not name.endswith(UNUSED)]
    if unknown:
        raise QzoError(
            f"{path} has {unknown[0]}, for which {type(model).__name__} has no place, and without which it would "
            "compute something else; take the model's safetensors files"
        )
    for name, place in places.items():
        _check_fits(path, name, source.header.tensors[name], place)
    return Plan(source, model, places, zeros)


def _skeleton(source: GgufSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(source.config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise QzoError(f"{source.path} has a config that does not build: {one_line(error)}") from error
    check_causal(source.path, source.config, model)
    return model


def _places(source: GgufSource, model: nn.Module) -> tuple[dict[str, Place], list[Place]]:
    """Name in the file -> its place, and what is 0. Raises QzoError for tensors of the model that have no partner."""
    name_of = source.name_of()
    places: dict[str, Place] = {}
    zeros: list[Place] = []
    tensors, biases = source.header.tensors, _kinds(source.header.tensors)
    for path, module in model.named_modules():
        if looks_like_experts(module):
            check_experts(path, module)
            places |= _stacks(source, path, module)
            continue
        for parameter, tensor in module.named_parameters(recurse=False):
            name = name_of(f"{path}.{parameter}")
            if name in tensors:
                shift = source.family.shift if name.endswith("norm.weight") else 0.0
                places[name] = Place(path, parameter, tuple(tensor.shape), module, source.heads(name), shift)
            elif name is not None and name.endswith(source.family.biases) and _kind(name) not in biases:
                zeros.append(Place(path, parameter, tuple(tensor.shape), module))
            elif not (module is output_head(model) and source.config.tie_word_embeddings):
                raise QzoError(f"{source.path} has no tensor {name or path + '.' + parameter}; convert it again")
    return places, zeros


def _kind(name: str) -> str:
    """What a tensor is to its layer, e.g. attn_q.bias."""
    return ".".join(name.split(".")[2:])


def _kinds(names: Any) -> set[str]:
    return {_kind(name) for name in names if name.startswith("blk.")}


def _stacks(source: GgufSource, path: str, module: nn.Module) -> dict[str, Place]:
    """The three tensors of the experts of a layer."""
    layer = next(part for part in path.split(".") if part.isdecimal())
    n_experts, width, hidden = module.gate_up_proj.shape  # type: ignore[misc]
    shapes = {"gate": (n_experts, width // 2, hidden), "down": (n_experts, hidden, width // 2)}
    places = {}
    for stack in STACKS:
        name = f"blk.{layer}.ffn_{stack}_exps.weight"
        if name not in source.header.tensors:
            raise QzoError(
                f"{source.path} has no tensor {name}; convert it again, with gate, up and down a tensor each for "
                "all experts of a layer"
            )
        parameter = "down_proj" if stack == "down" else "gate_up_proj"
        places[name] = Place(path, parameter, shapes.get(stack, shapes["gate"]), module, stack=stack)
    return places


def _check_fits(path: Path, name: str, info: TensorInfo, place: Place) -> None:
    row_alone = place.shape[:1] == (1,) and info.shape == place.shape[1:]  # llama.cpp's converter drops sizes of 1
    if info.shape != place.shape and not row_alone:
        raise QzoError(f"{path}: {name} has shape {info.shape}, but the file's metadata implies {place.shape}")
    if place.heads is not None and (place.heads < 1 or info.shape[0] % (2 * place.heads)):
        raise QzoError(f"{path}: {name} has {info.shape[0]} rows, which {place.heads} heads do not share evenly")
    if info.kind in PLAIN_TYPES:
        return
    if info.kind not in BLOCK_TYPES:
        raise QzoError(
            f"{path}: {name} has type {type_name(info.kind)}, which cannot be read; known are "
            f"{', '.join(kind.name for kind in BLOCK_TYPES.values())}, F32, F16 and BF16: quantize the model anew"
        )
    if len(info.shape) < 2:
        raise QzoError(f"{path}: {name} is quantized, and a {type(place.module).__name__} cannot be")
