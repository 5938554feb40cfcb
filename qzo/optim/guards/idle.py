"""An lr that is too small for any run, foreseen from the first steps without knowing how many there will be."""

from __future__ import annotations

import math
import warnings
from statistics import fmean
from typing import Any

FIRST = 50  # steps that are averaged over
HORIZON = 20_000  # steps, of the paper's runs; few take more
LEAST = 0.01  # of the loss, and of one of 1 where it is larger: what shows after so many steps
Applied = tuple[tuple[float, ...], ...]


class Idle:
    """Watches the first steps of an optimizer, and warns once of an lr with which they lead nowhere.

    To first order a step along -d' z lowers the loss by lr d d' in the mean, and d² is |g|² and what the batch adds to
    it: so this is the most that a step can do. An lr that rises (warm-up) does not tell what it will be, one that falls
    is taken as it was at first. Steps without any d tell nothing; momentum and Adam are left alone.
    """

    def __init__(self) -> None:
        self._lrs: list[float] = []  # of each group, at the first step
        self._lowered: list[float] = []
        self._losses: list[float] = []
        self._over = False

    def after(self, groups: list[dict[str, Any]], d: tuple[float, ...], applied: Applied, loss: float) -> bool:
        """Whether it warned, after a step by d' of each group, measured as `d` of the first one, which saw a loss."""
        lrs = [abs(float(group["lr"])) for group in groups]
        self._lrs = self._lrs or lrs
        is_plain = not any(group.get("momentum") or group.get("betas") is not None for group in groups)
        self._over |= not is_plain or len(lrs) != len(self._lrs) or any(map(float.__gt__, lrs, self._lrs))
        if self._over:
            return False
        weights = [lr * groups[0]["eps"] / group["eps"] for lr, group in zip(self._lrs, groups, strict=True)]
        by_direction = zip(d, *applied, strict=True)
        rates = [abs(own) * sum(map(float.__mul__, weights, map(abs, others))) for own, *others in by_direction]
        self._lowered.append(fmean(rates))
        self._losses.append(loss)
        self._over = len(self._lowered) >= FIRST
        most, size = HORIZON * fmean(self._lowered), abs(fmean(self._losses))
        if not self._over or not 0 < most < LEAST * min(1.0, size) or not math.isfinite(size):
            return False
        lr = max(self._lrs)
        warnings.warn(
            f"with lr {lr:g} even {HORIZON:,} steps lower the loss, {size:.3g} now, by {most:.1g} at the most (steps x "
            f"lr x d², d² of the first {FIRST}): unless it is at its minimum already, nothing is learned; give an lr "
            f"of about {lr / most:.0e}, or {10 * lr / most:.0e} for {HORIZON // 10:,} steps",
            stacklevel=4,
        )
        return True
