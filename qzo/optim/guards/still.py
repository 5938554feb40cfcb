"""Steps in which nothing that is done to the tensors reaches the loss."""

from __future__ import annotations

import warnings

from qzo.optim.estimator import Losses, all_finite

MANY = 10  # in a row, that are worth a warning


def count_still(count: int, losses: list[Losses], step: int) -> int:
    """Steps in a row, this one included, whose losses were all the same to the bit; warns once, of the tenth."""
    is_still = all_finite(losses) and len({loss for pair in losses for loss in pair}) == 1
    count = count + 1 if is_still else 0
    if count == MANY:
        warnings.warn(
            f"{MANY} steps in a row, up to step {step}, the loss was {losses[0][0]:g} on both sides, to the bit: the "
            "model does not compute with these tensors (it was moved or rebuilt after they were taken, or a kernel "
            "keeps a copy; qzo.check_live tells), eps is too small for their dtype, or the loss cannot move, as a "
            "reward that is the same for all texts (it needs a larger eps, more prompts, or a score with more values); "
            "so nothing is learned",
            stacklevel=5,
        )
    return count
