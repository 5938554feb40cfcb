"""Models from GGUF files with their packed blocks as they are: no dequantized copy is ever made.

Plain tensors (F32, F16, BF16) are cast to the dtype asked for. `rope_freqs.weight` (the long-context scaling of
Llama 3.1) is left out, as transformers leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.embedding import TiedQuantHead
from qzo.errors import QzoError
from qzo.folder import one_line
from qzo.gguf_blocks import BLOCK_TYPES, PLAIN_TYPES
from qzo.gguf_header import GgufHeader, TensorInfo, read_gguf_header
from qzo.gguf_layers import GgufEmbedding, GgufLinear
from qzo.packed import finish
from qzo.walk import freeze, output_head

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files are "llama"
PAIRED = {"llama": {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}}  # rows stored pair by pair
LEFT_OUT = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


@dataclass(frozen=True)
class GgufSource:
    """A file, its header, and how its tensors belong to the modules of transformers' model.

    Args:
        path: of the file.
        header: of it.
        config: the model's, as transformers reads it from the file.
    """

    path: Path
    header: GgufHeader
    config: Any

    @property
    def architecture(self) -> str:
        """As the file names it."""
        return str(self.header.metadata["general.architecture"])

    def name_of(self) -> Callable[[str], str | None]:
        """A function from a tensor's name in transformers to that in the file; None where it has none there."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(known[self.architecture], self.config.num_hidden_layers)
        return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))

    def heads(self, name: str) -> int | None:
        """The heads whose rows a tensor of the file stores in pairs; None for one that is stored as it is."""
        parts = name.split(".")
        option = PAIRED.get(self.architecture, {}).get(parts[-2] if len(parts) > 1 else "")
        return None if option is None else int(getattr(self.config, option))


def open_gguf(path: Path) -> GgufSource:
    """Header and config of a file. Raises QzoError for a damaged one and an architecture that is not known here."""
    from transformers import AutoConfig

    header = read_gguf_header(path)
    check_packed(path, header)
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=False)
        config._name_or_path = str(path)
    except Exception as error:  # as qzo.load: transformers raises many kinds
        raise QzoError(f"{path} has no config that transformers can use: {one_line(error)}") from error
    return GgufSource(path, header, config)


def check_packed(path: Path, header: GgufHeader) -> None:
    """Raise QzoError where the header tells that a file cannot be loaded packed."""
    architecture = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise QzoError(
            f"{path}: architecture {architecture!r} cannot be trained packed, only {', '.join(ARCHITECTURES)}; "
            "load it with dequantize=True and quantize that"
        )
    _check_blocks(path, header, str(architecture))


def load_gguf(path: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a GGUF file, its quantized tensors as GgufLinear and GgufEmbedding, everything frozen.

    Memory: that of the blocks, and one tensor more while its rows are put in order. Raises QzoError.
    """
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


def from_pairs(rows: Tensor, heads: int | None) -> Tensor:
    """Rows in the order of transformers, from pairs (i, i + half a head) of each head; None leaves them."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, heads: int | None) -> Tensor:
    """The reverse of `from_pairs`."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _check_blocks(path: Path, header: GgufHeader, architecture: str) -> None:
    """As many decoder layers as the metadata names: a false count must not build a false model."""
    named = (name.split(".")[1] for name in header.tensors if name.startswith("blk."))
    numbers = {int(number) for number in named if number.isdecimal()}
    count = header.metadata.get(f"{architecture}.block_count")
    if not isinstance(count, int) or numbers != set(range(len(numbers))) or len(numbers) != count:
        raise QzoError(f"{path} names {count} layers and has tensors of {len(numbers)}; download or convert it again")


def _skeleton(source: GgufSource, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
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


def _type_name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def read_tensor(file: Any, path: Path, name: str, info: TensorInfo) -> Tensor:
    """A tensor of an open file: blocks uint8 [N, B, n_bytes], or plain numbers in their shape. Raises QzoError."""
    data = torch.empty(info.n_bytes, dtype=torch.uint8)
    file.seek(info.offset)
    if file.readinto(data.numpy()) != info.n_bytes:
        raise QzoError(f"{path} ended while {name} was read; copy or download it again")
    if info.kind in PLAIN_TYPES:
        return data.view(PLAIN_TYPES[info.kind]).view(info.shape)
    return data.view(info.shape[0], -1, BLOCK_TYPES[info.kind].n_bytes)


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
