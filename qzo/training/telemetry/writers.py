"""Where the numbers of a run go beside its folder: TensorBoard's files, and Weights & Biases where asked for."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from qzo.errors import QzoError, is_failure, required
from qzo.files.folder import one_line

TENSORBOARD, WANDB = "tensorboard", "wandb"  # folders in that of a run
ID = "run-id"  # file in the latter: under which name a resume goes on


class Writer(Protocol):
    """What takes numbers by their names."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is not written yet."""


class TensorBoard:
    """Files for TensorBoard; of the steps after `start` they hold those of this life alone."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, gone on with where the folder has one. It gets numbers and settings, and no data.

    Steps are a number among the others, so that one which is taken again after a kill is no step backwards. Raises
    QzoError where wandb is not installed or cannot begin.
    """

    def __init__(self, project: str, folder: Path, config: Mapping[str, Any]) -> None:
        library: Any = required("wandb", "wandb")
        place = folder / WANDB / ID
        try:
            place.parent.mkdir(exist_ok=True)
            if not place.exists():
                place.write_text(uuid.uuid4().hex[:8])
            options: dict[str, Any] = {"id": place.read_text().strip(), "resume": "allow", "config": dict(config)}
            self._run = library.init(project=project, name=folder.absolute().name, dir=str(folder), **options)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")
        except BaseException as error:  # of the library, which has many kinds
            if not is_failure(error):
                raise
            raise QzoError(
                f"--wandb: Weights & Biases cannot begin: {one_line(error)}; run wandb login, set WANDB_MODE=offline, "
                "or leave --wandb out"
            ) from error

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take the numbers of a step."""
        self._run.log({**values, "step": step})

    def close(self) -> None:
        """Write what is not written yet."""
        self._run.finish()


def writers(folder: Path, start: int, project: str | None, config: Mapping[str, Any]) -> list[Writer]:
    """Those of a run: TensorBoard where it is installed, Weights & Biases where a project is named. Raises QzoError."""
    found: list[Writer] = []
    if project is not None:
        found.append(WeightsAndBiases(project, folder, config))
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return found
    return [TensorBoard(SummaryWriter(str(folder / TENSORBOARD), purge_step=start + 1)), *found]
