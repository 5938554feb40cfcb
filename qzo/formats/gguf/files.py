"""Models from GGUF files, and tuned scales back into them; packed blocks stay as they are, no copy is dequantized.

Plain tensors (F32, F16, BF16) are cast to the dtype asked for. `rope_freqs.weight` (the long-context scaling of
Llama 3.1) is left out, as transformers leaves it out.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.formats.gguf.codes import BLOCK_TYPES, PLAIN_TYPES, half_at
from qzo.formats.gguf.header import GgufHeader, TensorInfo, read_gguf_header
from qzo.formats.gguf.layer import GgufEmbedding, GgufLinear
from qzo.formats.gguf.source import (
    GgufSource,
    _type_name,
    check_packed,
    from_pairs,
    open_gguf,
    read_tensor,
    to_pairs,
)
from qzo.formats.vocabulary import TiedQuantHead
from qzo.models.folder import one_line
from qzo.models.inspection import Inspection
from qzo.models.rewrite import Write
from qzo.models.settings import Source
from qzo.models.skeleton import finish
from qzo.models.walk import freeze, output_head
from qzo.quiet import quiet_libraries

LEFT_OUT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def find(source: Source) -> GgufCheckpoint | None:
    """A .gguf file; None for a folder."""
    return GgufCheckpoint(source.path) if source.path.suffix == ".gguf" else None


@dataclass(frozen=True)
class GgufCheckpoint:
    """A .gguf file, whose blocks stay packed."""

    path: Path
    saved_as: ClassVar[str | None] = None

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model, its quantized tensors as GgufLinear and GgufEmbedding, everything frozen.

        Memory: that of the blocks, and one tensor more while its rows are put in order. Raises QzoError.
        """
        path, dtype = self.path, dtype or torch.bfloat16
        source = open_gguf(path)
        model = _skeleton(source, dtype)
        places = _places(source, model)
        heads = {name: source.heads(name) for name in places}
        for name, place in places.items():
            _check_shape(path, name, source.header.tensors[name], place, heads[name])
        with path.open("rb") as file:
            for name, place in places.items():
                info = source.header.tensors[name]
                tensor = from_pairs(read_tensor(file, path, name, info), heads[name]).to(device)
                _put(model, place, info, tensor, dtype)
        _finish_model(model, path, device)
        return freeze(model).eval()

    def inspect(self, name: str) -> Inspection:
        """By the header; scales and minima are taken out of the blocks that hold them, those of K-quants are not."""
        from gguf import GGMLQuantizationType

        header = read_gguf_header(self.path)
        counts = dict.fromkeys(("scales", "offsets", "codes", "unquantized"), 0)
        sizes, kinds = dict.fromkeys(counts, 0), set()
        for info in header.tensors.values():
            kind, numbers = BLOCK_TYPES.get(info.kind), math.prod(info.shape)
            part = "unquantized" if info.kind in PLAIN_TYPES else "codes"
            counts[part] += numbers
            sizes[part] += info.n_bytes
            kinds |= set() if part == "unquantized" else {GGMLQuantizationType(info.kind).name}
            for quantity, has in (("scales", kind and kind.has_scale), ("offsets", kind and kind.has_offset)):
                if kind is not None and has:
                    counts[quantity] += numbers // kind.n_weights
                    sizes[quantity] += numbers // kind.n_weights * torch.float16.itemsize
                    sizes["codes"] -= numbers // kind.n_weights * torch.float16.itemsize
        return Inspection(
            name,
            "gguf",
            ", ".join(sorted(kinds)) or None,
            group_size=next((kind.n_weights for kind in BLOCK_TYPES.values() if kind.has_scale), None)
            if kinds
            else None,
            settings={"architecture": header.metadata.get("general.architecture")},
            layers=sum(info.kind not in PLAIN_TYPES for info in header.tensors.values()),
            counts=counts,
            sizes=sizes,
            trainable={
                "scales": counts["scales"],
                "scales+offsets": counts["scales"] + counts["offsets"],
                "scales+unquantized": counts["scales"] + counts["unquantized"],
            },
            reason=_obstacle(self.path, header, counts["scales"]),
            moving="minima move with their scales",
        )

    def writing(self, tensors: dict[str, Tensor]) -> Write:
        """The file under its own name, with other scales and offsets."""
        return lambda folder: write_gguf(self.path, tensors, folder / self.path.name)


def _obstacle(path: Path, header: GgufHeader, scales: int) -> str | None:
    """Why a .gguf file cannot be trained packed; None where nothing but the data could still speak against it."""
    from gguf import GGMLQuantizationType

    unknown = sorted({info.kind for info in header.tensors.values()} - set(BLOCK_TYPES) - set(PLAIN_TYPES))
    if unknown:
        return f"it has tensors of the type {GGMLQuantizationType(unknown[0]).name}, which is not known here"
    if not scales:
        return "no tensor has scales that are not quantized themselves; take a Q4_0, Q4_1 or Q8_0 file"
    try:
        check_packed(path, header)
    except QzoError as error:
        return str(error).removeprefix(f"{path}: ")
    return None


