"""The tuned tensors of a run or a journal's model, written into the checkpoint they came from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qzo.checkpoints.load import load, load_tokenizer
from qzo.checkpoints.write import checkpoint_folder, write_checkpoint, write_tuned
from qzo.durable import check_target, read_tensors, whole_folder
from qzo.errors import QzoError
from qzo.journal.replay import replay
from qzo.live.adapters import put_adapters
from qzo.models.settings import is_gguf
from qzo.optim.spsa import live_tensors
from qzo.quiet import quiet_libraries
from qzo.training.learners import JOURNAL, LAST
from qzo.training.run import BEST, RUN, dtype_of, read_run
from qzo.training.settings import QUANTIZED, ZEROTH_ORDER

TRAINED = "trained.safetensors"  # in a checkpoint of qzo.QZOTrainer
STATES = ("best", "last")


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
    if is_gguf(source):
        model = load(source)
        tokenizer = load_tokenizer(source)
        with quiet_libraries():
            whole_folder(out, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)))
        return 0
    return write_checkpoint(checkpoint_folder(str(source)), {}, out)


def _export_run(run: Path, out: Path, state: str) -> int:
    about = read_run(run)
    tensors = _state(run, about, state)
    if about["settings"]["method"] in ("lora", "qlora"):
        return _write_adapters(about, tensors, out)
    return write_tuned(about["model"], tensors, out)


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
    with quiet_libraries():
        # adapters alone: else peft asks the hub whether the original, a path here, has other embeddings
        whole_folder(out, lambda folder: wrapper.save_pretrained(folder, save_embedding_layers=False))
    return len(tensors)
