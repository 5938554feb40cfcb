r"""The folder of a training run.

    run.json           what was asked for: model, task, settings, versions
    run.journal        zeroth order: one line a step, with a snapshot beside it; see `qzo.journal`
    last.safetensors   first order: trained tensors and moments at the last validation
    best.safetensors   name -> trained tensor at the best validation: scales, not the model
    metrics.jsonl      {"step": n, "loss": ...} after n steps, {"step": n, "validation": {...}}; seconds
                        count from the start of the process

A line of metrics.jsonl is written before the step is recorded, so after a kill no recorded step lacks its line; lines
of steps that are taken again are cut off on a resume.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.durable import replace_file, write_tensors
from qzo.errors import QzoError
from qzo.training.settings import ZEROTH_ORDER, TrainSettings

RUN, METRICS, BEST = "run.json", "metrics.jsonl", "best.safetensors"
Result = dict[str, Any]  # what an evaluation returned: the metric, "loss", "count"


class Run:
    """A run's folder: made or taken up again, its metrics, and its best state.

    Args:
        folder: of the run. Without `resume` it must not exist, or be empty.
        settings: of the run.
        about: more to be remembered and held to on a resume, e.g. model and task.
        metric: key of an evaluation's result that tells the best, the higher the better; "loss", the lower.
        resume: go on with what is there, or begin where nothing is.

    Raises QzoError for a folder with something else in it, other settings, and a folder that cannot be written.
    """

    def __init__(
        self, folder: str | os.PathLike[str], settings: TrainSettings, about: Result, metric: str, resume: bool
    ) -> None:
        self.folder, self.settings, self.metric = Path(folder), settings, metric
        self.validations: list[tuple[int, Result]] = []
        check_folder(self.folder, settings, about, resume)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QzoError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error
        self._about = {"qzo_run": 1, **about, "metric": metric, "settings": settings.to_json(), "versions": versions()}
        if not (self.folder / RUN).exists():
            _write_json(self.folder / RUN, self._about)
        self._file = (self.folder / METRICS).open("ab", buffering=0)

    def begin(self, steps: int) -> None:
        """Go on after `steps` steps: what the metrics tell of later ones is cut off, settings that may change are kept.

        Called when the learner has found the model and the saved state to fit.
        """
        _write_json(self.folder / RUN, self._about)
        end, self.validations = 0, []
        for line in (self.folder / METRICS).read_bytes().splitlines(keepends=True):
            entry = _parsed(line)
            if entry is None or entry["step"] > steps:
                break
            end += len(line)
            if "validation" in entry:
                self.validations.append((entry["step"], entry["validation"]))
        self._file.truncate(end)

    def write(self, entry: Result) -> None:
        """Append a line to the metrics. Raises QzoError where the disk is full; no half line is left."""
        line = memoryview((json.dumps(_finite(entry)) + "\n").encode())
        end = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[os.write(self._file.fileno(), line) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            path = self.folder / METRICS
            raise QzoError(f"{path} could not be written: {error.strerror}; free some space, then --resume") from error

    def validated(self, steps: int) -> bool:
        """Whether the validation after `steps` steps is in the metrics."""
        return any(step == steps for step, _ in self.validations)

    def add_validation(self, steps: int, result: Result, tensors: dict[str, Tensor]) -> bool:
        """Record a validation; where it is the best so far, keep the tensors first. Returns whether it is."""
        best = self.best
        better = best is None or self._score(result) > self._score(best[1])
        if better:
            write_tensors(self.folder / BEST, tensors, {"step": str(steps)})
        self.write({"step": steps, "validation": result})
        self.validations.append((steps, _finite(result)))
        return better

    @property
    def best(self) -> tuple[int, Result] | None:
        """Step and result of the best validation, the first of equals; None before any."""
        return max(self.validations, key=lambda entry: self._score(entry[1]), default=None)

    @property
    def stale(self) -> int:
        """Validations since the best."""
        return len(self.validations) - 1 - self.validations.index(self.best) if self.best else 0

    def _score(self, result: Result) -> tuple[float, float]:
        loss = -_number(result.get("loss"))
        return (loss, loss) if self.metric == "loss" else (_number(result[self.metric], -1), loss)

    def close(self) -> None:
        """Release the metrics file."""
        self._file.close()


def check_folder(folder: Path, settings: TrainSettings, about: Result, resume: bool) -> None:
    """Raise QzoError unless a run may be begun, or with `resume` taken up again, in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise QzoError(f"{folder} is a file; choose a folder for --out")
    there = next((parent for parent in (folder, *folder.absolute().parents) if parent.exists()), folder)
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise QzoError(f"{folder} cannot be written, {there} does not allow it; choose another --out")
    if not folder.exists() or all(_unfinished(file) for file in folder.iterdir()):
        return
    if not resume:
        raise QzoError(f"{folder} exists and is not empty; choose another --out, or go on with --resume")
    saved = read_run(folder)
    held = about if settings.method not in ZEROTH_ORDER else {name: about[name] for name in about if name != "model"}
    for name, value in held.items():  # the journal knows the model by its numbers, wherever it lies now
        if saved.get(name) != value:
            raise QzoError(f"{folder}: the run was begun with {name}={saved.get(name)}, not {value}; give the same")
    try:
        settings.check_resume(saved["settings"])
    except QzoError as error:
        raise QzoError(f"{folder}: {error}") from error


def read_run(folder: Path) -> Result:
    """The content of a run's run.json. Raises QzoError where there is none."""
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8"))
        if content["qzo_run"] != 1 or not isinstance(content["settings"], dict):
            raise ValueError("not of this version")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QzoError(f"{folder} is not the folder of a run ({RUN} is missing or cannot be read)") from error
    return dict(content)


def dtype_of(settings: dict[str, Any]) -> torch.dtype | None:
    """The dtype to load a run's model in, by its settings as JSON; None is for `qzo.load` to choose."""
    name = settings.get("dtype") or ("float32" if settings["method"] == "ft" else None)
    return None if name is None else getattr(torch, name)


def versions() -> dict[str, str]:
    """Versions of what computes."""
    from importlib.metadata import version

    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def _write_json(path: Path, content: Result) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _unfinished(file: Path) -> bool:
    """Whether a kill left this behind before there was a run."""
    return file.name.startswith(".") and file.name.endswith(".part")


def _parsed(line: bytes) -> Result | None:
    """A whole line of the metrics, None for a torn one."""
    try:
        entry = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("step"), int) else None


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any, sign: int = 1) -> float:
    """A number, or the worst one where it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else sign * math.inf
