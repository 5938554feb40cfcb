"""What the folder of a run tells, read and changed in nothing, even while the run goes on."""

from __future__ import annotations

import fcntl
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qzo.durable import read_tensors
from qzo.errors import QzoError
from qzo.journal.lines import read as read_journal
from qzo.regular import check_regular, is_there
from qzo.training.learners import JOURNAL, LAST
from qzo.training.run import FACTS, FOUND, METRICS, MOST_MIB, RESULT, TEST, read_run
from qzo.training.settings import ZEROTH_ORDER, known
from qzo.training.telemetry.metrics import read_metrics

Scores = dict[str, float]
Confusion = dict[str, dict[str, int]]  # label -> what it was taken for -> how often
MOST_LABELS = 1000


@dataclass(frozen=True)
class Step:
    """A step: `number` counts from 1; `slope` is d, or the norm of the gradient."""

    number: int
    loss: float
    slope: float
    clipped: bool
    skipped: bool
    seconds: float


@dataclass(frozen=True)
class Validation:
    """What was measured after `step` steps, or at the end on the test split."""

    step: int
    scores: Scores
    count: int | None = None
    confusion: Confusion | None = None
    memory: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Story:
    """A run, as far as it came.

    Attributes:
        about: what run.json holds: model, data, settings, versions.
        resumes_after: steps after which `--resume` goes on.
        facts: what was found before the first step; empty in a run of an older version.
        test, first_test: of the best state, and before the first step; None where it is not known.
        state: "finished", "stopped early", "running" or "interrupted".
    """

    folder: Path
    about: Mapping[str, Any]
    metric: str
    steps: list[Step]
    validations: list[Validation]
    resumes_after: int
    facts: Mapping[str, Any]
    test: Validation | None
    state: str
    first_test: Validation | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings as JSON, with what was chosen where they say "auto"."""
        return {**self.asked, **known(self.about.get(FOUND))}

    @property
    def asked(self) -> Mapping[str, Any]:
        """The settings as JSON, as they were asked for."""
        settings: Mapping[str, Any] = self.about["settings"]
        return settings

    @property
    def method(self) -> str:
        """Name of the method."""
        return str(self.settings["method"])

    @property
    def zeroth_order(self) -> bool:
        """Whether the run has a d, rather than the norm of a gradient."""
        return self.method in ZEROTH_ORDER

    @property
    def taken(self) -> int:
        """Steps whose losses are there."""
        return self.steps[-1].number if self.steps else 0

    @property
    def passes_a_step(self) -> int:
        """Forward passes that a step takes; the first-order methods run as many backward passes."""
        if not self.zeroth_order:
            return 1
        directions = int(self.settings.get("directions", 1))
        by_estimator = {"one-sided": directions + 1, "population": directions}
        return by_estimator.get(str(self.settings.get("estimator")), 2 * directions)

    @property
    def passes(self) -> str:
        """What they are, in words."""
        return "forward passes" if self.zeroth_order else "forward and backward passes"

    @property
    def first(self) -> Validation | None:
        """The validation before the first step, the baseline; None where there is none."""
        return next((found for found in self.validations if found.step == 0), None)

    @property
    def best(self) -> Validation | None:
        """The best validation, the first of equals, as the run itself chose it."""
        return max(self.validations, key=self._score, default=None)

    @property
    def seconds(self) -> float:
        """Of all lives of the run, steps and validations between them; 0 where no step was taken."""
        total, before = 0.0, 0.0
        for step in self.steps:
            if step.seconds < before:  # a new process counts from 0
                total += before
            before = step.seconds
        return total + before

    @property
    def peak(self) -> dict[str, int]:
        """The largest of each number of bytes that the validations tell."""
        names = {name for found in self.validations for name in found.memory}
        return {name: max(found.memory.get(name, 0) for found in self.validations) for name in names}

    def _score(self, found: Validation) -> tuple[float, float]:
        loss = -_finite(found.scores.get("loss"), math.inf)
        return (loss, loss) if self.metric == "loss" else (_finite(found.scores.get(self.metric), -math.inf), loss)


def read_story(folder: Path) -> Story:
    """All that a run's folder tells. Raises QzoError, in one line, for what is damaged or is no run."""
    about = read_run(folder)
    metric = about.get("metric", "loss")
    counts = [about["settings"].get(name, 1) for name in ("steps", "directions")]
    if not isinstance(metric, str) or not all(_is_count(count) for count in counts):
        raise QzoError(f"{folder}: metric or settings of run.json cannot be read; restore it from a copy")
    entries = read_metrics(folder / METRICS, metric) if is_there(folder / METRICS) else []
    slope = "d" if about["settings"]["method"] in ZEROTH_ORDER else "gradient_norm"
    steps = [_step(entry, slope) for entry in entries if "validation" not in entry]
    validations = [_validation(entry["step"], entry["validation"], entry.get("memory")) for entry in entries
                   if "validation" in entry]  # fmt: skip
    facts, result = _json(folder / FACTS), _json(folder / RESULT)
    last = steps[-1].number if steps else 0
    test = _validation(0, result["test"], None) if isinstance(result.get("test"), dict) and result["test"] else None
    state = _state(folder, about["settings"].get("steps"), last, result)
    if state in ("running", "interrupted"):
        test = None  # of an earlier end, which was gone on from
    before = _validation(0, facts[TEST], None) if isinstance(facts.get(TEST), dict) and facts[TEST] else None
    return Story(folder, about, metric, steps, validations, _saved(folder), facts, test, state, before)


