"""A GGUF file on disk: opened, its tensors read, and rows that are stored in rotary pairs put in order."""

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
from qzo.formats.gguf.metadata.families import FAMILIES, Family, model_config
from qzo.formats.gguf.metadata.keys import Metadata
from qzo.formats.gguf.metadata.rope import FACTORS

PAIRED = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}  # rows stored pair by pair


@dataclass(frozen=True)
class GgufSource:
    """A file of a known architecture, its header and its config.

    Args:
        path: of the file.
        header: of it.
        config: the model's, from the file's metadata.
    """

    path: Path
    header: GgufHeader
    config: Any

    @property
    def architecture(self) -> str:
        """As the file names it."""
        return str(self.header.metadata["general.architecture"])

    @property
    def family(self) -> Family:
        """How the tensors of its architecture lie in the file."""
        return FAMILIES[self.architecture]

    def name_of(self) -> Callable[[str], str | None]:
        """A function from a tensor's name in transformers to that in the file; None where it has none there."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        known = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}
        names = get_tensor_name_map(known[self.architecture], self.config.num_hidden_layers)
        return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))

    def heads(self, name: str) -> int | None:
        """The heads whose rows a tensor of the file stores in pairs; None for one that is stored as it is."""
        parts = name.split(".")
        option = PAIRED.get(parts[-2] if len(parts) > 1 else "") if self.family.paired else None
        return None if option is None else int(getattr(self.config, option))


def open_gguf(path: Path) -> GgufSource:
    """Header and config of a file.

    Raises QzoError for a damaged one, an architecture that is not known here, and metadata that matters and is not
    understood: this is the one place that decides of it, for `qzo.load` (packed or not), `qzo.inspect` and writing.
    """
    header = read_gguf_header(path)
    if not is_known(header):
        raise QzoError(
            f"{path}: architecture {header.metadata.get('general.architecture')!r} cannot be trained packed, only "
            f"{', '.join(FAMILIES)}; load it with dequantize=True and quantize that"
        )
    check_blocks(path, header)
    factors = {name: _factors(path, name, header.tensors[name]) for name in FACTORS if name in header.tensors}
    return GgufSource(path, header, model_config(Metadata(path, header), factors))


def is_known(header: GgufHeader) -> bool:
    """Whether the architecture of a file is one whose files are read here, and not by transformers."""
    return header.metadata.get("general.architecture") in FAMILIES


def check_blocks(path: Path, header: GgufHeader) -> None:
    """As many decoder layers as the metadata names: a false count must not build a false model. Raises QzoError."""
    named = (name.split(".")[1] for name in header.tensors if name.startswith("blk."))
    numbers = {int(number) for number in named if number.isdecimal()}
    count = header.metadata.get(f"{header.metadata.get('general.architecture')}.block_count")
    if not isinstance(count, int) or numbers != set(range(len(numbers))) or len(numbers) != count:
        raise QzoError(f"{path} names {count} layers and has tensors of {len(numbers)}; download or convert it again")


def from_pairs(rows: Tensor, heads: int | None) -> Tensor:
    """Rows in the order of transformers, from pairs (i, i + half a head) of each head; None leaves them."""
    return rows if heads is None else rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def to_pairs(rows: Tensor, heads: int | None) -> Tensor:
    """The reverse of `from_pairs`."""
    return rows if heads is None else rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _factors(path: Path, name: str, info: TensorInfo) -> list[float]:
    """The factors of rotary positions: settings that are stored as a tensor, and read with the metadata."""
    if info.kind not in PLAIN_TYPES or len(info.shape) != 1 or info.shape[0] > 2**16:
        raise QzoError(f"{path}: {name} has shape {info.shape} and type {type_name(info.kind)}; need a vector in F32")
    with path.open("rb") as file:
        return [float(value) for value in read_tensor(file, path, name, info)]


def type_name(kind: int) -> str:
    """E.g. Q4_0, by its number."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def read_tensor(file: Any, path: Path, name: str, info: TensorInfo) -> Tensor:
    """A tensor of an open file: blocks uint8 [..., N, B, n_bytes], or plain numbers in their shape. Raises QzoError."""
    data = torch.empty(info.n_bytes, dtype=torch.uint8)
    file.seek(info.offset)
    if file.readinto(data.numpy()) != info.n_bytes:
        raise QzoError(f"{path} ended while {name} was read; copy or download it again")
    if info.kind in PLAIN_TYPES:
        return data.view(PLAIN_TYPES[info.kind]).view(info.shape)
    return data.view(*info.shape[:-1], -1, BLOCK_TYPES[info.kind].n_bytes)
