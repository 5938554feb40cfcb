"""GGUF files as checkpoints: inspected, loaded as `places` plans it, and written back with tuned scales."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.files.rewrite import Write
from qzo.files.settings import Source, is_gguf
from qzo.formats.gguf.codes import BLOCK_TYPES, PLAIN_TYPES
from qzo.formats.gguf.finite import check_file
from qzo.formats.gguf.foreign import check_foreign
from qzo.formats.gguf.header import GgufHeader, read_gguf_header
from qzo.formats.gguf.loading import load_dense, load_packed
from qzo.formats.gguf.metadata.families import FAMILIES
from qzo.formats.gguf.places import plan
from qzo.formats.gguf.source import is_known, type_name
from qzo.formats.gguf.tuned import write_gguf
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


VOCABULARY = "token_embd.weight"


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

    def dequantized(
        self, dtype: torch.dtype | None, device: torch.device, tuned: Mapping[str, Tensor] | None = None
    ) -> Any:
        """The model with every weight rebuilt; None for an architecture that transformers alone reads, rightly.

        `tuned`: scales and offsets in the place of the file's. Raises QzoError for what `load` refuses too.
        """
        header = read_gguf_header(self.path)
        if not is_known(header):
            check_foreign(self.path, header)
            return None
        return load_dense(self.path, dtype or torch.bfloat16, device, tuned or {})

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
