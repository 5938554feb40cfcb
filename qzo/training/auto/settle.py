"""What settings leave open, settled for a model and its data before a run's first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.live.check import check_live
from qzo.models.prefix import decoder_layers
from qzo.regular import is_there
from qzo.signals import Stopped
from qzo.training.auto.choose import chosen, told
from qzo.training.auto.layers import chosen_layers
from qzo.training.auto.probe import probe
from qzo.training.auto.rows import chosen_rows
from qzo.training.learners import trained
from qzo.training.run import FOUND, RUN, Run, read_run
from qzo.training.settings import AUTO, TrainSettings, known
from qzo.training.telemetry.progress import tell


def layers_of(model: nn.Module, settings: TrainSettings, chooses: bool, resumed: Path | None) -> TrainSettings:
    """The settings with the layers to train: those of the run in the folder `resumed`, else as the data suits."""
    if settings.layers != AUTO:
        return settings
    found = _found(resumed)
    if "layers" in found:
        return replace(settings, layers=found["layers"])
    try:
        count = len(decoder_layers(model))
    except QzoError:  # no layers in a row: all that it has
        count = 0
    return replace(settings, layers=chosen_layers(count, chooses))


def rows_of(settings: TrainSettings, lengths: Sequence[int], chooses: bool, resumed: Path | None) -> TrainSettings:
    """The settings with the rows of a batch: those of the run in `resumed`, else as suits rows of so many tokens."""
    if settings.batch_size != AUTO:
        return settings
    return replace(settings, batch_size=_found(resumed).get("batch_size") or chosen_rows(lengths, chooses))


def _found(resumed: Path | None) -> dict[str, Any]:
    """What was chosen for the run in a folder; nothing where none is gone on with."""
    return known(read_run(resumed).get(FOUND)) if resumed is not None and is_there(resumed / RUN) else {}


def settle(run: Run, model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Choose lr, eps and clip_threshold where the run's settings leave them open, and say so.

    Args:
        run: before its first step.
        model: as loaded.
        loss: of the first batch.

    Raises QzoError where scales are not live, or the loss is not finite.
    """
    tell("measuring how far a step may go, and that the scales are live")
    try:
        check_live(model, loss, run.settings.seed, run.settings.layer_range)
        found = probe(model, trained(model, run.settings), loss, run.settings.seed)
    except KeyboardInterrupt as error:
        raise Stopped("stopped before the first step; go on with --resume", error) from error
    run.settle(chosen(run.settings, found))
    exact = next(iter(model.parameters())).dtype == torch.float32
    tell(told(found, run.settings, exact))
