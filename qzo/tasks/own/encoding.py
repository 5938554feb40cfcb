"""From sequences to the tensors of a batch: tokens, and which of them are learnt."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qzo.errors import QzoError, is_failure
from qzo.files.folder import one_line
from qzo.models.loss import IGNORED
from qzo.tasks.encoding import Batch, padded, shared, start_tokens, tokens_of
from qzo.tasks.own.sequence import Message, Sequence, Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """Tokens of a row, [T]; `learnt` tells of each whether a loss counts. `label` is for batches, all alike."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]
    label = 0

    @property
    def begins(self) -> int:
        """Column of the first token that is learnt; T where none is."""
        return next((column for column, learnt in enumerate(self.learnt) if learnt), len(self.ids))

    @property
    def last_turn(self) -> int:
        """Column where the last run of learnt tokens begins: what stands before it is the prompt of the last answer."""
        column = len(self.ids)
        while column and not self.learnt[column - 1]:
            column -= 1
        while column and self.learnt[column - 1]:
            column -= 1
        return column


Row = tuple[Tokens, ...]  # of one example: one answer, or the better and the worse


class SequenceEncoder:
    """Makes batches of sequences.

    Text ends with the end-of-sequence token, which is learnt; of a conversation, the tokenizer's chat template writes
    the turns, and what it adds for an assistant's turn, up to its end, is learnt. A row that would take more than
    `max_length` tokens is cut: a prompt of text at its beginning, all else at its end. `cut` counts those, and `rows`
    leaves out, and counts, what then has nothing to learn.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens a row may have; None, any number.
        packed: rows of exactly `max_length` tokens are cut from all texts one behind the other.
        whole: everything but a first token is learnt, prompts and the turns of users too; not of pairs.

    Raises:
        QzoError: where a sequence is encoded: a tokenizer without a chat template where there are messages, a template
            that refuses them (with the row), a damaged tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        packed: bool = False,
        whole: bool = False,
    ) -> None:
        self.tokenizer, self.max_length, self.packed, self.whole = tokenizer, max_length, packed, whole
        self.left_out = 0
        self._start = start_tokens(tokenizer)
        self._end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        self._kept: dict[Sequence, Row] = {}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_token_id = int(pad or 0)

    def rows(self, examples: Iterable[Sequence]) -> list[Row]:
        """What batches are made of: a row an example, or blocks of all texts where they are packed. Raises QzoError."""
        whole = [self.encode(example) for example in examples]
        if self.packed and self.max_length is not None:
            return _blocks(whole, self.max_length)
        found = [tuple(_cut(tokens, self.max_length) for tokens in row) for row in whole]
        useful = [row for row in found if all(any(tokens.learnt) for tokens in row)]
        self.left_out += len(found) - len(useful)
        return useful

    def cut(self, examples: Iterable[Sequence]) -> int:
        """Number of examples that do not fit into a row; none where texts are packed."""
        most = self.max_length
        if most is None or self.packed:
            return 0
        return sum(any(len(tokens.ids) > most for tokens in self.encode(example)) for example in examples)

    def batch(self, rows: Several[Row]) -> Batch:
        """B rows, or 2 B of pairs, the better above the worse; labels [B] are 0."""
        lines = [tokens for row in rows for tokens in row]
        columns = max(len(tokens.ids) - tokens.begins for tokens in lines)
        targets = []
        for tokens in lines:
            labels = [i if learnt else IGNORED for i, learnt in zip(tokens.ids, tokens.learnt, strict=True)]
            targets.append([IGNORED] * max(0, columns - len(labels)) + labels[-columns:])
        ids, mask = padded([list(tokens.ids) for tokens in lines], self.pad_token_id)
        return Batch(ids, mask, torch.zeros(len(rows), dtype=torch.int64), targets=torch.tensor(targets))

    def prompts(self, rows: Several[Row]) -> Batch:
        """What stands before the last answer of each row, for the model to go on from."""
        ids, mask = padded([list(row[0].ids[: row[0].last_turn]) for row in rows], self.pad_token_id)
        return Batch(ids, mask, torch.zeros(len(rows), dtype=torch.int64))

    def last_answer(self, row: Row) -> str:
        """The text of a row's last answer, without special tokens."""
        ids = [token for token, learnt in zip(row[0].ids, row[0].learnt, strict=True)][row[0].last_turn :]
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    @staticmethod
    def length(row: Row) -> int:
        """Tokens of the longest of a row, to sort by."""
        return max(len(tokens.ids) for tokens in row)

    def encode(self, example: Sequence) -> Row:
        """The tokens of an example, whole. Raises QzoError, see above."""
        if example not in self._kept:
            self._kept[example] = tuple(self._encode(example, answer) for answer in example.answers)
        return self._kept[example]

    def _encode(self, example: Sequence, answer: Text) -> Tokens:
        whole = self.whole and len(example.answers) == 1
        if isinstance(answer, str) and isinstance(example.prompt, str):
            return self._text(example.prompt, answer, whole)
        assert not isinstance(answer, str) and not isinstance(example.prompt, str)
        if not whole:
            return self._turns(example.where, example.prompt, answer)
        ids = tokens_of(self.tokenizer, self._render(example.where, [*example.prompt, *answer], asks=False))
        return Tokens(tuple(ids), tuple(column > 0 for column in range(len(ids))))

    def _text(self, prompt: str, answer: str, is_whole: bool) -> Tokens:
        """Encoded as one text: where a tokenizer merges over the border, the answer has it. Raises QzoError."""
        text = tokens_of(self.tokenizer, prompt + answer)
        before = 0 if is_whole or not prompt else shared(tokens_of(self.tokenizer, prompt), [text])
        ids = [*self._start, *text, *(self._end if text[-1:] != self._end else ())]  # a text may bring its own end
        count = len(self._start) + before
        return Tokens(tuple(ids), tuple(column >= max(1, count) for column in range(len(ids))))

    def _turns(self, where: str, prompt: tuple[Message, ...], answer: tuple[Message, ...]) -> Tokens:
        """Each turn as the template writes it behind those before it. Raises QzoError."""
        turns = [*prompt, *answer]
        ids: list[int] = []
        learnt: list[bool] = []
        done = ""
        for number, turn in enumerate(turns):
            if turn.role != "assistant":
                continue
            is_learnt = number >= len(prompt)
            for text, counts in self._written(where, turns, number, done):
                tokens = tokens_of(self.tokenizer, text)
                ids, learnt = ids + tokens, learnt + [counts and is_learnt] * len(tokens)
                done += text
        if learnt:
            learnt[0] = False
        return Tokens(tuple(ids), tuple(learnt))

    def _written(self, where: str, turns: list[Message], number: int, done: str) -> list[tuple[str, bool]]:
        """What is new with turn `number`: what stands before the assistant speaks, and what it says."""
        before = self._render(where, turns[:number], asks=True)
        after = self._render(where, turns[: number + 1], asks=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise QzoError(
                f"{where}: the chat template of this tokenizer writes earlier turns in another way once turn "
                f"{number + 1} is there, so what is to be learnt cannot be told; split the conversation into rows that "
                "end with one answer each"
            )
        return [(before[len(done) :], False), (after[len(before) :], True)]

    def _render(self, where: str, turns: list[Message], asks: bool) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise QzoError(
                "the tokenizer of this model has no chat template, by which messages are written; take a model made "
                "for chat, or rows with prompt and completion"
            )
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [turn.fields() for turn in turns], tokenize=False, add_generation_prompt=asks
            )
        except BaseException as error:  # templates are programs, and raise what they like
            if not is_failure(error):
                raise
            raise QzoError(
                f"{where}: the chat template refuses these messages: {one_line(error)}; change their roles or order"
            ) from error
        return str(text)


def _cut(tokens: Tokens, most: int | None) -> Tokens:
    """At most so many tokens: a prompt loses its beginning where all that follows it is learnt, else the end goes."""
    surplus = 0 if most is None else max(0, len(tokens.ids) - most)
    if not surplus:
        return tokens
    begins = tokens.begins
    if all(tokens.learnt[begins:]) and surplus < begins - 1:
        keep = (0, *range(1 + surplus, len(tokens.ids)))  # the first may be the beginning-of-sequence token
        return Tokens(tuple(tokens.ids[n] for n in keep), tuple(tokens.learnt[n] for n in keep))
    return Tokens(tokens.ids[:most], tokens.learnt[:most])


def _blocks(rows: Several[Row], size: int) -> list[Row]:
    """All texts one behind the other, in blocks; what is left at the end is a shorter one."""
    ids = [token for row in rows for tokens in row for token in tokens.ids]
    blocks = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [(Tokens(tuple(block), (False, *[True] * (len(block) - 1))),) for block in blocks if len(block) > 1]
