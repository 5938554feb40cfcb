r"""The folder of a training run.

    run.json           what was asked for: model, task, settings, versions
    run.journal        zeroth order: one line a step, with a snapshot beside it; see `qzo.journal`
    last.safetensors   first order: trained tensors and moments at the last validation
    best.safetensors   name -> trained tensor at the best validation: scales, not the model
    metrics.jsonl      {"step": n, "loss": ...} after n steps, {"step": n, "validation": {...}, "memory": {...}};
                        seconds count from the start of the process; see `qzo.training.telemetry.metrics`
    facts.json         what was found before the first step: the data, sizes of the model, the device
    start.safetensors  of a run that was begun on another run: what that one had tuned, so that it may be gone

A line of metrics.jsonl is written before the step is recorded, so after a kill no recorded step lacks its line; lines
of steps that are taken again are cut off on a resume. What decides which state is the best is sealed, and synced before
it counts; the states are sealed too (`qzo.durable.write_tensors`). A process that has a run locks its folder.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import weakref
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzo.checkpoints.identity import BASE, MODEL
from qzo.durable import lock, read_tensors, reason, remove_leftovers, replace_file, write_tensors
from qzo.errors import QzoError
from qzo.files.bounds import AmbiguousKey, said_once
from qzo.journal.header import carrier, differences
from qzo.regular import check_regular, is_there
from qzo.training.learners import JOURNAL
from qzo.training.own import SOURCE
from qzo.training.presets import PRESETS
from qzo.training.settings import AUTO, DTYPES, METHODS, ZEROTH_ORDER, TrainSettings, known
from qzo.training.telemetry.metrics import Metrics, finite
from qzo.training.telemetry.writers import TENSORBOARD, WANDB

PLACES = ("task", "data", "validation", "test", "label_words", "reward")  # keys of run.json: what a run was begun on
SUMS = "sums"  # key of run.json: checksums of the settings and of what was found
FOUND = "found"  # key of run.json: what was chosen where settings say "auto"
RUN, METRICS, BEST, FACTS = "run.json", "metrics.jsonl", "best.safetensors", "facts.json"
START = "start.safetensors"
STATE, TUNED_BY = "start", "begun_on"  # keys of run.json: SHA-256 of what the start holds, and the run it is from
TEST = "test"  # key of facts.json: the result of the test before the first step
RESULT = "result.json"  # written when the run has ended
MOST_MIB = 8  # of run.json
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
        self.losses: list[float] = []  # of the steps that were taken before a resume
        check_folder(self.folder, settings, about, resume)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QzoError(f"{self.folder} cannot be made: {error.strerror}; choose another --out") from error
        self.resumed = (self.folder / RUN).exists()
        self.notices: list[str] = []
        self._unlock = weakref.finalize(self, os.close, lock(self.folder))
        try:
            check_folder(self.folder, settings, about, resume)  # again: another process may have been here
            remove_leftovers(self.folder)
            for left in self.folder.glob(".tmp*"):  # of safetensors, in an older version
                left.unlink()
            asked = settings.to_json()
            self._about = {"qzo_run": 1, **about, "metric": metric, "settings": asked, SUMS: {"settings": _sum(asked)}}
            self._about["versions"] = versions()
            if self.resumed and settings.method not in ZEROTH_ORDER:  # of these, the journal tells
                self.notices = differences("the run", read_run(self.folder).get("versions", {}), ("threads", "carrier"))
            if self.resumed:
                self._settle_again(read_run(self.folder))
            if not (self.folder / RUN).exists():
                _write_json(self.folder / RUN, self._about)
            self._metrics = Metrics(self.folder / METRICS, metric)
        except BaseException:
            self._unlock()
            raise

    def settle(self, found: Result) -> None:
        """Take over what was chosen where settings say "auto", and remember it. Raises QzoError for no such values."""
        try:
            self.settings = replace(self.settings, **found)
        except (QzoError, TypeError) as error:
            raise QzoError(f"{self.folder / RUN}: {FOUND}: {error}; restore the file from a copy") from error
        if found:
            self._about[FOUND] = {**self._about.get(FOUND, {}), **found}
            self._about[SUMS][FOUND] = _sum(self._about[FOUND])

    def _settle_again(self, saved: Result) -> None:
        """As the run was begun. Raises QzoError where that was changed since."""
        self.settle(known(saved.get(FOUND)))
        before = _sums(saved).get(FOUND)
        if before is not None and before != self._about[SUMS].get(FOUND):
            raise QzoError(
                f"{self.folder / RUN}: {FOUND} is damaged, its checksum does not fit; restore it from a copy"
            )

    def begin(self, steps: int) -> None:
        """Go on after `steps` steps: what the metrics tell of later ones is cut off, settings that may change are kept.

        Called when the learner has found the model and the saved state to fit. Raises QzoError where the metrics are
        damaged or lack a validation, and where the best state is damaged or not that of the best validation.
        """
        entries = self._metrics.read(steps)
        self.validations = [(entry["step"], entry["validation"]) for entry in entries if "validation" in entry]
        self.losses = [_number(entry["loss"]) for entry in entries if "loss" in entry]
        there = {step for step, _ in self.validations}
        lost = [step for step in range(0, steps, self.settings.eval_every) if step not in there]
        if lost and (self._metrics.sealed or not entries):
            raise QzoError(
                f"{self.folder / METRICS} lacks the validation after {lost[0]} steps, and {steps} were taken: which "
                "state was the best cannot be told; restore the file from a copy"
            )
        if self.best is not None:
            kept = _step(read_tensors(self.folder / BEST)[1])
            if kept is not None and kept != self.best[0] and kept < steps:
                raise QzoError(
                    f"{self.folder / BEST} is the state after {kept} steps, and the best validation was after "
                    f"{self.best[0]}; restore it from a copy"
                )
        _write_json(self.folder / RUN, self._about)

    def keep_facts(self, facts: Result) -> None:
        """Write down what was found before the first step. Raises QzoError where the disk is full."""
        known = finite(facts)
        _write_json(self.folder / FACTS, {**known, "crc": _sum(known)})

    def facts(self) -> Result:
        """What was written down; empty where nothing was. Raises QzoError where it was changed since."""
        if not is_there(self.folder / FACTS):
            return {}
        check_regular(self.folder / FACTS, MOST_MIB)
        try:
            content = json.loads((self.folder / FACTS).read_bytes())
            crc = content.pop("crc", None)  # none of an older version
            is_whole = crc in (None, _sum(content))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            is_whole = False
        if not is_whole:
            raise QzoError(
                f"{self.folder / FACTS} is damaged; restore it from a copy, or remove it, and with it what the test "
                "gave before the first step"
            )
        return dict(content)

    def write(self, entry: Result) -> None:
        """Append a line to the metrics. Raises QzoError where the disk is full; no half line is left."""
        self._metrics.write(entry)

    def validated(self, steps: int) -> bool:
        """Whether the validation after `steps` steps is in the metrics."""
        return any(step == steps for step, _ in self.validations)

    def add_validation(
        self,
        steps: int,
        result: Result,
        tensors: dict[str, Tensor],
        mark: dict[str, str] | None = None,
        memory: dict[str, int] | None = None,
    ) -> bool:
        """Record a validation, on the disk when this returns; where it is the best so far, keep the tensors first.

        `mark`: what is kept with the tensors to tell whose they are; `memory`: peaks so far, in bytes. Returns whether
        it is the best.
        """
        best = self.best
        better = best is None or self._score(result) > self._score(best[1])
        if better:
            write_tensors(self.folder / BEST, tensors, {"step": str(steps), **(mark or {})})
        taken = {} if memory is None else {"memory": memory}
        self._metrics.write({"step": steps, "validation": result, **taken}, durable=True)
        self.validations.append((steps, finite(result)))
        return better

    @property
    def best(self) -> tuple[int, Result] | None:
        """Step and result of the best validation, the first of equals; None before any."""
        return max(self.validations, key=lambda entry: self._score(entry[1]), default=None)

    @property
    def guarded(self) -> bool:
        """Whether lr was left to be chosen, and so may be lowered."""
        return bool(self._about["settings"]["lr"] == AUTO)

    @property
    def stale(self) -> int:
        """Validations since the best."""
        return len(self.validations) - 1 - self.validations.index(self.best) if self.best else 0

    def _score(self, result: Result) -> tuple[float, float]:
        loss = -_number(result.get("loss"))
        return (loss, loss) if self.metric == "loss" else (_number(result[self.metric], -1), loss)

    def discard_unless_begun(self) -> None:
        """Remove a run that failed before its first validation, so that it may be begun anew in the same place."""
        if self.resumed or self.validations:
            return
        for name in (TENSORBOARD, WANDB):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        with suppress(OSError):  # something of others' making is in the folder
            for name in (METRICS, BEST, JOURNAL, FACTS, START, RUN):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    def close(self) -> None:
        """Release the metrics file and the folder."""
        self._metrics.close()
        self._unlock()


def check_folder(folder: Path, settings: TrainSettings, about: Result, resume: bool) -> None:
    """Raise QzoError unless a run may be begun, or with `resume` taken up again, in `folder`."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise QzoError(f"{folder} is not UTF-8, which safetensors needs of a path; choose another --out") from error
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
    known = saved.get(BASE) is not None and about.get(BASE) is not None
    if known and saved[BASE] != about[BASE]:
        raise QzoError(
            f"{folder}: the run was begun on another model ({saved[MODEL]} with the content {saved[BASE][:12]}; "
            f"{about[MODEL]} has {about[BASE][:12]}); give the one it was begun on"
        )
    by_numbers = known or settings.method in ZEROTH_ORDER  # the model is known by them, wherever it lies now
    for name, value in about.items():
        if name not in (BASE, TUNED_BY) and not (name == MODEL and by_numbers) and saved.get(name) != value:
            if name == SOURCE and saved.get(name):
                raise QzoError(
                    f"{folder}: the file of the reward has changed since the run was begun (SHA-256 {saved[name][:12]} "
                    f"then, {str(value)[:12]} now); restore it, or begin anew in another --out"
                )
            if name == STATE and saved.get(name):
                raise QzoError(
                    f"{folder}: {about[TUNED_BY]} holds another state than the run was begun on; give {saved[MODEL]}, "
                    "and it goes on from the state that it keeps"
                )
            if name == STATE:
                raise QzoError(f"{folder}: the run was begun on {saved[MODEL]}, not on a run; give that model")
            raise QzoError(f"{folder}: the run was begun with {name}={saved.get(name)}, not {value}; give the same")
    try:
        settings.check_resume(saved["settings"])
    except QzoError as error:
        raise QzoError(f"{folder}: {error}") from error


