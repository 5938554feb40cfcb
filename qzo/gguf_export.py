"""Tuned scales in a copy of the GGUF file they came from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.gguf_blocks import BLOCK_TYPES, half_at
from qzo.gguf_header import TensorInfo
from qzo.gguf_load import GgufSource, open_gguf, read_tensor, to_pairs

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
