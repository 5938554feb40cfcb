"""From examples to the tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qzo.errors import QzoError, is_failure
from qzo.files.folder import one_line
from qzo.models.loss import IGNORED
from qzo.tasks.catalog import Task
from qzo.tasks.example import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_ANSWER = 32  # tokens that a written answer may have; so much of max_length is kept free for it


@dataclass(frozen=True)
class Batch:
    """B examples as rows that end at the same column; padding is on the left and masked.

    Where every candidate is one token, a row is a prompt, the candidates are read off its last position, and R = B.
    Otherwise each candidate is written out after the prompt, and R = B * C, candidates of an example one below the
    other; a generation task has one row an example, C = 1.

    Attributes:
        input_ids: [R, T], int64.
        attention_mask: [R, T], int64; 0 on padding.
        labels: [B], int64: index of the right candidate.
        choices: [B, C], int64: the candidates where each is one token, else None.
        targets: [R, A], int64: the answers again, that is the last A columns of `input_ids`, with -100 in front of
            shorter ones; None where `choices` is not, and in a batch of prompts.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    choices: Tensor | None = None
    targets: Tensor | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        optional = (None if part is None else part.to(device) for part in (self.choices, self.targets))
        return Batch(self.input_ids.to(device), self.attention_mask.to(device), self.labels.to(device), *optional)


@dataclass(frozen=True)
class Encoded:
    """Tokens of a prompt, cut to fit, and of each answer; `cut` tells how many tokens of the text were left out."""

    prompt: list[int]
    answers: list[list[int]]
    cut: int = 0


