"""An lr that proves too large in the course of a run: the losses tell it, and it is halved."""

from __future__ import annotations

import math
from statistics import fmean, variance

WINDOW = 8  # steps
SIGMA = 4.0  # standard errors that a rise must exceed, so that an unlucky window is none
LEAST = 0.02  # of the loss


class Guard:
    """Watches the losses of a run in windows of eight steps, and halves the lr where they have risen.

    A function of the losses alone, in their order: fed with those of a run's file it stands where it stood.
    """

    def __init__(self) -> None:
        self.factor = 1.0  # of the lr
        self._window: list[float] = []
        self._best: tuple[float, float] | None = None  # mean and variance of the mean, of the lowest window

    def after(self, loss: float) -> str | None:
        """Take note of a step's loss; returns what to tell where the losses have risen since the lowest window."""
        if math.isfinite(loss):
            self._window.append(loss)
        if len(self._window) < WINDOW:
            return None
        mean, spread = fmean(self._window), variance(self._window) / WINDOW
        self._window = []
        if self._best is None or mean < self._best[0]:
            self._best = (mean, spread)
            return None
        lowest, before = self._best
        if mean - lowest <= max(SIGMA * math.sqrt(spread + before), LEAST * abs(lowest)):
            return None
        self.factor /= 2
        self._best = (mean, spread)  # from here on; the best state is kept by the validations
        return f"the loss has risen from {lowest:.3g} to {mean:.3g} (means of {WINDOW} steps)"