def _state(folder: Path, steps: Any, taken: int, result: Mapping[str, Any]) -> str:
    if _is_locked(folder):
        return "running"
    if result.get("steps") == taken and result.get("stopped_early") is True:
        return "stopped early"
    return "finished" if result.get("steps") == taken == steps else "interrupted"


def _is_locked(folder: Path) -> bool:
    """Whether a process has the run; the lock is looked at for a moment, shared with others who look."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(number)
    return False


def _saved(folder: Path) -> int:
    """Steps after which a resume goes on. Raises QzoError for a damaged journal or state."""
    if is_there(folder / JOURNAL):
        return read_journal(folder / JOURNAL).steps
    if not is_there(folder / LAST):
        return 0
    steps = read_tensors(folder / LAST)[1].get("steps", "")
    return int(steps) if steps.isdecimal() else 0


def _json(path: Path) -> Mapping[str, Any]:
    """An object from a file; empty where there is none. Raises QzoError."""
    if not is_there(path):
        return {}
    check_regular(path, MOST_MIB)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise QzoError(f"{path} cannot be read: {error}; restore it from a copy, or remove it") from error
    return content


def _step(entry: Mapping[str, Any], slope: str) -> Step:
    return Step(
        entry["step"],
        _finite(entry.get("loss"), math.nan),
        _finite(entry.get(slope), math.nan),
        entry.get("clipped") is True,
        entry.get("skipped") is True,
        max(0.0, _finite(entry.get("seconds"), 0.0)),
    )


def _validation(step: int, result: Mapping[str, Any], memory: Any) -> Validation:
    """Numbers of a result; what is null was not finite."""
    scores = {
        name: _finite(value, math.nan)
        for name, value in result.items()
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool))
    }
    count = scores.pop("count", math.nan)
    known = {name: value for name, value in (memory if isinstance(memory, dict) else {}).items() if _is_count(value)}
    whole = int(count) if math.isfinite(count) else None
    return Validation(step, scores, whole, _confusion(result.get("confusion")), known)


def _confusion(counts: Any) -> Confusion | None:
    """What was taken for what, with all labels on both sides; None where that is not told."""
    with suppress(AttributeError, TypeError):
        sound = all(_is_count(count) for guesses in counts.values() for count in guesses.values())
        labels = list(dict.fromkeys([*counts, *(guess for guesses in counts.values() for guess in guesses)]))
        if sound and 0 < len(labels) <= MOST_LABELS:
            return {label: {guess: counts.get(label, {}).get(guess, 0) for guess in labels} for label in labels}
    return None


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _finite(value: Any, otherwise: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return otherwise
    with suppress(OverflowError):
        return float(value) if math.isfinite(value) else otherwise
    return otherwise
