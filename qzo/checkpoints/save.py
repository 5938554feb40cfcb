"""A model in memory written as a folder: as it came where it came from a checkpoint, else as a new one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.checkpoints.generation import GENERATION
from qzo.checkpoints.layout import new_layout
from qzo.checkpoints.tokenizer import load_tokenizer
from qzo.checkpoints.write import check_link, copy_rest
from qzo.durable import locked, sync, whole_folder
from qzo.errors import QzoError
from qzo.files.folder import one_line
from qzo.files.rewrite import Write
from qzo.files.settings import FORMATS, either, is_gguf, method_of, source_of
from qzo.formats.layer import Quantized
from qzo.formats.table import SAVERS, Checkpoint, find
from qzo.models.origin import Origin, origin_of, replace_save_pretrained
from qzo.models.stored import Stored
from qzo.quiet import quiet_libraries

BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")
LIVE = (".scales", ".offsets")
Fill = Callable[[Path], object]


def save(
    model: nn.Module, out: str | os.PathLike[str], tokenizer: Any = None, checkpoint_format: str | None = None
) -> None:
    """Write a model, its tokenizer and its generation config to a folder: whole, or nothing of it.

    A model that `qzo.load` read from a quantized checkpoint is written as it came: its own format, shards, names and
    `quantization_config`, every tensor that did not change to the bit, and what the model does not use (the vision
    tower of a multimodal one) too. One that `qzo.quantize` made becomes a checkpoint in the layout of GPTQ, AWQ or
    AQLM, an unquantized one what `save_pretrained` of transformers writes. All of them load again with `qzo.load`. The
    files are written to a folder beside `out`, synced, and renamed.

    Args:
        model: a transformers model. One with layers of another library (`qzo.adopt`) is given back first
            (`qzo.release`) and saved by that library.
        out: folder to write, new or empty.
        tokenizer: of transformers, or anything with `save_pretrained`; None takes that of the folder the model came
            from, where it has one.
        checkpoint_format: of a model in the layout of GPTQ, "gptq" or "gptq_v2" (zero points as they are); None keeps
            the format it came in, and takes "gptq" for a new one.

    Extra memory: the tensors of one file. Raises QzoError for a folder with something in it, a model that no layout
    holds, tuned tensors that are not finite, and a full disk.
    """
    fill = filler(model, tokenizer, checkpoint_format)
    whole_folder(Path(out), fill)


def filler(model: nn.Module, tokenizer: Any = None, checkpoint_format: str | None = None) -> Fill:
    """What fills an empty folder with all that `save` writes; everything that can be wrong is found before.

    For whoever has a folder of his own to make whole, such as a checkpoint of the Trainer. Raises QzoError.
    """
    if hasattr(model, "peft_config"):
        raise QzoError("a model with adapters is not written whole; model.save_pretrained(folder) writes the adapters")
    origin = origin_of(model) or _from_its_name(model)
    write_model = _as_it_came(model, origin, checkpoint_format) or _anew(model, origin, checkpoint_format)

    def fill(folder: Path) -> None:
        write_model(folder)
        if tokenizer is not None:
            with quiet_libraries():
                tokenizer.save_pretrained(folder)
        _write_generation(model, folder)

    return fill


def format_of(source: str | os.PathLike[str]) -> str | None:
    """The checkpoint format of a model's folder, so that it is written as it came; None, for `save`, of another one."""
    path = Path(source)
    found = find(source_of(path)) if (path / "config.json").is_file() else None
    return None if found is None else found.saved_as


def _from_its_name(model: nn.Module) -> Origin | None:
    """Where a model of transformers says it came from, if that is on this machine; for what `qzo.adopt` took over."""
    name = str(getattr(model, "name_or_path", "") or "")
    path = Path(name)
    if not name or not ((is_gguf(path) and path.is_file()) or (path / "config.json").is_file()):
        return None
    about = source_of(path)
    is_quantized = any(isinstance(module, Quantized) for module in model.modules())
    return Origin(path.resolve(), packed=is_quantized and find(about) is not None, settings=about.settings)


def _as_it_came(model: nn.Module, origin: Origin | None, checkpoint_format: str | None) -> Write | None:
    """What writes the files of a model's quantized checkpoint with the tensors that changed.

    None where it is to be written anew: it did not come from one, or in another format, and where the checkpoint is no
    longer what it was while another layout holds the model too. Raises QzoError where none does.
    """
    if origin is None or not origin.packed:
        return None
    is_there = origin.path.is_file() or (origin.path / "config.json").is_file()
    found = find(source_of(origin.path)) if is_there else None
    changed = None if found is None else _changed(model, found)
    if found is None or changed is None:
        if any(isinstance(module, saver.LAYER) for module in model.modules() for saver in SAVERS):
            return None
        what = "holds other codes than it did" if is_there else "is not there any more"
        raise QzoError(f"{origin.path}, which the model was loaded from, {what}; put it back as it was")
    if checkpoint_format not in (None, found.saved_as):
        return None
    for name, tensor in changed.items():
        if not bool(torch.isfinite(tensor).all()):
            raise QzoError(f"{name} has values that are not finite; go back to a state before it diverged")
    writing = found.writing(changed)

    def write(folder: Path) -> None:
        writing(folder)
        if origin.path.is_dir():
            copy_rest(origin.path, folder)

    return write


