"""The header of a GGUF file, checked against the file's size without reading any weights or allocating for them."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo.errors import QzoError

GGUF_VERSIONS = (2, 3)
GGUF_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9
GGUF_MAX_DIMS = 4
MOST_VALUES, MOST_TENSORS = 2_000, 65_536  # a few times what any model has, as those below
MOST_ITEMS = 4_000_000  # of all lists: tokens, their scores and types, merges
ITEMS_A_TOKEN, LEAST_TOKENS = 16, 4_096
LONGEST_NAME, LONGEST_TEXT = 65_535, 2**22  # bytes of a key, by GGUF's rule, and of a value
GGUF_MAX_LISTED = 1024  # numbers of an array that is read: no model has as many layers


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its number of the type, its shape (rows first, as PyTorch has it), first byte and bytes."""

    kind: int
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Metadata, arrays as None but short ones of numbers as lists, and name -> place of every tensor."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, after a check that every tensor lies inside the file.

    Raises QzoError if the file is missing, is no GGUF, is cut off, or is one part of a split model.
    """
    if not path.is_file():
        raise QzoError(f"no GGUF file {path}; check the path")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _check_gguf(_GgufCursor(data))
    except (EOFError, ValueError) as error:  # ValueError: also mmap's word for an empty file
        raise QzoError(f"{path} is no whole GGUF file: {error}; download or convert it again") from error
    except OSError as error:
        raise QzoError(f"cannot read {path}: {error.strerror or error}") from error
    parts = header.metadata.get("split.count", 1)
    if parts not in (0, 1):
        raise QzoError(f"{path} is one of {parts} parts of a GGUF model; join them (llama-gguf-split --merge)")
    return header


class _GgufCursor:
    """Reads little-endian values one after the other, never past the end, and no more of them than a model has."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.offset = self.items = 0

    def skip(self, n_bytes: int) -> int:
        """The offset before the skip."""
        start = self.offset
        if start + n_bytes > len(self.data):
            raise EOFError(f"it ends at byte {len(self.data):,}, inside its header")
        self.offset += n_bytes
        return start

    def number(self, code: str) -> Any:
        layout = "<" + code
        return struct.unpack_from(layout, self.data, self.skip(struct.calcsize(layout)))[0]

    def string(self, longest: int = LONGEST_NAME) -> str:
        length = self.number("Q")
        if length > longest:
            raise ValueError(f"its header has a text of {length:,} bytes, and none there has more than {longest:,}")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A number or a string; an array is skipped and None, but for a short one of numbers: one for each layer."""
        if kind in GGUF_SCALARS:
            return self.number(GGUF_SCALARS[kind])
        if kind == GGUF_STRING:
            return self.string(LONGEST_TEXT)
        if kind != GGUF_ARRAY:
            raise ValueError(f"its header has a value of unknown type {kind}")
        item, count = self.number("I"), self.number("Q")
        self.items += count
        if self.items > MOST_ITEMS:
            raise ValueError(f"its header has lists of {self.items:,} values; no model has more than {MOST_ITEMS:,}")
        if item in GGUF_SCALARS and count <= GGUF_MAX_LISTED:
            return [self.number(GGUF_SCALARS[item]) for _ in range(count)]
        if item in GGUF_SCALARS:
            self.skip(count * struct.calcsize("<" + GGUF_SCALARS[item]))
        elif item == GGUF_STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"its header has an array of unknown type {item}")
        return None


def _check_gguf(cursor: _GgufCursor) -> GgufHeader:
    size = len(cursor.data)
    if cursor.data[:4] != b"GGUF":
        raise ValueError(f"it starts with {cursor.data[:4]!r}, not b'GGUF'")
    cursor.skip(4)
    version, n_tensors, n_values = cursor.number("I"), cursor.number("Q"), cursor.number("Q")
    if version not in GGUF_VERSIONS:
        raise ValueError(f"its version is {version}, known are {', '.join(map(str, GGUF_VERSIONS))}")
    for count, most, what in ((n_values, MOST_VALUES, "metadata keys"), (n_tensors, MOST_TENSORS, "tensors")):
        if count > most:
            raise ValueError(f"its header names {count:,} {what}, and no model has more than {most:,}")
    metadata = {}
    for _ in range(n_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    described = [(cursor.string(), _tensor_info(cursor)) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"its alignment is {alignment!r}, not a positive number")
    start = -(-cursor.offset // alignment) * alignment  # rounded up
    tensors = {}
    for name, info in described:
        if name in tensors:
            raise ValueError(f"it has two tensors {name!r}")
        if start + info.offset + info.n_bytes > size:
            raise EOFError(f"it ends at byte {size:,}, tensor {name!r} at {start + info.offset + info.n_bytes:,}")
        tensors[name] = TensorInfo(info.kind, info.shape, start + info.offset, info.n_bytes)
    _check_apart(tensors)
    _check_counts(metadata, tensors, cursor.items)
    return GgufHeader(metadata, tensors)


def _check_counts(metadata: dict[str, Any], tensors: dict[str, TensorInfo], items: int) -> None:
    """Counts against what the file holds: a model would be built, or a tokenizer, before a tensor is read."""
    key = f"{metadata.get('general.architecture')}.block_count"
    layers = metadata.get(key, len(tensors))
    if isinstance(layers, bool) or not isinstance(layers, int) or not min(1, len(tensors)) <= layers <= len(tensors):
        raise ValueError(f"it names {layers} layers and has {len(tensors)} tensors")
    vocabulary = tensors.get("token_embd.weight")
    rows = vocabulary.shape[0] if vocabulary is not None and vocabulary.shape else 0
    most = ITEMS_A_TOKEN * max(rows, LEAST_TOKENS)
    if items > most:
        raise ValueError(f"its header has lists of {items:,} values; {rows:,} tokens have no more than {most:,}")


def _check_apart(tensors: dict[str, TensorInfo]) -> None:
    """No byte belongs to two tensors: writing into one must not change another."""
    end, before = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end and info.n_bytes:
            raise ValueError(f"its tensors {before!r} and {name!r} overlap")
        end, before = info.offset + info.n_bytes, name


def _tensor_info(cursor: _GgufCursor) -> TensorInfo:
    """The tensor that is described next, its offset from the start of the data."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    n_dims = cursor.number("I")
    if n_dims > GGUF_MAX_DIMS:
        raise ValueError(f"a tensor has {n_dims} dimensions, more than {GGUF_MAX_DIMS}")
    shape = tuple(cursor.number("Q") for _ in range(n_dims))[::-1]
    kind, offset = cursor.number("I"), cursor.number("Q")
    if 0 in shape:
        raise ValueError(f"a tensor has shape {shape}, without a number in it")
    if kind not in set(GGMLQuantizationType):
        raise ValueError(f"a tensor has the unknown type {kind}")
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if shape and shape[-1] % block_size:
        raise ValueError(f"a tensor has rows of {shape[-1]} weights, which blocks of {block_size} do not fill")
    return TensorInfo(kind, shape, offset, math.prod(shape) // block_size * block_bytes)