def _skeleton(source: GgufSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_libraries(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(source.config, dtype=dtype, trust_remote_code=False)
    except Exception as error:
        raise QzoError(f"{source.path} has a config that does not build: {one_line(error)}") from error


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the file goes: a parameter [shape] of a module at `path`."""

    path: str
    parameter: str
    shape: tuple[int, ...]
    module: nn.Module


def _places(source: GgufSource, model: nn.Module) -> dict[str, _Place]:
    """Name in the file -> its place. Raises QzoError for tensors of the file or of the model that have no partner."""
    name_of, places = source.name_of(), {}
    for path, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            name = name_of(f"{path}.{parameter}")
            if name in source.header.tensors:
                places[name] = _Place(path, parameter, tuple(tensor.shape), module)
            elif not (module is output_head(model) and source.config.tie_word_embeddings):
                raise QzoError(f"{source.path} has no tensor {name or path + '.' + parameter}; convert it again")
    unknown = sorted(source.header.tensors.keys() - places.keys() - set(LEFT_OUT))
    if unknown:
        raise QzoError(
            f"{source.path} has {unknown[0]}, for which {type(model).__name__} has no place; "
            f"mixtures of experts and the like cannot be trained packed"
        )
    return places


def _check_shape(path: Path, name: str, info: TensorInfo, place: _Place, heads: int | None) -> None:
    if info.shape != place.shape:
        raise QzoError(f"{path}: {name} has shape {info.shape}, but the file's metadata implies {place.shape}")
    if heads is not None and (heads < 1 or info.shape[0] % (2 * heads)):
        raise QzoError(f"{path}: {name} has {info.shape[0]} rows, which {heads} heads do not share evenly")
    if info.kind in PLAIN_TYPES:
        return
    if info.kind not in BLOCK_TYPES:
        raise QzoError(
            f"{path}: {name} has type {_type_name(info.kind)}, which cannot be trained packed; known are "
            f"{', '.join(kind.name for kind in BLOCK_TYPES.values())}, F32, F16 and BF16; load it with dequantize=True"
        )
    if len(info.shape) != 2 or not isinstance(place.module, nn.Linear | nn.Embedding):
        raise QzoError(f"{path}: {name} is quantized, and a {type(place.module).__name__} cannot be")


def _put(model: Any, place: _Place, info: TensorInfo, tensor: Tensor, dtype: torch.dtype) -> None:
    """Give the model a tensor: a layer of its own for blocks, a parameter for plain numbers."""
    if info.kind in PLAIN_TYPES:
        module = model.get_submodule(place.path)
        setattr(module, place.parameter, nn.Parameter(tensor.to(dtype), requires_grad=False))
        return
    kind = BLOCK_TYPES[info.kind]
    if isinstance(place.module, nn.Linear):
        model.set_submodule(place.path, GgufLinear(tensor, kind, place.module.bias))
        return
    table = GgufEmbedding(tensor, kind, dtype)
    head = output_head(model)
    if model.config.tie_word_embeddings and head is not None:
        path = next(path for path, module in model.named_modules() if module is head)
        model.set_submodule(path, TiedQuantHead(table, getattr(head, "bias", None)))
    model.set_submodule(place.path, table)


def _finish_model(model: Any, path: Path, device: torch.device) -> None:
    quantized = any(isinstance(module, TiedQuantHead) for module in model.modules())
    finish(model, device, tie=not quantized)
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise QzoError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")


POSITION = {"scales": 0, "offsets": 1}  # of the fp16 number in a block


def write_gguf(path: Path, tensors: dict[str, Tensor], target: Path) -> None:
    """Copy a GGUF file and overwrite scales and offsets in the copy; every other byte stays.

    Args:
        path: of the file, which is only read.
        tensors: name -> tensor, as `qzo.scales` names them: "model.layers.0.mlp.up_proj.scales" fp16 [N, K / 32],
            ".offsets" beside it; rows in the order of transformers.
        target: file to write; put it in a folder of its own that is renamed when all is well.

    Extra memory: one packed tensor. Raises QzoError for tensors that the file has no place for, before it is copied.
    """
    source = open_gguf(path)
    name_of = source.name_of()
    places = {name: _place(source, name_of, name, tensor) for name, tensor in tensors.items()}
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        for name, (stored, info) in places.items():
            blocks = read_tensor(file, target, stored, info)
            numbers = half_at(blocks, POSITION[name.rpartition(".")[2]])
            numbers.copy_(to_pairs(tensors[name].to("cpu", torch.float16), source.heads(stored)))
            _write(file, blocks, info)


def _place(
    source: GgufSource, name_of: Callable[[str], str | None], name: str, tensor: Tensor
) -> tuple[str, TensorInfo]:
    """Name and place of the blocks that hold a scale or an offset."""
    path, _, part = name.rpartition(".")
    stored = name_of(f"{path}.weight")
    info = source.header.tensors.get(stored or "")
    kind = None if info is None else BLOCK_TYPES.get(info.kind)
    has = kind is not None and {"scales": kind.has_scale, "offsets": kind.has_offset}.get(part, False)
    if stored is None or info is None or kind is None or not has:
        raise QzoError(f"{source.path} has no place for {name}; give the file that was tuned")
    wanted = info.shape[0], info.shape[1] // kind.n_weights
    if tuple(tensor.shape) != wanted:
        raise QzoError(f"{source.path} has {name} with shape {wanted}, the tuned one has shape {tuple(tensor.shape)}")
    return stored, info


def _write(file: BinaryIO, blocks: Tensor, info: TensorInfo) -> None:
    file.seek(info.offset)
    file.write(blocks.numpy().data)