def _changed(model: nn.Module, found: Checkpoint) -> dict[str, Tensor] | None:
    """Name -> live tensor of all that is no longer as in the files; None where it is not a model of these files."""
    live: dict[str, Tensor] = {**dict(model.named_parameters(remove_duplicate=False))}
    live |= dict(model.named_buffers(remove_duplicate=False))
    for path, layer in model.named_modules():
        if isinstance(layer, Quantized):
            live |= {f"{path}.{name}": view for name, view in layer.views().items()}
    if isinstance(found, Stored):
        return found.changed(live)
    return {name: tensor for name, tensor in live.items() if name.endswith(LIVE)}


def _anew(model: nn.Module, origin: Origin | None, checkpoint_format: str | None) -> Write:
    """What writes a new checkpoint, with the tokenizer of where the model came from. Raises QzoError."""
    quantized = any(isinstance(module, Quantized) for module in model.modules())
    if quantized or checkpoint_format is not None:
        read = None if origin is None else origin.settings
        own = None if read is None else str(either(read, "checkpoint_format", "format") or "gptq")
        wanted = checkpoint_format or (own if own in FORMATS and method_of(read or {}) == "gptq" else None)
        write_model = new_layout(model, wanted, read)
    else:
        write_model = _unquantized(model)

    def write(folder: Path) -> None:
        write_model(folder)
        if origin is not None:
            copy_beside(origin.path, folder)

    return write


def _unquantized(model: nn.Module) -> Write:
    method = getattr(type(model), "save_pretrained", None)
    if method is None:
        raise QzoError(f"a {type(model).__name__} is no transformers model; save its state_dict with safetensors")

    def write(folder: Path) -> None:
        with quiet_libraries():
            method(model, folder)

    return write


def copy_beside(source: Path, target: Path) -> None:
    """Copy a tokenizer as it is, or, where the model is no folder, write the one that loads.

    A generation config is copied too.
    """
    for file in beside(source):
        shutil.copyfile(file, target / file.name)
    if not source.is_dir():
        try:
            tokenizer = load_tokenizer(source)
            with quiet_libraries():
                tokenizer.save_pretrained(target)
        except QzoError as error:
            print(f"note: {error}; {target} is written without one", file=sys.stderr)


def beside(source: Path) -> list[Path]:
    """Tokenizer and generation config of a model's folder. Raises QzoError for a link that leads out of it."""
    patterns = (*BESIDE_WEIGHTS, GENERATION) if source.is_dir() else ()
    files = [file for pattern in patterns for file in source.glob(pattern) if file.is_file()]
    for file in files:
        check_link(source, file)
    return files


def _write_generation(model: nn.Module, folder: Path) -> None:
    """Write the model's generation config where it is not the one that lies there, or that its config implies."""
    own: Any = getattr(model, "generation_config", None)
    if own is None or not (folder / "config.json").is_file():
        return
    from transformers import GenerationConfig

    try:
        if (folder / GENERATION).is_file():
            is_same = GenerationConfig.from_pretrained(folder).to_dict() == own.to_dict()
        else:
            is_same = bool(getattr(own, "_from_model_config", False))
        if not is_same:
            own.save_pretrained(folder)
    except (OSError, ValueError) as error:
        raise QzoError(f"the model's generation_config cannot be written: {one_line(error)}; mend it first") from error


def save_pretrained(model: nn.Module, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """In the place of transformers' method, which knows nothing of the codes: the files that `save` writes.

    Unlike `save` it writes into a folder that holds something already, file by file, as transformers does.

    Raises QzoError for `push_to_hub`, and where `save` does.
    """
    if options.get("push_to_hub"):
        raise QzoError("push_to_hub is not supported; save to a folder, and upload that with huggingface_hub")
    if not options.get("is_main_process", True):
        return
    save_into(model, Path(save_directory))


def save_into(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """As `save`, but into a folder that may hold something: each file is replaced as a whole, config.json the last.

    Where that is cut short the folder has no config.json, and is no model that anyone would load. Raises QzoError where
    `save` does, and where another process has the folder.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        save(model, folder, tokenizer)
        return
    with locked(folder):
        for left in (*folder.glob(".model*.part"), *folder.glob("..model*.part")):
            shutil.rmtree(left, ignore_errors=True)
        partial = folder / ".model.part"
        whole_folder(partial, filler(model, tokenizer))
        if (partial / "config.json").is_file():
            (folder / "config.json").unlink(missing_ok=True)
            sync(folder)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            os.replace(file, folder / file.name)
        sync(folder)
        partial.rmdir()


def writes_itself(model: nn.Module) -> None:
    """Let a quantized model's own `save_pretrained` write what `save` writes."""
    replace_save_pretrained(model, save_pretrained)
