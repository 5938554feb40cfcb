"""Prompts that a model is to answer, with the columns that a reward function gets beside them, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from qzo.errors import QzoError, is_failure
from qzo.files.folder import one_line
from qzo.tasks.encoding import Batch, padded, start_tokens, tokens_of
from qzo.tasks.own.sequence import Text, text_or_messages
from qzo.tasks.source.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A prompt, text or messages, with the other fields of its row as JSON, and its place, for errors."""

    where: str
    prompt: Text
    columns: str = "{}"
    label = 0
    group = ""

    def key(self) -> str:
        """The letters and digits in lower case: prompts that differ in nothing else count as the same."""
        text = self.prompt if isinstance(self.prompt, str) else "".join(turn.content for turn in self.prompt)
        return "".join(letter for letter in text.lower() if letter.isalnum()) or self.where

    @property
    def fields(self) -> dict[str, Any]:
        """Name -> value of the other fields."""
        return dict(json.loads(self.columns))

    @property
    def given(self) -> Any:
        """The prompt as a reward function gets it: text, or a list of messages."""
        return self.prompt if isinstance(self.prompt, str) else [turn.fields() for turn in self.prompt]


def prompt_row(row: Row) -> Prompt:
    """Of a row with a prompt. Raises QzoError for an empty one, and one that ends with an answer."""
    prompt = text_or_messages(row, "prompt")
    if not prompt:
        raise QzoError(f'{row.where}: "prompt" is empty; write one, or remove the row')
    if not isinstance(prompt, str) and prompt[-1].role == "assistant":
        raise QzoError(
            f"{row.where}: the last message of the prompt is the assistant's, so there is nothing to answer: remove "
            "that message"
        )
    rest = {name: value for name, value in row.fields.items() if name != "prompt"}
    return Prompt(row.where, prompt, json.dumps(rest, default=str))


@dataclass(frozen=True)
class Asked:
    """A prompt and its tokens; `label` is for batches, all alike."""

    prompt: Prompt
    ids: tuple[int, ...]
    label = 0


@dataclass(frozen=True)
class RewardBatch:
    """Prompts to be answered: their tokens, padded on the left, what they are of, and the seed of what is drawn."""

    tokens: Batch
    prompts: tuple[Prompt, ...]
    seed: int = 0

    def to(self, device: torch.device | str) -> RewardBatch:
        """The same on another device."""
        return replace(self, tokens=self.tokens.to(device))

    def seeded(self, seed: int) -> RewardBatch:
        """The same prompts with another seed."""
        return replace(self, seed=seed)


class PromptEncoder:
    """Tokens of prompts: of text as it is, of messages in the words of the tokenizer's chat template.

    A prompt that leaves no room for `room` tokens within `max_length` is cut at its beginning; `cut` counts those.

    Raises QzoError, where a prompt is encoded: a tokenizer without a chat template where there are messages, a template
    that refuses them (with the row), a prompt without tokens, a `max_length` of which an answer leaves nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, room: int, max_length: int | None = None) -> None:
        self.tokenizer, self.room, self.max_length = tokenizer, room, max_length
        self._start = start_tokens(tokenizer)
        self._kept: dict[Prompt, tuple[int, ...]] = {}
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.pad_token_id = int(pad or 0)

    def rows(self, prompts: Iterable[Prompt]) -> list[Asked]:
        """What batches are made of. Raises QzoError, see above."""
        most = self._most()
        return [Asked(prompt, self.encode(prompt)[-most:] if most else self.encode(prompt)) for prompt in prompts]

    def batch(self, rows: Several[Asked]) -> RewardBatch:
        """Prompts that end at the same column."""
        ids, mask = padded([list(row.ids) for row in rows], self.pad_token_id)
        tokens = Batch(ids, mask, torch.zeros(len(rows), dtype=torch.int64))
        return RewardBatch(tokens, tuple(row.prompt for row in rows))

    def cut(self, prompts: Iterable[Prompt]) -> int:
        """Number of prompts that are cut."""
        most = self._most()
        return 0 if most is None else sum(len(self.encode(prompt)) > most for prompt in prompts)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The tokens of a prompt, whole. Raises QzoError, see above."""
        if prompt not in self._kept:
            self._kept[prompt] = tuple(self._encode(prompt))
            if not self._kept[prompt]:
                raise QzoError(
                    f"{prompt.where}: the prompt has no tokens, so there is nothing to go on from; write more, or "
                    "remove the row"
                )
        return self._kept[prompt]

    def _most(self) -> int | None:
        if self.max_length is None:
            return None
        if self.max_length <= self.room:
            raise QzoError(
                f"max_length={self.max_length} leaves nothing for a prompt before {self.room} new tokens; choose more, "
                "or fewer new tokens"
            )
        return self.max_length - self.room

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt.prompt, str):
            return [*self._start, *tokens_of(self.tokenizer, prompt.prompt)]
        if not self.tokenizer.chat_template:
            raise QzoError(
                f"{prompt.where} is a conversation, and this tokenizer has no chat template; give prompts of text"
            )
        try:
            text = self.tokenizer.apply_chat_template(prompt.given, tokenize=False, add_generation_prompt=True)
        except BaseException as error:  # templates are programs, and raise what they like
            if not is_failure(error):
                raise
            raise QzoError(
                f"{prompt.where}: the chat template refuses these messages: {one_line(error)}; change their roles or "
                "order"
            ) from error
        return tokens_of(self.tokenizer, str(text))
