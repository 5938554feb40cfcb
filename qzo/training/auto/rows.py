"""How many rows make the batch of a step where nobody says it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

TOKENS = 512  # of a step's batch: about a second of a 135M model on one core
FEWEST, MOST = 4, 16


def chosen_rows(lengths: Sequence[int], chooses: bool) -> int:
    """Rows a step, of data whose rows have so many tokens: 16 of short ones, 4 of long ones.

    What a step learns goes with |g|² / (|g|² + σ² / B), σ² the variance of the gradient from row to row, what it costs
    with B. At 16 rows the share is 0.5 to 0.9 already, so more rows cost more than they bring, and fewer bring more for
    the same tokens; see reports/studies/accuracy/settings.md. Where answers are chosen among the words of labels
    (`chooses`), 16 always: of fewer, the labels would differ from batch to batch.
    """
    if chooses:
        return MOST
    return max(FEWEST, min(MOST, round(TOKENS / max(1.0, median(lengths)))))
