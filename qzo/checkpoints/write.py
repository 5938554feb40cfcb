"""Tuned models in the checkpoint format they came in."""

from __future__ import annotations

import shutil
from pathlib import Path

from torch import Tensor

from qzo.durable import check_target, create_file, whole_folder
from qzo.errors import QzoError, advised
from qzo.files.folder import download, opened, weight_files
from qzo.files.rewrite import Write, rewriting
from qzo.files.settings import is_gguf, source_of
from qzo.formats.gguf.codes import BLOCK_TYPES
from qzo.formats.packed import PackedCheckpoint
from qzo.formats.table import Checkpoint, find
from qzo.models.skeleton import as_stored

LIVE = (".scales", ".offsets")
SIGNED = ("aqlm", "bitsandbytes")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def in_own_layout(model: str) -> bool:
    """Whether a model's scales are written by `write_tuned` alone, into the files they came in."""
    path = Path(model)
    if not is_gguf(path) and not (path / "config.json").is_file():
        return False
    found = find(source_of(path))
    return found is not None and found.saved_as is None


def write_tuned(model: str, tensors: dict[str, Tensor], out: Path) -> int:
    """Write `model` with some tensors replaced, a .gguf file as a .gguf file; returns how many.

    A .gguf file becomes `out` itself where that is named so, else a file of its own name in the folder `out`.
    """
    if is_gguf(out):
        _check_file(model, tensors, out)
        writing = _writing(Path(model), tensors)
        create_file(out, lambda partial: _as_file(writing, Path(model).name, partial))
        return len(tensors)
    if is_gguf(model) and all(name.endswith(LIVE) for name in tensors):
        whole_folder(out, _writing(Path(model), tensors))
        return len(tensors)
    return write_checkpoint(checkpoint_folder(model), tensors, out)


def check_out(out: Path) -> None:
    """Raise QzoError unless a model may be written to `out`, a new or empty folder, or a new .gguf file."""
    if not is_gguf(out):
        check_target(out)
    elif out.exists() or out.is_symlink():
        raise QzoError(f"{out} exists; choose another name, or remove it")
    elif not out.absolute().parent.is_dir():
        raise QzoError(f"{out} cannot be written: there is no folder {out.parent}; make it first")


def _check_file(model: str, tensors: dict[str, Tensor], out: Path) -> None:
    check_out(out)
    if not is_gguf(model):
        raise QzoError(
            f"{out} names a .gguf file, and {model} is no such file: it is written as the folder that it came as; "
            "choose a name without .gguf"
        )
    other = next((name for name in tensors if not name.endswith(LIVE)), None)
    if other is not None:
        raise QzoError(f"{other} was tuned in full numbers, for which a .gguf file has no place; name a folder")


def _as_file(writing: Write, name: str, target: Path) -> None:
    folder = target.parent / "whole"  # the parent is a folder of our own
    folder.mkdir()
    writing(folder)
    (folder / name).rename(target)


def checkpoint_folder(source: str) -> Path:
    """The folder of a checkpoint or hub id. Raises QzoError for what is no folder of safetensors files."""
    if is_gguf(source):
        raise QzoError(f"{source} is not in safetensors format; qzo export it first, and train what that writes")
    folder = Path(source) if Path(source).is_dir() else download(source)
    if not (folder / "config.json").is_file():
        raise QzoError(
            f"{folder} is neither a run, nor a checkpoint of QZOTrainer, nor a model (no config.json); give one"
        )
    return folder


def write_checkpoint(source: Path, tensors: dict[str, Tensor], out: Path) -> int:
    """Copy a checkpoint with some tensors replaced, each cast to the dtype it has there; returns how many.

    Extra memory: the tensors of one file. Raises QzoError, and leaves nothing, where a tensor has no place.
    """
    write_weights = _writing(source, tensors)
    rest_of(source)

    def write(folder: Path) -> None:
        write_weights(folder)
        copy_rest(source, folder)

    whole_folder(out, write)
    return len(tensors)


def _writing(source: Path, tensors: dict[str, Tensor]) -> Write:
    """What writes the weights of a checkpoint, of whatever format or none."""
    about = source_of(source)
    found = find(about)
    check_numbers(tensors, signed=found is None or may_be_negative(found))
    if found is not None:
        with advised("give the checkpoint that these tensors were tuned on"):
            return found.writing(tensors)
    return rewriting(source, as_stored(source, about.config, tensors))


def check_numbers(tensors: dict[str, Tensor], signed: bool = True) -> None:
    """Raise QzoError, with the tensor's name, for numbers that are not finite, and scales that cannot be negative."""
    for name, tensor in tensors.items():
        numbers = tensor.detach()
        if not numbers.is_floating_point() or not numbers.numel():
            continue
        if not bool(numbers.isfinite().all()):
            raise QzoError(f"{name} has numbers that are not finite; go back to a state before training diverged")
        if name.endswith(LIVE[0]) and not signed and float(numbers.min()) < 0:
            raise QzoError(
                f"{name} has negative numbers ({float(numbers.min()):.3g}), and scales of this format are not "
                "negative; restore the state, or train it again without nonnegative=False"
            )


def may_be_negative(found: Checkpoint) -> bool:
    """Whether the scales of a checkpoint may be: Q4_0 and Q5_0 of GGUF, AQLM, double quantization, some GPTQ."""
    kinds = getattr(found, "format", None)
    if kinds in SIGNED:
        return True
    if isinstance(found, PackedCheckpoint):  # GPTQ of AutoRound, whose symmetric codes come with scales of either sign
        return _holds_negative_scales(found.folder)
    about = found.inspect("") if kinds is None else None  # of a .gguf file the kinds of blocks
    names = set((about.version or "").split(", ")) if about is not None else set()
    return any(kind.signed and kind.name in names for kind in BLOCK_TYPES.values())


def _holds_negative_scales(folder: Path) -> bool:
    for file in weight_files(folder):
        with opened(file) as tensors:
            scales = (tensors.get_tensor(name) for name in tensors.keys() if name.endswith(LIVE[0]))  # noqa: SIM118
            if any(scale.numel() and float(scale.min()) < 0 for scale in scales):
                return True
    return False


def copy_rest(source: Path, folder: Path) -> None:
    """Configuration, tokenizer and whatever else is no weights. Raises QzoError for a link that leads out."""
    for file in rest_of(source):
        shutil.copyfile(file, folder / file.name)


def rest_of(source: Path) -> list[Path]:
    """The files of a model's folder that are no weights.

    Raises QzoError for a link that leads out of the folder: what it points to is not the model's, and copied into one
    that is given on it would give away what lies there. The links of a hub's cache, into its own blobs, are the model.
    """
    found = [
        file for file in sorted(source.iterdir()) if file.is_file() and not file.name.lower().endswith(WEIGHT_SUFFIXES)
    ]
    for file in found:
        check_link(source, file)
    return found


def check_link(source: Path, file: Path) -> None:
    """Raise QzoError for a link that leads out of the folder `source`, see `rest_of`."""
    home, target = source.resolve(), file.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise QzoError(
            f"{file} is a link out of the model's folder, to {target}; what lies there is not copied: put the file "
            "itself there, or remove the link"
        )