def read_run(folder: Path) -> Result:
    """The content of a run's run.json. Raises QzoError where there is none, and where what makes a run is missing."""
    if is_there(folder / RUN):
        check_regular(folder / RUN, MOST_MIB)
    try:
        content = json.loads((folder / RUN).read_text(encoding="utf-8-sig"), object_pairs_hook=said_once)
        if content["qzo_run"] != 1 or not isinstance(content["settings"], dict):
            raise ValueError("not of this version")
    except AmbiguousKey as error:
        raise QzoError(f"{folder / RUN}: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise QzoError(
            f"{folder} is not the folder of a run ({RUN} is missing or cannot be read); give one that qzo train "
            "wrote, or restore it from a copy"
        ) from error
    settings = content["settings"]
    wrong = {
        "model": not isinstance(content.get(MODEL), str) and MODEL in content,
        "base": not isinstance(content.get(BASE), str | None),
        "start": not isinstance(content.get(STATE), str | None),
        **{name: not isinstance(content.get(name), str | None) for name in PLACES},
        **{name: not isinstance(content.get(name), dict | None) for name in ("sizes", "columns")},
        "settings.method": settings.get("method") not in METHODS,
        "settings.dtype": settings.get("dtype") not in (None, *DTYPES),
        "settings.seed": type(settings.get("seed", 0)) is not int,
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise QzoError(f"{folder / RUN}: {name} is missing or not known; restore the file from a copy")
    return dict(content)


def begun_with(folder: Path) -> Result:
    """The settings that the run in a folder was begun with, or its preset alone where they were changed since.

    Empty where there is no run. Raises QzoError as `read_run`.
    """
    if not is_there(folder / RUN):
        return {}
    saved = read_run(folder)
    settings = saved["settings"]
    if _sums(saved).get("settings") != _sum(settings):  # of an older version, or damaged: what is asked for is compared
        preset = settings.get("preset", "paper")  # an older version had no other
        return {"preset": preset} if isinstance(preset, str) and preset in PRESETS else {}
    try:
        values = TrainSettings.from_json(settings)
        TrainSettings(**values)
        if values.get("preset", "paper") not in [*PRESETS]:
            raise QzoError(f"preset={values['preset']!r} is not known; choose {' or '.join(PRESETS)}")
    except (TypeError, ValueError, AttributeError) as error:  # QzoError is one
        raise QzoError(f"{folder / RUN}: settings: {reason(error)}; restore the file from a copy") from error
    return values


def _sums(saved: Result) -> Result:
    sums = saved.get(SUMS)
    return sums if isinstance(sums, dict) else {}


def _sum(value: Any) -> str:
    """CRC-32 of what JSON makes of a value."""
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"


def dtype_of(settings: dict[str, Any]) -> torch.dtype | None:
    """The dtype to load a run's model in, by its settings as JSON; None is for `qzo.load` to choose."""
    name = settings.get("dtype") or ("float32" if settings["method"] == "ft" else None)
    return None if name is None else getattr(torch, name)


def versions() -> dict[str, str]:
    """What computes: versions, threads, and what multiplies by packed codes."""
    from importlib.metadata import version

    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "threads": str(torch.get_num_threads()),
        "carrier": carrier(),
    }


def _write_json(path: Path, content: Result) -> None:
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _unfinished(file: Path) -> bool:
    """Whether a kill left this behind before there was a run."""
    return file.name.startswith(".") and (file.name.endswith(".part") or file.name.startswith(".tmp"))


def _step(metadata: dict[str, str]) -> int | None:
    """The step that a state was kept at; None where it does not say so."""
    text = metadata.get("step", "")
    return int(text) if text.isdecimal() else None


def _number(value: Any, sign: int = 1) -> float:
    """A number, or the worst one where it is not finite."""
    return float(value) if value is not None and math.isfinite(value) else sign * math.inf
