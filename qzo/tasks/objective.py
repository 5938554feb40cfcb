"""A task with a tokenizer: what a training loop asks for, whatever the task is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qzo.errors import QzoError
from qzo.tasks.answers import takes_answers
from qzo.tasks.catalog import Task
from qzo.tasks.encoding import Batch, Encoder
from qzo.tasks.evaluation import Watch, evaluate
from qzo.tasks.own.completions import RewardObjective
from qzo.tasks.own.encoding import Row, SequenceEncoder
from qzo.tasks.own.reward import RewardTask
from qzo.tasks.own.scoring import evaluate_sequences, sequence_loss
from qzo.tasks.own.task import SequenceTask
from qzo.tasks.scoring import loss, row_losses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Splits = Mapping[str, Sequence[Any]]
BLOCK = 128  # tokens of a row of packed text


class LabelObjective:
    """Of a task whose answers are chosen, or written behind a prompt of its own (SQuAD)."""

    cuts = ("prompts", "their texts at the beginning, questions and answers are whole")

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.task = task
        self.encoder = Encoder(task, tokenizer, max_length)
        self.batch, self.length = self.encoder.batch, self.encoder.length

    def fitted(self, max_length: int | None) -> LabelObjective:
        """The same for rows of at most so many tokens."""
        made = LabelObjective(self.task, self.encoder.tokenizer, max_length)
        made.encoder.take(self.encoder)
        return made

    def rows(self, examples: Sequence[Any]) -> list[Any]:
        """What batches are made of. Raises QzoError for an example that does not fit."""
        for example in examples:
            self.encoder.encode(example)
        return list(examples)

    def prepare(self, model: nn.Module) -> None:
        """Find out how the model reads answers of several tokens, before its layers are given a `forward` of ours."""
        takes_answers(model, row_losses)

    def loss(self, model: nn.Module, batch: Batch, centering: float = 0.0) -> Tensor:
        """The training loss of a batch, see `qzo.tasks.loss`."""
        return loss(model, batch, centering)

    def evaluate(
        self, model: nn.Module, rows: Sequence[Any], batch_size: int, watch: Watch | None = None, last: bool = False
    ) -> dict[str, Any]:
        """Scores, see `qzo.tasks.evaluate`; `last` makes no difference."""
        return evaluate(model, self.encoder, rows, batch_size, watch=watch)

    def notices(self, splits: Splits) -> list[str]:
        """What to tell of prompts that are longer than a row may be. Raises QzoError for one that cannot be cut."""
        counted = _counted(splits, {split: self.encoder.cut(examples) for split, examples in splits.items()})
        if not counted:
            return []
        most = self.encoder.max_length
        return [f"{counted} {self.cuts[0]} are longer than max_length={most} tokens and are cut: {self.cuts[1]}"]


class SequenceObjective:
    """Of sequences: completions, conversations, plain text, preferences."""

    cuts = ("rows", "prompts of text at their beginning, all else at its end")

    def __init__(self, task: SequenceTask, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.task, self.asked = task, max_length
        self.encoder = SequenceEncoder(tokenizer, max_length, task.packed, task.whole)
        self.batch, self.length = self.encoder.batch, self.encoder.length

    def fitted(self, max_length: int | None) -> SequenceObjective:
        """This one, for rows of at most so many tokens; texts are packed into 128 where no length was asked for."""
        if self.task.packed and self.asked is None:
            max_length = min(BLOCK, max_length or BLOCK)
        self.encoder.max_length, self.encoder.left_out = max_length, 0
        return self

    def rows(self, examples: Sequence[Any]) -> list[Row]:
        """What batches are made of. Raises QzoError for an example that cannot be encoded, or where none is left."""
        found = self.encoder.rows(examples)
        if not found:
            raise QzoError(
                f"max_length={self.encoder.max_length} leaves nothing to learn of {len(examples):,} rows: what is "
                "learnt begins behind it; choose more"
            )
        return found

    def loss(self, model: nn.Module, batch: Batch, centering: float = 0.0) -> Tensor:
        """The training loss of a batch, see `qzo.tasks.own.scoring`."""
        return sequence_loss(model, batch)

    def evaluate(
        self, model: nn.Module, rows: Sequence[Row], batch_size: int, watch: Watch | None = None, last: bool = False
    ) -> dict[str, Any]:
        """Scores; answers are written where the metric needs that, and in the `last` evaluation."""
        writes = self.task.writes and (last or self.task.metric in self.task.written)
        return evaluate_sequences(model, self.encoder, rows, batch_size, writes, watch)

    def notices(self, splits: Splits) -> list[str]:
        """What to tell of rows that are longer than they may be. Raises QzoError as `rows`."""
        most = self.encoder.max_length
        told = []
        if counted := _counted(splits, {split: self.encoder.cut(examples) for split, examples in splits.items()}):
            told.append(
                f"{counted} {self.cuts[0]} are longer than max_length={most} tokens and are cut: {self.cuts[1]}"
            )
        if self.encoder.left_out:
            told.append(f"{self.encoder.left_out:,} of them are left out: what is learnt begins behind {most} tokens")
        return told


Objective = LabelObjective | SequenceObjective | RewardObjective


def objective(
    task: Task | SequenceTask | RewardTask, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Objective:
    """What to train and score a model by.

    Args:
        task: from `get` or `from_data`.
        tokenizer: a transformers tokenizer.
        max_length: tokens a row may have; None, any number.
    """
    if isinstance(task, RewardTask):
        return RewardObjective(task, tokenizer, max_length)
    if isinstance(task, SequenceTask):
        return SequenceObjective(task, tokenizer, max_length)
    return LabelObjective(task, tokenizer, max_length)


def _counted(splits: Splits, counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} of {len(splits[split]):,} {split}" for split, count in counts.items() if count)
