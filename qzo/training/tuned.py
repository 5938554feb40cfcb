"""The tuned tensors of a run or of a checkpoint of QZOTrainer, and the model they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.checkpoints.identity import check_base
from qzo.checkpoints.load import load
from qzo.durable import read_tensors
from qzo.errors import QzoError
from qzo.journal.header import check_header, check_same, describe, device_of, rebuild
from qzo.journal.lines import read
from qzo.journal.replay import replay
from qzo.live.adapters import put_adapters
from qzo.live.trainable import live_named
from qzo.optim.spsa import live_tensors
from qzo.regular import is_there
from qzo.training.checkpoints import TRAINED, read_trained
from qzo.training.learners import JOURNAL, LAST
from qzo.training.run import BEST, RUN, dtype_of, read_run
from qzo.training.settings import QUANTIZED, ZEROTH_ORDER

STATES = ("best", "last")
ADAPTERS = ("lora", "qlora")


@dataclass(frozen=True)
class Tuned:
    """Tuned tensors and the model they belong to, which was found to be the one they were tuned on.

    Args:
        source: folder of the run or checkpoint.
        model: path or hub id.
        tensors: name -> tensor.
        step: that they are of; None where that is not known.
        settings: of a run, as JSON; of a checkpoint none but the method.
    """

    source: Path
    model: str
    tensors: dict[str, Tensor]
    step: int | None
    settings: dict[str, Any]

    @property
    def adapters(self) -> bool:
        """Whether adapters were trained, which stand beside the model."""
        return self.settings["method"] in ADAPTERS

    @property
    def untouched(self) -> bool:
        """Whether no step was taken, so that the tensors are the model's own."""
        return self.step == 0

    def load(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
        """The tuned model; `dtype` None is that of the run. Raises QzoError."""
        model = untuned(self.model, self.settings, dtype, device)
        if self.adapters:
            put_adapters(model, self.settings.get("seed", 0))
        put(model, self.tensors, self.source)
        return model.eval()


def is_tuned(source: Path) -> bool:
    """Whether a folder holds a run or a checkpoint of QZOTrainer, rather than a model."""
    return is_there(source / RUN) or is_there(source / TRAINED)


def read_tuned(source: Path, state: str = "best", model: str | None = None) -> Tuned:
    """What a run or a checkpoint of QZOTrainer became.

    Args:
        source: its folder.
        state: of a run, "best" by validation or "last", which zeroth order replays from its journal.
        model: where the model lies now, if it moved.

    Raises QzoError for damaged files, and for a model that is not the one the tensors were tuned on.
    """
    if state not in STATES:
        raise QzoError(f'state="{state}" is not known; choose "best" or "last"')
    if not is_there(source / RUN):
        tensors, metadata = read_trained(source)
        place = check_base(source, metadata, model)
        return Tuned(source, place, tensors, _whole(metadata.get("steps")), {"method": "qzo"})
    about = read_run(source)
    settings = about["settings"]
    place = check_base(source, about, model)
    if state == "last" and settings["method"] in ZEROTH_ORDER:
        return _replayed(source, place, settings)
    tensors, metadata = read_tensors(source / (BEST if state == "best" else LAST))
    if state == "last":
        tensors = {name.removeprefix("value."): own for name, own in tensors.items() if name.startswith("value.")}
        return Tuned(source, place, tensors, _whole(metadata.get("steps")), settings)
    step = _whole(metadata.get("step"))
    if settings["method"] in ZEROTH_ORDER and is_there(source / JOURNAL):
        _check_journal(source, place, about, step, metadata.get("crc"))
    return Tuned(source, place, tensors, step, settings)


def untuned(
    place: str, settings: dict[str, Any], dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> nn.Module:
    """The model that a run was begun with."""
    packed = settings["method"] in QUANTIZED
    model: nn.Module = load(place, dtype or dtype_of(settings), device, dequantize=not packed)
    return model


@torch.no_grad()
def put(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Write tuned tensors into the model they were tuned on. Raises QzoError where one has no place."""
    own = live_named(model)
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            raise QzoError(f"{source} has {name} {tuple(value.shape)}, for which the model has no place")
        own[name].copy_(value)


def put_best(model: nn.Module, folder: Path) -> None:
    """Write the best state of a run into the model it was trained on. Raises QzoError."""
    put(model, read_tensors(folder / BEST)[0], folder / BEST)


def _replayed(source: Path, place: str, settings: dict[str, Any]) -> Tuned:
    header = read(source / JOURNAL).header
    check_header(source / JOURNAL, header)
    device = device_of(source / JOURNAL, header)
    optimizer, _ = replay(untuned(place, settings, device=device), source / JOURNAL)
    return Tuned(source, place, live_tensors(optimizer), optimizer.steps, settings)


def _check_journal(source: Path, place: str, about: dict[str, Any], step: int | None, crc: str | None) -> None:
    """A best state must be of the journal beside it; where a run of an older version kept no hash of its model, the
    journal tells whether that is the one.
    """
    contents = read(source / JOURNAL)
    if crc is not None and step is not None and (step > contents.steps or f"{contents.crcs[step]:08x}" != crc):
        raise QzoError(f"{source / BEST} is of another run than {JOURNAL} beside it; restore both from one copy")
    if about.get("base") is None:
        check_header(source / JOURNAL, contents.header)
        model = untuned(place, about["settings"])
        elsewhere = {name: contents.header[name] for name in ("noise", "device")}  # nothing is drawn here
        own = {**describe(model, rebuild(model, contents.header)), **elsewhere}
        check_same(source / JOURNAL, contents.header, own)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
