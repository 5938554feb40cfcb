"""What a run begins from: a model, or what another run made of one, which the new run keeps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qzo.checkpoints.identity import base_identity
from qzo.durable import write_tensors
from qzo.errors import QzoError
from qzo.regular import is_there
from qzo.training.run import RUN, START, STATE, TUNED_BY, Result, read_run
from qzo.training.tuned.state import is_tuned, model_with, read_start, read_tuned, state_hash


@dataclass(frozen=True)
class Start:
    """What a run begins from.

    Args:
        source: as it was given, a model or the folder of a run.
        model: path or hub id of the model.
        tensors: name -> tensor that is other than in its files; empty for a model as it is.
        about: of all this, what `run.json` holds.
    """

    source: str
    model: str
    tensors: dict[str, Tensor]
    about: Result

    def load(self, dtype: torch.dtype | None, device: torch.device | str, packed: bool) -> nn.Module:
        """The model to train; `packed`: with the blocks of a .gguf file as they are. Raises QzoError."""
        return model_with(self.model, self.tensors, Path(self.source), dtype, device, packed)

    def keep(self, folder: Path) -> None:
        """Let a new run have the tensors, so that it needs the other one no more. Raises QzoError for a full disk."""
        if self.tensors and not is_there(folder / START):
            write_tensors(folder / START, self.tensors, {})


def start_from(source: str, folder: Path, resume: bool, moved: str | None = None) -> Start:
    """What the run in `folder` begins from, or with `resume` was begun from.

    Args:
        source: a model, or the folder of a run or a checkpoint of QZOTrainer, whose best state is taken. To resume, the
            model of a run that was begun on another run will do: the state is in its folder.
        folder: of the new run.
        resume: whether a run may be there already.
        moved: of a run, where its model lies now.

    Raises QzoError for a run that cannot be read, and for one that trained adapters.
    """
    if is_tuned(Path(source)):
        tuned = read_tuned(Path(source), model=moved)
        if tuned.adapters:
            raise QzoError(
                f"{source} trained adapters, which stand beside the model and are no part of it; qzo export {source} "
                "OUT writes them: merge them with peft (merge_and_unload), and train the model that gives"
            )
        own: Result = {STATE: state_hash(tuned.whole), TUNED_BY: str(Path(source).resolve())}
        return Start(source, tuned.model, tuned.whole, {**base_identity(tuned.model), **own})
    about: Result = dict(base_identity(source))
    saved = read_run(folder) if resume and is_there(folder / RUN) else {}
    if saved.get(STATE) is None:
        return Start(source, source, {}, about)
    state: Result = {name: saved.get(name) for name in (STATE, TUNED_BY)}
    return Start(source, source, read_start(folder, saved), {**about, **state})