class Encoder:
    """Makes batches of the examples of one task; each example is encoded once and kept.

    A prompt that would take more than `max_length` tokens with its longest answer is cut on the left of its text, never
    in the question or the answer; a beginning-of-sequence token stays where the tokenizer puts one. `cut` counts such
    examples: what is left out may have held the answer.

    Args:
        task: gives the label words, and tells whether answers are chosen or written.
        tokenizer: a transformers tokenizer.
        max_length: tokens a row may have, answer included; None, any number: nothing is cut, and a row that is longer
            than the model has positions is refused by `qzo.tasks.loss` and `evaluate`.

    Raises:
        QzoError: when an example is encoded: label words of the same tokens, or a `max_length` that is too short for
            question and answer alone; a damaged tokenizer.
    """

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.task, self.tokenizer, self.max_length = task, tokenizer, max_length
        self._start = start_tokens(tokenizer)
        self._kept: dict[Example, Encoded] = {}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_token_id = int(pad or 0)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """Prompts with their answers, for the loss or the choice of a candidate."""
        encoded = [self.encode(example) for example in examples]
        labels = torch.tensor([example.label for example in examples])
        answers = [answer for item in encoded for answer in item.answers]
        if not self.task.generates and all(len(answer) == 1 for answer in answers):
            choices = torch.tensor([[answer[0] for answer in item.answers] for item in encoded])
            return Batch(*padded([item.prompt for item in encoded], self.pad_token_id), labels, choices)
        rows = [item.prompt + answer for item in encoded for answer in item.answers]
        longest = max(len(answer) for answer in answers)
        targets = [[IGNORED] * (longest - len(answer)) + answer for answer in answers]
        return Batch(*padded(rows, self.pad_token_id), labels, targets=torch.tensor(targets))

    def prompts(self, examples: Sequence[Example]) -> Batch:
        """Prompts alone, for the model to go on from."""
        labels = torch.tensor([example.label for example in examples])
        return Batch(*padded([self.encode(example).prompt for example in examples], self.pad_token_id), labels)

    def length(self, example: Example) -> int:
        """Tokens of the example's longest row, to sort by."""
        encoded = self.encode(example)
        return len(encoded.prompt) + max(map(len, encoded.answers))

    def cut(self, examples: Iterable[Example]) -> int:
        """Number of examples whose text does not fit and is cut. Raises QzoError as `encode`."""
        return sum(self.encode(example).cut > 0 for example in examples)

    def take(self, other: Encoder) -> None:
        """Take over what another encoder of the same task and tokenizer made whole, where it fits here as well."""
        for example, encoded in other._kept.items():
            whole = len(encoded.prompt) + self._longest(encoded.answers)
            if not encoded.cut and (self.max_length is None or whole <= self.max_length):
                self._kept[example] = encoded

    def encode(self, example: Example) -> Encoded:
        """The tokens of one example. Raises QzoError, see above."""
        if example not in self._kept:
            self._kept[example] = self._encode(example)
        return self._kept[example]

    def _encode(self, example: Example) -> Encoded:
        """Prompt and answer are encoded as one text: where a tokenizer merges over their border, the answer has it."""
        start = example.text + example.ask
        ends = [f"{example.answers[0]}\n"] if self.task.generates else example.answers
        prompt, whole = self._tokens(start), [self._tokens(start + end) for end in ends]
        border = shared(prompt, whole)
        answers = [tokens[border:] for tokens in whole]
        if self.task.words:
            answers = self._told_apart(answers)
        prompt = self._start + prompt[:border]
        longest = self._longest(answers)
        surplus = 0 if self.max_length is None else max(0, len(prompt) + longest - self.max_length)
        if surplus:
            self._check_room(example, prompt, surplus)
            prompt = self._start + prompt[len(self._start) + surplus :]
        return Encoded(prompt, answers, surplus)

    def _longest(self, answers: list[list[int]]) -> int:
        return max([*map(len, answers), MAX_ANSWER if self.task.generates else 1])

    def _told_apart(self, answers: list[list[int]]) -> list[list[int]]:
        """Label words that are told apart by their tokens: where one begins another, a new line ends them all."""
        order = sorted(range(len(answers)), key=answers.__getitem__)  # what begins another stands right before one
        pairs = list(pairwise(order))
        same = next(((a, b) for a, b in pairs if answers[a] == answers[b]), None)
        if same is not None:
            first, second = (self.task.words[number].strip() for number in same)
            raise QzoError(
                f'{self.task.name}: label words "{first}" and "{second}" are the same tokens to this tokenizer, so '
                "nothing tells them apart; use a model whose tokenizer has them as words, or other label words"
            )
        if not any(answers[b][: len(answers[a])] == answers[a] for a, b in pairs):
            return answers
        end = self._tokens("\n")
        return [[*answer, *end] for answer in answers]

    def _check_room(self, example: Example, prompt: list[int], surplus: int) -> None:
        """Raise QzoError where no token would stay that is of the text alone."""
        text = shared(prompt[len(self._start) :], [self._tokens(example.text)])
        if surplus >= text:
            needed = (self.max_length or 0) + surplus - text
            raise QzoError(
                f"max_length={self.max_length} is too short for {self.task.name}: the question and answer of an "
                f"example alone take {needed} tokens; choose more, or a model with more positions"
            )

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        return tokens_of(self.tokenizer, text, special)


def tokens_of(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    """The tokens of a text, `special` ones around it too.

    Raises QzoError for a tokenizer whose settings, rules and vocabulary do not fit together.
    """
    try:
        return tokenizer.encode(text, add_special_tokens=special, verbose=False)
    except BaseException as error:  # the libraries raise many kinds
        if not is_failure(error):
            raise
        raise QzoError(f"the tokenizer cannot encode {text[:40]!r}: {one_line(error)}; copy its files again") from error


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a tokenizer puts in front of a text. Raises QzoError as `tokens_of`."""
    plain, special = tokens_of(tokenizer, "a"), tokens_of(tokenizer, "a", special=True)
    for count in range(len(special) - len(plain) + 1):
        if special[count : count + len(plain)] == plain:
            return special[:count]
    return []


def padded(rows: list[list[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Rows that end at the same column, and their mask; both [R, T], int64."""
    longest = max(map(len, rows))
    ids = [[pad_token_id] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def shared(prompt: Sequence[int], whole: Iterable[Sequence[int]]) -> int:
    """Number of leading tokens that a prompt and all its continuations have in common."""
    count = len(prompt)
    for tokens in whole:
        differs = (n for n, (a, b) in enumerate(zip(prompt[:count], tokens, strict=False)) if a != b)
        count = min(next(differs, count), len(tokens))
    return count
