"""What a learning rate can reach within a run, foreseen from its first steps: nothing, something, or a wreck."""

from __future__ import annotations

import math
from statistics import fmean

FIRST = 8  # steps that d² is averaged over
LEAST = 0.01  # of the loss: a run that cannot lower it by more than this learns nothing that a validation would show


class Prospect:
    """Tells once, after the first steps of a zeroth-order run, of an lr with which it will not learn.

    A step along -d z changes the loss by -lr d² in the mean, to first order, where d = g·z; and d² is |g|² and what the
    batch adds to it. So `steps` steps lower the loss by lr d² each at most. That holds for absolute and relative
    amounts and for scales of every format: d is measured in the units that lr is given in. Only for plain steps by lr
    and d, along one direction or the mean of several.

    Steps that are too large wreck the model, whose d then are others: the lr named is of those up to the first step
    that should have lowered the loss by more than all of it.
    """

    def __init__(self, steps: int, clip_threshold: float = math.inf) -> None:
        """Of a run of so many steps, from its first one on."""
        self.steps, self.clip_threshold = steps, clip_threshold
        self._squares: list[float] = []  # d², as far as it is applied
        self._sound: int | None = None  # how many of them come before a wreck; None where there is none

    def after(self, loss: float, d: float, lr: float) -> str | None:
        """What to tell after a step with this loss, d and lr; None for nothing."""
        if len(self._squares) >= FIRST or not math.isfinite(d) or not math.isfinite(loss):
            return None
        self._squares.append(abs(d) * min(abs(d), self.clip_threshold))
        square = fmean(self._squares)
        if self._sound is None and lr * self._squares[-1] > max(loss, LEAST):
            self._sound = len(self._squares)
        if len(self._squares) < FIRST or not square:
            return None
        most, suited = self.steps * lr * square, f"{1 / (self.steps * fmean(self._squares[: self._sound])):.0e}"
        if most < LEAST:
            return (
                f"with lr {lr:g} these {self.steps:,} steps lower the loss by {most:.1g} at the most (steps x lr x d², "
                f"d² of the first {FIRST}): nothing would be learned; give an lr of about {suited}, or more"
            )
        if lr * square > max(loss, LEAST):
            return (
                f"lr {lr:g} is too large: to first order each step would lower the loss, which is {loss:.3g}, by "
                f"{lr * square:.2g} (lr x d², d² of the first {FIRST}), so it will diverge; give an lr of about "
                f"{suited}, to begin with"
            )
        return None
