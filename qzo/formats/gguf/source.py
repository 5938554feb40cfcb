"""A GGUF file on disk: its tensors by their names in the model, checked and read, with rotary pairs put in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.formats.gguf.codes import BLOCK_TYPES, PLAIN_TYPES
from qzo.formats.gguf.header import GgufHeader, TensorInfo, read_gguf_header
from qzo.models.folder import one_line
from qzo.quiet import quiet_libraries

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files are "llama"
PAIRED = {"llama": {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}}  # rows stored pair by pair


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
        with quiet_libraries():
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
