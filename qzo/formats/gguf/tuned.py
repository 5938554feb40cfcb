"""Tuned scales and offsets in the blocks of a GGUF file: written into a copy of it, or read in the place of its own."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.formats.gguf.codes import BLOCK_TYPES, half_at
from qzo.formats.gguf.places import Plan, plan
from qzo.formats.gguf.source import read_tensor, to_pairs

POSITION = {"scales": 0, "offsets": 1}  # of the fp16 number in a block


@dataclass(frozen=True)
class Part:
    """Numbers for a position in each block of a tensor, or of one expert of it."""

    numbers: Tensor
    position: int
    expert: int | None


def write_gguf(path: Path, tensors: Mapping[str, Tensor], target: Path) -> None:
    """Copy a GGUF file and overwrite scales and offsets in the copy; every other byte stays.

    Args:
        path: of the file, which is only read.
        tensors: name -> tensor, as `qzo.scales` names them: "model.layers.0.mlp.up_proj.scales" fp16 [N, K / 32],
            ".offsets" beside it; rows in the order of transformers.
        target: file to write; put it in a folder of its own that is renamed when all is well.

    Extra memory: one packed tensor. Raises QzoError for tensors that the file has no place for, before it is copied.
    """
    planned = plan(path)
    parts = parts_of(planned, tensors)
    shutil.copyfile(path, target)
    with target.open("r+b") as file:
        for stored, changes in parts.items():
            info = planned.source.header.tensors[stored]
            blocks = read_tensor(file, target, stored, info)
            put_parts(blocks, changes, planned.places[stored].heads)
            file.seek(info.offset)
            file.write(blocks.numpy().data)


def parts_of(planned: Plan, tensors: Mapping[str, Tensor]) -> dict[str, list[Part]]:
    """Name in the file -> what of `tensors`, as `write_gguf` takes them, goes into its blocks. Raises QzoError."""
    layers = _layers(planned)
    parts: dict[str, list[Part]] = {}
    for name, tensor in tensors.items():
        stored, part = _part(planned, layers, name, tensor)
        parts.setdefault(stored, []).append(part)
    return parts


def put_parts(blocks: Tensor, parts: list[Part], heads: int | None) -> None:
    """Write them, as fp16, into blocks uint8 [..., N, B, n_bytes] whose rows are in the order of the file."""
    for part in parts:
        numbers = half_at(blocks if part.expert is None else blocks[part.expert], part.position)
        numbers.copy_(to_pairs(part.numbers.to("cpu", torch.float16), heads))


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


def _part(planned: Plan, layers: dict[str, tuple[str, int | None]], name: str, tensor: Tensor) -> tuple[str, Part]:
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
    return stored, Part(tensor, POSITION[part], expert)
