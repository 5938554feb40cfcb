"""The tuned tensors of a run or of a checkpoint of QZOTrainer, and the model they belong to."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.checkpoints.identity import check_base
from qzo.checkpoints.load import load
from qzo.checkpoints.write import LIVE
from qzo.durable import read_tensors
from qzo.errors import QzoError
from qzo.files.settings import is_gguf
from qzo.journal.fingerprint import digest
from qzo.journal.header import check_header, check_same, describe, device_of, rebuild
from qzo.journal.lines import read
from qzo.journal.replay import replay
from qzo.live.adapters import put_adapters
from qzo.live.trainable import live_named
from qzo.models.origin import note_origin, origin_of
from qzo.optim.spsa import live_tensors
from qzo.regular import is_there
from qzo.training.checkpoints import TRAINED, read_trained
from qzo.training.learners import JOURNAL, LAST
from qzo.training.run import BEST, RUN, START, STATE, TUNED_BY, dtype_of, read_run
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
        start: of a run that was begun on another run, what that one had tuned; else empty.
    """

    source: Path
    model: str
    tensors: dict[str, Tensor]
    step: int | None
    settings: dict[str, Any]
    start: dict[str, Tensor] = field(default_factory=dict)

    @property
    def adapters(self) -> bool:
        """Whether adapters were trained, which stand beside the model."""
        return self.settings["method"] in ADAPTERS

    @property
    def untouched(self) -> bool:
        """Whether no step was taken, so that the tensors are the model's own."""
        return self.step == 0

    @property
    def whole(self) -> dict[str, Tensor]:
        """Name -> tensor of all that is other than in the files of the model, whichever run tuned it; no adapters."""
        return self.start if self.adapters else {**self.start, **self.tensors}

    def load(
        self,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        dequantize: bool | None = None,
    ) -> nn.Module:
        """The tuned model.

        `dtype` None is that of the run, `dequantize` None is as it was trained. Raises QzoError.
        """
        model = self._loaded(self.whole, dtype, device, dequantize)
        if self.adapters:
            put_adapters(model, self.settings.get("seed", 0))
            put(model, self.tensors, self.source)
        return model.eval()

    def untuned(self, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> nn.Module:
        """The model that the run was begun with. Raises QzoError."""
        return self._loaded(self.start, dtype, device, None)

    def _loaded(
        self, tensors: dict[str, Tensor], dtype: torch.dtype | None, device: Any, dequantize: bool | None
    ) -> nn.Module:
        packed = self.settings["method"] in QUANTIZED if dequantize is None else not dequantize
        return model_with(self.model, tensors, self.source, dtype or dtype_of(self.settings), device, packed)


def is_tuned(source: Path) -> bool:
    """Whether a folder holds a run or a checkpoint of QZOTrainer, rather than a model."""
    return (is_there(source / RUN) or is_there(source / TRAINED)) and not is_there(source / "config.json")


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
    place, start = check_base(source, about, model), read_start(source, about)
    if state == "last" and settings["method"] in ZEROTH_ORDER:
        return _replayed(Tuned(source, place, {}, None, settings, start))
    tensors, metadata = read_tensors(source / (BEST if state == "best" else LAST))
    if state == "last":
        tensors = {name.removeprefix("value."): own for name, own in tensors.items() if name.startswith("value.")}
        return Tuned(source, place, tensors, _whole(metadata.get("steps")), settings, start)
    step = _whole(metadata.get("step"))
    if settings["method"] in ZEROTH_ORDER and is_there(source / JOURNAL):
        _check_journal(source, place, about, step, metadata.get("crc"))
    return Tuned(source, place, tensors, step, settings, start)


def read_start(folder: Path, about: dict[str, Any]) -> dict[str, Tensor]:
    """What another run had tuned when this one, with the `run.json` given, was begun on it; empty for any other.

    Raises QzoError for what is damaged, missing, or of another run.
    """
    if about.get(STATE) is None:
        return {}
    if not is_there(folder / START):
        raise QzoError(f"{folder} lacks {START}; go on with the run it was begun on, {about.get(TUNED_BY)}, --resume")
    tensors = read_tensors(folder / START)[0]
    if state_hash(tensors) != about[STATE]:
        raise QzoError(f"{folder / START} is not what the run was begun on; restore it from a copy")
    return tensors


def state_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tuned tensors, names and dtypes included."""
    return digest(sorted(tensors.items()))


def model_with(
    place: str,
    tensors: dict[str, Tensor],
    source: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    packed: bool = True,
) -> nn.Module:
    """A model with some tensors replaced; it remembers which, see `Origin`.

    Args:
        place: path or hub id of the model.
        tensors: name -> tensor. Scales of a .gguf file that is dequantized are put into its blocks before.
        source: where they are from, for the message.
        dtype, device: as in `load`.
        packed: whether the blocks of a .gguf file stay as they are.

    Raises QzoError as `load`, and where a tensor has no place.
    """
    in_blocks = {name for name in tensors if name.endswith(LIVE)} if is_gguf(place) and not packed else set()
    tuned = {name: tensors[name] for name in in_blocks}
    model: nn.Module = load(place, dtype, device, dequantize=not packed, tuned=tuned)
    rest = {name: tensor for name, tensor in tensors.items() if name not in in_blocks}
    if packed and is_gguf(place) and not all(name.endswith(LIVE) for name in rest):
        raise QzoError(f"{source} was trained in full numbers, for which blocks have no place; load it dequantized")
    put(model, rest, source)
    origin = origin_of(model)
    if tensors and origin is not None:
        rebuilt = {name.replace(LIVE[0], ".weight") for name in in_blocks if name.endswith(LIVE[0])}
        note_origin(model, replace(origin, tuned=tuple(sorted({*rest, *rebuilt}))))
    return model


@torch.no_grad()
def put(model: nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Write tuned tensors into the model they were tuned on. Raises QzoError where one has no place."""
    own = live_named(model)
    for name, value in tensors.items():
        if name not in own or own[name].shape != value.shape:
            raise QzoError(
                f"{source} has {name} {tuple(value.shape)}, for which the model has no place; restore it from a copy"
            )
        own[name].copy_(value)


def put_best(model: nn.Module, folder: Path) -> None:
    """Write the best state of a run into the model it was trained on. Raises QzoError."""
    put(model, read_tensors(folder / BEST)[0], folder / BEST)


def _replayed(begun: Tuned) -> Tuned:
    journal = begun.source / JOURNAL
    header = read(journal).header
    check_header(journal, header)
    optimizer, _ = replay(begun.untuned(device=device_of(journal, header)), journal)
    return replace(begun, tensors=live_tensors(optimizer), step=optimizer.steps)


def _check_journal(source: Path, place: str, about: dict[str, Any], step: int | None, crc: str | None) -> None:
    """A best state must be of the journal beside it; where a run of an older version kept no hash of its model, the
    journal tells whether that is the one.
    """
    contents = read(source / JOURNAL)
    if crc is not None and step is not None and (step > contents.steps or f"{contents.crcs[step]:08x}" != crc):
        raise QzoError(f"{source / BEST} is of another run than {JOURNAL} beside it; restore both from one copy")
    if about.get("base") is None:
        check_header(source / JOURNAL, contents.header)
        model = Tuned(source, place, {}, None, about["settings"]).untuned()
        elsewhere = {name: contents.header[name] for name in ("noise", "device")}  # nothing is drawn here
        own = {**describe(model, rebuild(model, contents.header)), **elsewhere}
        check_same(source / JOURNAL, contents.header, own)


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else None
