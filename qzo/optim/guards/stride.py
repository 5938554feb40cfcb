"""How far a step moves the scales, against the scales themselves."""

from __future__ import annotations

import math
import warnings
from typing import Any

# A step that moves scales by a tenth of themselves, along a direction drawn at random, is no small step: SmolLM2-135M
# goes from loss 5.4 to 16 in twelve of 0.2 (torchao int8, lr 1e-5, C 100). The best known settings are below 0.09, with
# few layers and lr that falls; for all layers, one direction and batches of 2 texts 0.01 holds and 0.03 does not.
# Models with few scales bear more: of 18,432 the best lr tried begins with 0.09 and goes on with as much. So it is told
# only where the loss has risen too, or where the steps are longer than the scales themselves.
TOO_FAR = 0.1
SOUND = 0.01
MANY = 3  # in a row: one steep batch is no trend
RISEN = 0.1  # of the highest loss before


class Stride:
    """Watches the steps of one parameter group, and warns once of an lr that is too large for its scales."""

    def __init__(self, typical: float) -> None:
        """Of scales of this size; 1 for relative amounts, 0 where it is not known and nothing is told."""
        self.typical, self._count, self._lr, self._share = typical, 0, 0.0, 0.0
        self._highest, self._told = -math.inf, False  # of the losses up to the first of these steps

    def after(self, group: dict[str, Any], applied: tuple[float, ...], loss: float, step: int) -> bool:
        """Whether it warned, after a step by these d', one a direction, which saw this loss.

        Momentum and Adam make steps of other lengths, and are left alone.
        """
        if not self.typical or self._told or group.get("momentum") or group.get("betas") is not None:
            return False
        share = abs(group["lr"]) * math.hypot(*applied) / max(1, len(applied)) / self.typical  # rms of lr d' z
        if not self._count:  # the next ones are measured on a model that this one may have wrecked
            self._highest = max(self._highest, loss)
            self._lr, self._share = abs(group["lr"]), share
        self._count = self._count + 1 if share > TOO_FAR else 0
        has_risen = loss > self._highest + RISEN * abs(self._highest)
        self._told = self._count >= MANY and (has_risen or self._share > 1)
        if self._told:
            warnings.warn(self._notice(step, share, loss, bool(group.get("relative"))), stacklevel=4)
        return self._told

    def _notice(self, step: int, share: float, loss: float, relative: bool) -> str:
        amounts = "" if relative else ", or relative amounts, relative=True with eps=1e-2 and lr=1e-3"
        return (
            f"{self._count} steps in a row, up to step {step}, moved the scales by more than {TOO_FAR:.0%} of "
            f"themselves, the last one by {share:.0%} (lr x |d'|, against "
            f"{'1' if relative else f'their median of {self.typical:.1e}'}), and the loss went from "
            f"{self._highest:.3g} to {loss:.3g}: lr {self._lr:g} is too large; begin anew with an lr of about "
            f"{self._lr * SOUND / self._share:.0e}{amounts}"
        )
