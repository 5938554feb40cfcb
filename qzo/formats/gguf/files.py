"""GGUF files as checkpoints: inspected and loaded as `places` plans it, and written back with tuned scales."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.files.rewrite import Write
from qzo.files.settings import Source, is_gguf
from qzo.formats.gguf.codes import BLOCK_TYPES, PLAIN_TYPES, half_at
from qzo.formats.gguf.finite import check_file
from qzo.formats.gguf.foreign import check_foreign
from qzo.formats.gguf.header import GgufHeader, read_gguf_header
from qzo.formats.gguf.loading import load_dense, load_packed
from qzo.formats.gguf.metadata.families import FAMILIES
from qzo.formats.gguf.places import Plan, plan
from qzo.formats.gguf.source import is_known, read_tensor, to_pairs, type_name
from qzo.models.inspection import Inspection, obstacle


def find(source: Source) -> GgufCheckpoint | None:
    """A .gguf file; None for a folder."""
    return GgufCheckpoint(source.path) if is_gguf(source.path) else None


def tokenizer_class(path: Path) -> Any:
    """What loads the tokenizer of a file of a known architecture; None where AutoTokenizer has to find it.

    That one makes a config of the file first, and for it decodes the whole vocabulary a second time, one by one.
    """
    import transformers

    header = read_gguf_header(path)
    family = FAMILIES.get(str(header.metadata.get("general.architecture")))
    return None if family is None else getattr(transformers, family.tokenizer, None)


@dataclass(frozen=True)
class GgufCheckpoint:
    """A .gguf file, whose blocks stay packed."""

    path: Path
    saved_as: ClassVar[str | None] = None

    def load(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model with its blocks as they are, see `load_packed`; bf16 where no dtype is named. Raises QzoError."""
        header = read_gguf_header(self.path)
        if not is_known(header):
            check_foreign(self.path, header)  # dequantizing is no remedy where that is refused too
        return load_packed(self.path, dtype or torch.bfloat16, device)

    def dequantized(self, dtype: torch.dtype | None, device: torch.device) -> Any:
        """The model with every weight rebuilt; None for an architecture that transformers alone reads, rightly.

        Raises QzoError for what `load` refuses too.
        """
        header = read_gguf_header(self.path)
        if not is_known(header):
            check_foreign(self.path, header)
            return None
        return load_dense(self.path, dtype or torch.bfloat16, device)

    def inspect(self, name: str) -> Inspection:
        """By the header; scales and minima are taken out of the blocks that hold them, those of K-quants are not.

        The file is read once from end to end, since every block has a scale that may be NaN.
        """
        header = read_gguf_header(self.path)
        counts = dict.fromkeys(("scales", "offsets", "codes", "unquantized"), 0)
        sizes, kinds = dict.fromkeys(counts, 0), set()
        vocabulary = {"scales": 0, "offsets": 0}  # trained only where it is asked for, see qzo.scales
        for tensor, info in header.tensors.items():
            kind, numbers = BLOCK_TYPES.get(info.kind), math.prod(info.shape)
            part = "unquantized" if info.kind in PLAIN_TYPES else "codes"
            counts[part] += numbers
            sizes[part] += info.n_bytes
            kinds |= set() if part == "unquantized" else {type_name(info.kind)}
            for quantity, has in (("scales", kind and kind.has_scale), ("offsets", kind and kind.has_offset)):
                if kind is not None and has:
                    counts[quantity] += numbers // kind.n_weights
                    vocabulary[quantity] += numbers // kind.n_weights if tensor == VOCABULARY else 0
                    sizes[quantity] += numbers // kind.n_weights * torch.float16.itemsize
                    sizes["codes"] -= numbers // kind.n_weights * torch.float16.itemsize
        own = {part: counts[part] - vocabulary[part] for part in vocabulary}
        reason, finite = obstacle(self.path, lambda: _check(self.path, header, own["scales"]))
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
                "scales": own["scales"],
                "scales+offsets": own["scales"] + own["offsets"],
                **({"scales+vocabulary": counts["scales"]} if vocabulary["scales"] else {}),
                "scales+unquantized": own["scales"] + counts["unquantized"],
            },
            reason=reason,
            finite=finite,
            moving="minima move with their scales",
        )

    def writing(self, tensors: dict[str, Tensor]) -> Write:
        """The file under its own name, with other scales and offsets."""
        return lambda folder: write_gguf(self.path, tensors, folder / self.path.name)


def _check(path: Path, header: GgufHeader, scales: int) -> None:
    """Raise QzoError for a .gguf file that cannot be trained packed, by its header, its scales or its plain numbers."""
    if not is_known(header):
        check_foreign(path, header)  # what speaks against a dequantized one too is told first
    plan(path)
    check_file(path, header)
    if not scales:
        raise QzoError("no layer has scales that are not quantized themselves; take a Q4_0, Q4_1 or Q8_0 file")


VOCABULARY = "token_embd.weight"
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
    planned = plan(path)
    layers = _layers(planned)
    parts: dict[str, list[_Part]] = {}
    for name, tensor in tensors.items():
        stored, part = _part(planned, layers, name, tensor)
        parts.setdefault(stored, []).append(part)
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        for stored, changes in parts.items():
            info, heads = planned.source.header.tensors[stored], planned.places[stored].heads
            blocks = read_tensor(file, target, stored, info)
            for part in changes:
                numbers = half_at(blocks if part.expert is None else blocks[part.expert], part.position)
                numbers.copy_(to_pairs(part.numbers.to("cpu", torch.float16), heads))
            file.seek(info.offset)
            file.write(blocks.numpy().data)


@dataclass(frozen=True)
class _Part:
    """Numbers for a position in each block of a tensor, or of one expert of it."""

    numbers: Tensor
    position: int
    expert: int | None


def _layers(planned: Plan) -> dict[str, tuple[str, int | None]]:
    """Path of a layer on blocks -> name of its tensor in the file, and its number among experts."""
    layers: dict[str, tuple[str, int | None]] = {}
    for stored, place in planned.places.items():
        if place.stack is not None:
            paths = {f"{place.path}.{place.stack}_proj.{expert}": expert for expert in range(place.shape[0])}
            layers |= {path: (stored, expert) for path, expert in paths.items()}
        elif place.in_blocks and place.parameter == "weight":
            layers[place.path] = stored, None
    return layers


def _part(planned: Plan, layers: dict[str, tuple[str, int | None]], name: str, tensor: Tensor) -> tuple[str, _Part]:
    """Where a scale or an offset goes. Raises QzoError."""
    path, _, part = name.rpartition(".")
    source = planned.source
    stored, expert = layers.get(path, ("", None))
    info = source.header.tensors.get(stored)
    kind = None if info is None else BLOCK_TYPES.get(info.kind)
    has = kind is not None and {"scales": kind.has_scale, "offsets": kind.has_offset}.get(part, False)
    if info is None or kind is None or not has:
        raise QzoError(f"{source.path} has no place for {name}; give the file that was tuned")
    wanted = info.shape[-2], info.shape[-1] // kind.n_weights
    if tuple(tensor.shape) != wanted:
        shapes = f"{name} with shape {wanted}, the tuned one has shape {tuple(tensor.shape)}"
        raise QzoError(f"{source.path} has {shapes}; give the file that was tuned")
    return stored, _Part(tensor, POSITION[part], expert)
