"""Tuned models in the checkpoint format they came in."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzo.bnb_export import bnb_tensors
from qzo.checkpoint import check_target
from qzo.durable import sync
from qzo.errors import QzoError
from qzo.folder import download, headers_in, opened, read_json, weight_files
from qzo.gguf_export import write_gguf
from qzo.hqq_files import QMODEL, holds_hqq, hqq_tensors, write_qmodel
from qzo.load import load, load_tokenizer
from qzo.quantization import method_of, settings_of
from qzo.replay import replay
from qzo.torchao_files import torchao_tensors
from qzo.training_learners import JOURNAL, LAST, live_tensors, put_adapters, read_tensors
from qzo.training_run import BEST, RUN, dtype_of, read_run
from qzo.training_settings import QUANTIZED, ZEROTH_ORDER

TRAINED = "trained.safetensors"  # in a checkpoint of qzo.QZOTrainer
STATES = ("best", "last")
LAYOUTS = {
    "bitsandbytes": bnb_tensors,
    "hqq": hqq_tensors,
    "torchao": torchao_tensors,
}  # methods whose checkpoints keep scales under other names or in other numbers
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def export(source: str | os.PathLike[str], out: str | os.PathLike[str], state: str = "best") -> int:
    """Write a tuned model as the checkpoint it was made from, with the tuned tensors in place of the old ones.

    Names, shapes, dtypes, format version, shards, config and tokenizer stay those of the original, which is only
    read. A .gguf file is written under its name, all bytes but those of the tuned scales as they were. The folder is
    written under another name, synced, and renamed. Returns the number of tensors replaced.

    Args:
        source: folder of `qzo train`; a checkpoint of `qzo.QZOTrainer`; or a model, which is copied as it is, a .gguf
            file to safetensors. Adapters (lora, qlora) are written alone, in the layout of peft.
        out: folder to write, new or empty.
        state: of a run, "best" by validation or "last". A last state is replayed from the journal.

    Raises QzoError for a source that is none of these, tensors that the checkpoint does not have, full weights that
    were tuned on a .gguf file, and a folder that cannot be written.
    """
    source, out = Path(source), Path(out)
    if state not in STATES:
        raise QzoError(f'state="{state}" is not known; choose "best" or "last"')
    check_target(out)
    if (source / RUN).is_file():
        return _export_run(source, out, state)
    if (source / TRAINED).is_file():
        tensors, metadata = read_tensors(source / TRAINED)
        return write_tuned(metadata["model"], tensors, out)
    if source.suffix == ".gguf":
        model = load(source)
        tokenizer = load_tokenizer(source)
        whole_folder(out, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))
        return 0
    return write_checkpoint(checkpoint_folder(str(source)), {}, out)


def _export_run(run: Path, out: Path, state: str) -> int:
    about = read_run(run)
    tensors = _state(run, about, state)
    if about["settings"]["method"] in ("lora", "qlora"):
        return _write_adapters(about, tensors, out)
    return write_tuned(about["model"], tensors, out)


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


def _state(run: Path, about: dict[str, Any], state: str) -> dict[str, Tensor]:
    """Name -> tensor of a run's best or last state."""
    if state == "best":
        return read_tensors(run / BEST)[0]
    if about["settings"]["method"] in ZEROTH_ORDER:
        optimizer, _ = replay(_untuned(about), run / JOURNAL)
        return live_tensors(optimizer)
    tensors = read_tensors(run / LAST)[0]
    return {name.removeprefix("value."): value for name, value in tensors.items() if name.startswith("value.")}


def _untuned(about: dict[str, Any]) -> nn.Module:
    """The model that a run was begun with."""
    settings = about["settings"]
    model: nn.Module = load(about["model"], dtype_of(settings), dequantize=settings["method"] not in QUANTIZED)
    return model


def _write_adapters(about: dict[str, Any], tensors: dict[str, Tensor], out: Path) -> int:
    model = _untuned(about)
    wrapper: Any = put_adapters(model, about["settings"]["seed"])
    own = dict(model.named_parameters())
    for name, value in tensors.items():
        own[name].data.copy_(value)
    wrapper.peft_config["default"].base_model_name_or_path = about["model"]
    whole_folder(out, lambda folder: wrapper.save_pretrained(folder))
    return len(tensors)


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


def whole_folder(out: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder beside `out`, sync it, and rename it to `out`; on any error nothing is left."""
    check_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.part"
    partial.mkdir()
    try:
        write(partial)
        for file in partial.iterdir():
            sync(file)
        sync(partial)
        os.replace(partial, out)
        sync(out.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, QzoError) or not isinstance(error, Exception):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise QzoError(f"{out} could not be written: {reason}; nothing of it is left") from error
