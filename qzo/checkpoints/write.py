"""Tuned models in the checkpoint format they came in."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from qzo.durable import whole_folder
from qzo.errors import QzoError
from qzo.formats.table import find
from qzo.models.folder import download
from qzo.models.rewrite import Write, rewriting
from qzo.models.settings import is_gguf, source_of

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def in_own_layout(model: str) -> bool:
    """Whether a model's scales are written by `write_tuned` alone, into the files they came in."""
    path = Path(model)
    if not is_gguf(path) and not (path / "config.json").is_file():
        return False
    found = find(source_of(path))
    return found is not None and found.saved_as is None


def write_tuned(model: str, tensors: dict[str, Tensor], out: Path) -> int:
    """Write `model` with some tensors replaced, a .gguf file as a .gguf file; returns how many."""
    if is_gguf(model) and all(name.endswith((".scales", ".offsets")) for name in tensors):
        whole_folder(out, _writing(Path(model), tensors))
        return len(tensors)
    return write_checkpoint(checkpoint_folder(model), tensors, out)


def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint or hub id. Raises QzoError for what is no folder of safetensors files."""
    if is_gguf(source):
        raise QzoError(f"{source} is not in safetensors format; qzo export it first, and train what that writes")
    folder = Path(source) if Path(source).is_dir() else download(source)
    if not (folder / "config.json").is_file():
        raise QzoError(f"{folder} is neither a run, nor a checkpoint of QZOTrainer, nor a model (no config.json)")
    return folder


def write_checkpoint(source: Path, tensors: dict[str, Tensor], out: Path) -> int:
    """Copy a checkpoint with some tensors replaced, each cast to the dtype it has there; returns how many.

    Extra memory: the tensors of one file. Raises QzoError, and leaves nothing, where a tensor has no place.
    """
    write_weights = _writing(source, tensors)

    def write(folder: Path) -> None:
        write_weights(folder)
        copy_rest(source, folder)

    whole_folder(out, write)
    return len(tensors)


def _writing(source: Path, tensors: dict[str, Tensor]) -> Write:
    """What writes the weights of a checkpoint, of whatever format or none."""
    found = find(source_of(source))
    return rewriting(source, tensors) if found is None else found.writing(tensors)


def copy_rest(source: Path, folder: Path) -> None:
    """Configuration, tokenizer and whatever else is no weights."""
    for file in source.iterdir():
        if file.is_file() and not file.name.lower().endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, folder / file.name)
