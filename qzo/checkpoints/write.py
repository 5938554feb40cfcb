"""Tuned models in the checkpoint format they came in."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from torch import Tensor

from qzo.durable import whole_folder
from qzo.errors import QzoError
from qzo.formats.bnb.files import bnb_tensors
from qzo.formats.gguf.files import write_gguf
from qzo.formats.hqq.files import QMODEL, holds_hqq, hqq_tensors, write_qmodel
from qzo.formats.torchao.files import torchao_tensors
from qzo.models.folder import download, headers_in, opened, read_json, weight_files
from qzo.models.settings import method_of, settings_of

LAYOUTS = {
    "bitsandbytes": bnb_tensors,
    "hqq": hqq_tensors,
    "torchao": torchao_tensors,
}  # methods whose checkpoints keep scales under other names or in other numbers
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def in_own_layout(model: str) -> bool:
    """Whether a model's scales are written by `write_tuned` alone: a .gguf file, or a method of `LAYOUTS`."""
    return model.endswith(".gguf") or ((Path(model) / "config.json").is_file() and _method(Path(model)) in LAYOUTS)


def write_tuned(model: str, tensors: dict[str, Tensor], out: Path) -> int:
    """Write `model` with some tensors replaced, a .gguf file as a .gguf file; returns how many."""
    if model.endswith(".gguf") and all(name.endswith((".scales", ".offsets")) for name in tensors):
        file = Path(model)
        whole_folder(out, lambda folder: write_gguf(file, tensors, folder / file.name))
        return len(tensors)
    return write_checkpoint(checkpoint_folder(model), tensors, out)


def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint or hub id. Raises QzoError for what is no folder of safetensors files."""
    if source.endswith(".gguf"):
        raise QzoError(f"{source} is not in safetensors format; qzo export it first, and train what that writes")
    folder = Path(source) if Path(source).is_dir() else download(source)
    if not (folder / "config.json").is_file():
        raise QzoError(f"{folder} is neither a run, nor a checkpoint of QZOTrainer, nor a model (no config.json)")
    return folder


def write_checkpoint(source: Path, tensors: dict[str, Tensor], out: Path) -> int:
    """Copy a checkpoint with some tensors replaced, each cast to the dtype it has there; returns how many.

    Extra memory: the tensors of one file. Raises QzoError, and leaves nothing, where a tensor has no place.
    """
    if (source / QMODEL).is_file():
        whole_folder(out, functools.partial(_write_qmodel, source, tensors))
        return len(tensors)
    weights = weight_files(source)
    headers = headers_in(weights)
    count, method = len(tensors), _method(source)
    stored = LAYOUTS[method](source, headers, tensors) if method in LAYOUTS else {}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in stored}
    shapes = {name: header.shape for name, header in headers.items()}
    for name, tensor in tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            has = f"with shape {shapes[name]}" if name in shapes else "not at all"
            raise QzoError(f"{source} has {name} {has}, the tuned one has shape {tuple(tensor.shape)}")
    for own in stored.values():
        tensors |= own

    def write(folder: Path) -> None:
        for file in weights:
            _rewrite(file, tensors, folder / file.name)
        _copy_rest(source, folder)

    whole_folder(out, write)
    return count


def _copy_rest(source: Path, folder: Path) -> None:
    """Configuration, tokenizer and whatever else is no weights."""
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHT_SUFFIXES):
            shutil.copyfile(file, folder / file.name)


def _write_qmodel(source: Path, tensors: dict[str, Tensor], folder: Path) -> None:
    write_qmodel(source, tensors, folder)
    _copy_rest(source, folder)


def _method(folder: Path) -> str | None:
    """The quant_method of a checkpoint; None of an unquantized one."""
    settings = settings_of(folder, read_json(folder / "config.json"))
    if settings is None:
        return "hqq" if holds_hqq(folder) else None
    return method_of(settings)


def _rewrite(file: Path, tensors: dict[str, Tensor], target: Path) -> None:
    from safetensors.torch import save_file

    with opened(file) as tensors_of:
        names = list(tensors_of.keys())
        if not tensors.keys() & set(names):
            shutil.copyfile(file, target)
            return
        old, metadata = {name: tensors_of.get_tensor(name) for name in names}, tensors_of.metadata()
    new = {name: tensors.get(name, tensor).to("cpu", tensor.dtype).contiguous() for name, tensor in old.items()}
    save_file(new, target, metadata)
    target.chmod(file.stat().st_mode)
