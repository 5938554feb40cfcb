"""Scales of blocks that are NaN or infinite. Every block has its own, so all of a tensor's bytes are gone through."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.errors import NotFinite, QzoError
from qzo.files.finite import check_tensor, is_finite
from qzo.formats.gguf.codes import PLAIN_TYPES
from qzo.formats.gguf.header import GgufHeader, TensorInfo

HALVES = {  # type -> bytes at which a block has an fp16 number, by ggml-common.h of ggml
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q8_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}
CHUNK = 2**26  # bytes that are looked at at a time


def check_blocks(path: Path, name: str, tensor: Tensor, info: TensorInfo) -> None:
    """Raise QzoError for a tensor of a file, blocks uint8 [..., n_bytes] or plain numbers, that is not all finite."""
    if info.kind in PLAIN_TYPES:
        check_tensor(f"{path}: {name}", tensor)
        return
    for numbers in _numbers(tensor, halves_of(info.kind)):
        if not is_finite(numbers):
            bad = int((~torch.isfinite(numbers)).sum())
            raise NotFinite(
                f"{path}: {name} has {bad:,} scales of {numbers.numel():,} that are NaN or infinite; download or "
                "convert the file again"
            )


def _numbers(blocks: Tensor, halves: tuple[int, ...]) -> Iterator[Tensor]:
    """The fp16 numbers of blocks; two that lie side by side are taken in one pass, which memory is the limit of."""
    if halves == (0, 2) and blocks.shape[-1] % 4 == 0:
        yield blocks.view(torch.int32)[..., 0].contiguous().view(torch.float16)
        return
    for first in halves:
        yield blocks.view(torch.float16)[..., first // 2]


def check_file(path: Path, header: GgufHeader) -> None:
    """`check_blocks` of every tensor of a file. Memory: 64 MiB."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with path.open("rb") as opened:
        file: Any = opened
        for name, info in header.tensors.items():
            size = GGML_QUANT_SIZES[GGMLQuantizationType(info.kind)][1]
            for start in range(0, info.n_bytes, CHUNK // size * size):
                file.seek(info.offset + start)
                data = torch.empty(min(CHUNK // size * size, info.n_bytes - start), dtype=torch.uint8)
                if file.readinto(data.numpy()) != len(data):
                    raise QzoError(f"{path} ended while {name} was read; copy or download it again")
                plain = PLAIN_TYPES.get(info.kind)
                check_blocks(path, name, data.view(plain) if plain else data.view(-1, size), info)


@cache
def halves_of(kind: int) -> tuple[int, ...]:
    """Where a type's blocks have their fp16 numbers; none for a type that is not known here."""
    from gguf import GGMLQuantizationType

    return HALVES.get(GGMLQuantizationType(kind).name, ())
