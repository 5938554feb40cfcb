"""Models from GGUF files: with their blocks as they are, or with every weight rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import AGAIN, QzoError
from qzo.files.finite import check_tensor
from qzo.formats.gguf.codes import BLOCK_TYPES, BlockType
from qzo.formats.gguf.experts import GgufExperts, expert_layers
from qzo.formats.gguf.finite import check_blocks
from qzo.formats.gguf.layer import GgufEmbedding, GgufLinear
from qzo.formats.gguf.metadata.keys import ending_tokens
from qzo.formats.gguf.places import STACKS, Place, Plan, plan
from qzo.formats.gguf.source import from_pairs, read_tensor
from qzo.formats.gguf.tuned import parts_of, put_parts
from qzo.formats.vocabulary import TiedQuantHead
from qzo.kernels.rebuilt import chunk_bounds
from qzo.models.skeleton import finish
from qzo.models.walk import freeze, output_head

Read = tuple[Place, Tensor, BlockType | None]  # a place, blocks or plain numbers for it, and the type of blocks


def load_packed(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model, its quantized tensors as GgufLinear, GgufEmbedding and GgufExperts, everything frozen.

    Memory: that of the blocks, and one tensor more while its rows are put in order. Raises QzoError.
    """
    planned, stacks = plan(path, dtype), _Stacks()
    model = planned.model
    for place, tensor, kind in _tensors(planned):
        tensor = tensor.to(device)
        if place.stack is not None:
            stack = tensor if kind else _plain(planned, place, tensor, kind, dtype)
            stacks.add(model, place, expert_layers(stack, kind))
        elif kind is None or not place.in_blocks:
            _set(model, place, _plain(planned, place, tensor, kind, dtype))
        elif isinstance(place.module, nn.Linear):
            model.set_submodule(place.path, GgufLinear(tensor, kind, model.get_submodule(place.path).bias))
        else:
            _put_table(model, place, GgufEmbedding(tensor, kind, dtype, _multiplier(planned, place)))
    for place in planned.zeros:
        _set(model, place, torch.zeros(place.shape, dtype=dtype, device=device))
    _finish(planned, device)
    return freeze(model).eval()


def load_dense(path: Path, dtype: torch.dtype, device: torch.device, tuned: Mapping[str, Tensor]) -> Any:
    """The model in `dtype`, every weight rebuilt in fp32 and rounded once. Raises QzoError.

    `tuned`: scales and offsets in the place of the file's, as `write_gguf` takes them.
    Memory: that of the model, the blocks of one tensor, and some of its rows in fp32.
    """
    planned = plan(path, dtype)
    model = planned.model
    for place, tensor, kind in _tensors(planned, tuned):
        weights = _plain(planned, place, tensor.to(device), kind, dtype)
        if place.stack in ("gate", "up"):
            module = model.get_submodule(place.path)
            if module.gate_up_proj.is_meta:
                _set(model, place, torch.empty(module.gate_up_proj.shape, dtype=dtype, device=device))
            halves = dict(zip(STACKS, module.gate_up_proj.data.chunk(2, dim=1), strict=False))
            halves[place.stack].copy_(weights)
        else:
            _set(model, place, weights)
    for place in planned.zeros:
        _set(model, place, torch.zeros(place.shape, dtype=dtype, device=device))
    _finish(planned, device)
    return model.requires_grad_(True).eval()


class _Stacks:
    """The layers of experts, until the last of the three stacks of a module has been read."""

    def __init__(self) -> None:
        self._layers: dict[str, dict[str, list[nn.Module]]] = {}

    def add(self, model: Any, place: Place, layers: list[nn.Module]) -> None:
        found = self._layers.setdefault(place.path, {})
        found[str(place.stack)] = layers
        if len(found) == len(STACKS):
            act = model.get_submodule(place.path).act_fn
            model.set_submodule(place.path, GgufExperts(self._layers.pop(place.path), act))


def _tensors(planned: Plan, tuned: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[Read]:
    """Every tensor of a file that goes into the model, its rows in the order of transformers.

    Raises QzoError for scales and numbers that are not finite.
    """
    source, parts = planned.source, parts_of(planned, tuned)
    with source.path.open("rb") as file:
        for name, place in planned.places.items():
            info = source.header.tensors[name]
            tensor = read_tensor(file, source.path, name, info)
            put_parts(tensor, parts.get(name, []), place.heads)
            check_blocks(source.path, name, tensor, info)
            yield place, from_pairs(tensor, place.heads), BLOCK_TYPES.get(info.kind)


def _plain(planned: Plan, place: Place, tensor: Tensor, kind: BlockType | None, dtype: torch.dtype) -> Tensor:
    """Weights [..., K] in `dtype`, of plain numbers or of blocks [..., B, n_bytes]; a shift is taken off in fp32.

    Raises QzoError for numbers that are too large for the dtype.
    """
    if kind is None:
        weights = ((tensor.float() - place.shift).to(dtype) if place.shift else tensor.to(dtype)).view(place.shape)
    else:
        rows = tensor.flatten(0, -3)
        width = rows.shape[1] * kind.n_weights
        weights = torch.empty(rows.shape[0], width, dtype=dtype, device=tensor.device)
        for start, stop in chunk_bounds(*weights.shape):
            weights[start:stop] = kind.weights(rows[start:stop])
        weights = weights.view(*tensor.shape[:-2], width)
    if weights.dtype != tensor.dtype:
        check_tensor(f"{planned.source.path}: {place.path}.{place.parameter}", weights)
    return weights


def _set(model: Any, place: Place, tensor: Tensor) -> None:
    setattr(model.get_submodule(place.path), place.parameter, nn.Parameter(tensor, requires_grad=False))


def _multiplier(planned: Plan, place: Place) -> float | None:
    """What a table of the model multiplies its rows with (Gemma). Raises QzoError for one of an unknown make."""
    if type(place.module) is nn.Embedding:
        return None
    scale = getattr(place.module, "scalar_embed_scale", None)
    if not isinstance(scale, int | float):
        raise QzoError(f"{planned.source.path}: a {type(place.module).__name__} is not known here; load it dequantized")
    return float(scale)


def _put_table(model: Any, place: Place, table: GgufEmbedding) -> None:
    """The vocabulary, and the output head on it where the two are tied."""
    head = output_head(model)
    if model.config.tie_word_embeddings and head is not None:
        path = next(path for path, module in model.named_modules() if module is head)
        model.set_submodule(path, TiedQuantHead(table, getattr(head, "bias", None)))
    model.set_submodule(place.path, table)


def _finish(planned: Plan, device: torch.device) -> None:
    model = planned.model
    tied = any(isinstance(module, TiedQuantHead) for module in model.modules())
    finish(model, device, tie=not tied)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise QzoError(f"{planned.source.path}: {len(missing)} tensors are missing, the first is {missing[0]}; {AGAIN}")
    ends = ending_tokens(planned.source.header)
    if ends and model.generation_config is not None:
        model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
