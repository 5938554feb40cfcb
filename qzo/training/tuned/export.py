"""The tuned tensors of a run or a checkpoint of QZOTrainer, written into the checkpoint they came from."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qzo.checkpoints.load import load, load_tokenizer
from qzo.checkpoints.write import check_numbers, check_out, checkpoint_folder, write_checkpoint, write_tuned
from qzo.durable import whole_folder
from qzo.errors import QzoError
from qzo.files.settings import is_gguf
from qzo.live.adapters import put_adapters
from qzo.quiet import quiet_libraries
from qzo.training.run import START
from qzo.training.tuned.state import STATES, TRAINED, Tuned, is_tuned, put, read_tuned

__all__ = ["TRAINED", "Exported", "export", "export_model"]


@dataclass(frozen=True)
class Exported:
    """How many tensors were replaced, and what was written, in words; `notice`: what the user may not expect."""

    count: int
    text: str
    notice: str | None = None


def export(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    state: str = "best",
    model: str | os.PathLike[str] | None = None,
) -> int:
    """Write a tuned model as the checkpoint it was made from, with the tuned tensors in place of the old ones.

    Names, shapes, dtypes, format version, shards, config and tokenizer stay those of the original, which is only
    read, and must be the very model that was tuned: its content is compared with the hash that was kept of it. A .gguf
    file is written with all bytes but those of the tuned scales as they were. What is written is made under another
    name, synced, and renamed. Returns the number of tensors replaced.

    Args:
        source: folder of `qzo train`; a checkpoint of `qzo.QZOTrainer`; or a model, which is copied as it is, a .gguf
            file to safetensors. Adapters (lora, qlora) are written alone, in the layout of peft.
        out: folder to write, new or empty; of a .gguf file also NAME.gguf, a new file.
        state: of a run, "best" by validation or "last". A last state is replayed from the journal.
        model: where the original lies, if it is not there any more where it lay when the run was begun.

    Warns where the best state is the one before the first step. Raises QzoError for a source that is none of these, an
    original that is another one, damaged states, scales that are not finite or cannot be negative, tensors that the
    checkpoint does not have, full weights that were tuned on a .gguf file, and a place that cannot be written.
    """
    done = export_model(Path(source), Path(out), state, None if model is None else os.fspath(model))
    if done.notice is not None:
        warnings.warn(done.notice, stacklevel=2)
    return done.count


def export_model(source: Path, out: Path, state: str = "best", model: str | None = None) -> Exported:
    """As `export`, told more of."""
    if state not in STATES:
        raise QzoError(f'state="{state}" is not known; choose "best" or "last"')
    check_out(out)
    if is_tuned(source):
        return _export_tuned(read_tuned(source, state, model), out)
    if model is not None:
        raise QzoError(f"{source} is a model; model= and --model are for a run, whose model moved: leave it out")
    if is_gguf(source) and not is_gguf(out):
        loaded: Any = load(source)
        tokenizer = load_tokenizer(source)
        with quiet_libraries():
            whole_folder(out, lambda folder: (loaded.save_pretrained(folder), tokenizer.save_pretrained(folder)))
        dtype = str(getattr(loaded, "dtype", "")).removeprefix("torch.")
        return Exported(0, f"{source} in full numbers ({dtype}), as a folder of safetensors; nothing in it was tuned")
    is_file = is_gguf(source)
    count = write_tuned(str(source), {}, out) if is_file else write_checkpoint(_folder(source, out), {}, out)
    return Exported(count, f"a copy of {source}; it is a model, not a run, and nothing in it was tuned")


def _folder(source: Path, out: Path) -> Path:
    if is_gguf(out):
        raise QzoError(f"{out} names a .gguf file, and {source} is no such file; choose a name without .gguf")
    return checkpoint_folder(str(source))


def _export_tuned(tuned: Tuned, out: Path) -> Exported:
    notice = None
    if tuned.untouched:
        notice = f"{tuned.source}: the best validation was the one before the first step; {out} is the model untouched"
    if tuned.adapters:
        if tuned.start:
            notice = (
                f"{tuned.source} was begun on a run: its adapters are for {tuned.model} with the tensors in "
                f"{tuned.source / START}, and not as it lies there"
            )
        return Exported(_write_adapters(tuned, out), f"the adapters of {tuned.source}, for {tuned.model}", notice)
    count = write_tuned(tuned.model, tuned.whole, out)
    of = "" if tuned.step is None else f" of step {tuned.step}"
    return Exported(count, f"{count} tuned tensors{of} written, all else as it came", notice)


def _write_adapters(tuned: Tuned, out: Path) -> int:
    if is_gguf(out):
        raise QzoError(f"{out} names a .gguf file, and adapters are a folder of their own; choose a name without .gguf")
    check_numbers(tuned.tensors)
    model = tuned.untuned()
    wrapper: Any = put_adapters(model, tuned.settings.get("seed", 0))
    put(model, tuned.tensors, tuned.source)
    wrapper.peft_config["default"].base_model_name_or_path = tuned.model
    with quiet_libraries():
        # adapters alone: else peft asks the hub whether the original, a path here, has other embeddings
        whole_folder(out, lambda folder: wrapper.save_pretrained(folder, save_embedding_layers=False))
    return len(tuned.tensors)
