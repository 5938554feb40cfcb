"""From a place with data to a task: what was recognised, split by seed where no splits are given."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from qzo.errors import QzoError
from qzo.tasks import metrics
from qzo.tasks.catalog import Task
from qzo.tasks.example import Example
from qzo.tasks.own import kinds
from qzo.tasks.own.classes import asked_by, example_of, labels_of, read_words
from qzo.tasks.own.pieces import pieces
from qzo.tasks.own.reward import Reward, RewardTask, reward_prompts
from qzo.tasks.own.sequence import Sequence, chat_row, completion_row, preference_row, text_row
from qzo.tasks.sampling import Pools, draw
from qzo.tasks.source.files import Rows, read
from qzo.tasks.source.row import Row

Sizes = Mapping[str, int | None]
SIZES: Sizes = {"train": None, "validation": 500, "test": 1000}
SHARE = 10  # a split that is not given gets one row of so many, at most its size above
READERS = {
    kinds.CHAT: chat_row,
    kinds.COMPLETION: completion_row,
    kinds.TEXT: text_row,
    kinds.PREFERENCE: preference_row,
}
METRICS = {
    kinds.CLASSES: ("accuracy", "macro_f1", "loss"),
    kinds.COMPLETION: ("loss", "exact_match", "f1"),
    kinds.CHAT: ("loss", "exact_match", "f1"),
    kinds.TEXT: ("loss",),
    kinds.PREFERENCE: ("accuracy", "loss"),
}


class _Splits:
    """The splits of a user's data; what is not given is cut from the training rows."""

    def __init__(self, name: str, asked: Sizes, source: Pools) -> None:
        self.name, self.asked, self.source = name, asked, source

    def drawn(self, seed: int) -> Pools:
        """Examples by split. Raises QzoError for too few."""
        self._check_enough()
        whole = len(self.source["train"])
        sizes = {}
        for split, usual in SIZES.items():
            if split == "test" and split not in self.source and "validation" in self.source:
                continue  # whoever splits by hand is given no split more
            asked = self.asked.get(split)
            cut = max(1, min(usual, whole // SHARE)) if usual and split not in self.source else usual
            sizes[split] = asked or cut or whole
        sizes["train"] = self.asked.get("train") or max(
            1, whole - sum(size for split, size in sizes.items() if split != "train" and split not in self.source)
        )
        return draw(self.source, sizes, seed)

    def _check_enough(self) -> None:
        cut = [] if "validation" in self.source else ["validation", *(["test"] if "test" not in self.source else [])]
        different = len({example.key() for example in self.source["train"]})
        if different <= len(cut):
            raise QzoError(
                f"{self.name} has {len(self.source['train']):,} rows, {different:,} of them different, and "
                f"{' and '.join(cut)} rows are cut from it: give {len(cut) + 1} different rows at least, or a file of "
                "its own by --validation"
            )


@dataclass(frozen=True)
class LabelTask(Task):
    """Texts with labels of a user's own; a `Task` with its rows in memory."""

    pools: Any = field(default=None, repr=False)
    kind: kinds.Kind = kinds.CLASSES

    def splits(self, seed: int = 0, train: int = 0, validation: int = 0, test: int = 0) -> Pools:
        """Examples by split, drawn by seed, as many as the data has, or 0, as they were asked for."""
        drawn: Pools = self.pools.drawn(seed)
        return drawn


@dataclass(frozen=True)
class SequenceTask:
    """Sequences of a user's own: completions, conversations, plain text or preferences.

    Attributes:
        name: of the file or folder.
        kind: what was recognised.
        metric: tells the best state; "loss", the lower.
        packed: whether texts stand one behind the other in rows of one length.
        whole: whether prompts and the turns of users are learnt as well.
    """

    name: str
    kind: kinds.Kind
    metric: str
    packed: bool = False
    whole: bool = False
    pools: Any = field(default=None, repr=False)
    words = ()
    written = ("exact_match", "f1")  # metrics of answers that the model writes

    def read(self, row: Row) -> list[Sequence]:
        """The sequences of a row; a long text that is packed is several. Raises QzoError."""
        found = READERS[self.kind](row)
        return pieces(found) if self.packed else [found]

    @property
    def writes(self) -> bool:
        """Whether there are answers that could be compared with what the model writes."""
        return self.kind in (kinds.COMPLETION, kinds.CHAT)

    def splits(self, seed: int = 0) -> Pools:
        """Sequences by split, drawn by seed."""
        drawn: Pools = self.pools.drawn(seed)
        return drawn


def from_data(
    data: str,
    validation: str | None = None,
    test: str | None = None,
    columns: Mapping[str, str] | None = None,
    label_words: str | None = None,
    metric: str | None = None,
    sizes: Sizes | None = None,
    reward: Reward | None = None,
) -> LabelTask | SequenceTask | RewardTask:
    """A task of your own data, recognised by its fields, whose names are those of TRL's data set formats.

        text, label               any number of classes, told apart by the likelihood of their words
        prompt, completion        text, or messages
        messages                  conversations, in the words of the tokenizer's own chat template
        text                      plain text, packed
        chosen, rejected, prompt  a better and a worse answer; the prompt may stand in both instead
        prompt                    text, or messages, with a `reward` for what the model answers

    Args:
        data: .jsonl, .json, .csv, .tsv, .parquet or .txt file (.gz too, where it is text); a folder of one kind of
            these, with train, validation and test files or without; hub:owner/name[:configuration].
        validation, test: as `data`; where neither these nor such files are given, a tenth of the training rows each
            (at most 500 and 1,000), drawn by seed. With a validation of your own there is no test unless you give one.
        columns: field -> name of the column that holds it, {"prompt": "question"}.
        label_words: file with what the model is to say for each label, JSON or lines of a label, a tab, its words;
            None, the labels themselves.
        metric: what tells the best state, of `METRICS`; None, accuracy of labels and preferences, else loss.
        sizes: examples of "train", "validation" and "test", at most.
        reward: what scores the answers to prompts; the other fields of their rows go to it, none of them is learnt.

    Raises:
        QzoError: with file and line or row, for what is missing, damaged, of another encoding or kind.
    """
    columns = columns or {}
    rows = _rows({"train": data, "validation": validation, "test": test}, columns)
    if reward is not None:
        if label_words is not None:
            raise QzoError(
                "label words are for texts with labels, and a reward scores what the model writes; leave them out"
            )
        prompts: Any = reward_prompts(rows, reward, metric)
        return RewardTask(Path(data).name, reward, _Splits(data, sizes or {}, prompts))
    task = recognised(rows["train"], Path(data).name, columns, label_words, metric)
    source: Any = {split: [example for row in found for example in task.read(row)] for split, found in rows.items()}
    return replace(task, pools=_Splits(data, sizes or {}, source))


def recognised(
    rows: Several[Row],
    name: str,
    columns: Mapping[str, str],
    label_words: str | None = None,
    metric: str | None = None,
) -> LabelTask | SequenceTask:
    """The task that training rows are of, without splits; their fields have the names known here already.

    For the other arguments, and what it raises, see `from_data`.
    """
    kind = kinds.kind_of(rows)
    chosen = metric or METRICS[kind][0]
    if chosen not in METRICS[kind]:
        raise QzoError(f'metric "{metric}" is not measured on {kind.text}; choose {", ".join(METRICS[kind])}')
    if label_words is not None and kind is not kinds.CLASSES:
        raise QzoError(f"label words are for texts with labels, and {name} holds {kind.text}; leave them out")
    if kind is not kinds.CLASSES:
        return SequenceTask(name, kind, chosen, packed=kind is kinds.TEXT)
    labels = labels_of(rows)
    words = read_words(label_words, labels)
    numbers = {label: number for number, label in enumerate(labels)}
    read_row = partial(_examples, numbers, words, asked_by(columns.get("label", "label")))
    return LabelTask(name, chosen, read_row, words, metrics.of_classes(labels))


def _rows(places: Mapping[str, str | None], columns: Mapping[str, str]) -> Rows:
    rows: Rows = {}
    for split, place in places.items():
        if place is not None:
            found = read(place)
            rows |= found if split == "train" else {split: found["train"]}
    return {split: kinds.renamed(of_split, columns) for split, of_split in rows.items()}


def _examples(numbers: Mapping[str, int], words: tuple[str, ...], asked: str, row: Row) -> list[Example]:
    return [example_of(row, numbers, words, asked)]
