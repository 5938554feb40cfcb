"""How far a step moves the scales, against the scales themselves."""

from __future__ import annotations

import math
import warnings
from typing import Any

# A step that moves scales by a tenth of themselves, along a direction drawn at random, is no small step: SmolLM2-135M
# goes from loss 5.4 to 16 in twelve of 0.2 (torchao int8, lr 1e-5, C 100). The best known settings are below 0.09, with
# few layers and lr that falls; for all layers, one direction and batches of 2 texts 0.01 holds and 0.03 does not.
TOO_FAR = 0.1
SOUND = 0.01
MANY = 3  # in a row: one steep batch is no trend


class Stride:
    """Watches the steps of one parameter group, and warns once of an lr that is too large for its scales."""

    def __init__(self, typical: float) -> None:
        """Of scales of this size; 1 for relative amounts, 0 where it is not known and nothing is told."""
        self.typical, self._count, self._lr, self._share = typical, 0, 0.0, 0.0

    def after(self, group: dict[str, Any], applied: tuple[float, ...], step: int) -> bool:
        """Whether it warned, after a step by these d', one a direction.

        Momentum and Adam make steps of other lengths, and are left alone.
        """
        if not self.typical or self._count >= MANY or group.get("momentum") or group.get("betas") is not None:
            return False
        share = abs(group["lr"]) * math.hypot(*applied) / max(1, len(applied)) / self.typical  # rms of lr d' z
        if not share > TOO_FAR:
            self._count = 0
            return False
        if not self._count:  # the next ones are measured on a model that this one may have wrecked
            self._lr, self._share = abs(group["lr"]), share
        self._count += 1
        if self._count == MANY:
            warnings.warn(self._told(step, share, bool(group.get("relative"))), stacklevel=4)
        return self._count == MANY

    def _told(self, step: int, share: float, relative: bool) -> str:
        amounts = "" if relative else ", or relative amounts, relative=True with eps=1e-2 and lr=1e-3"
        return (
            f"{MANY} steps in a row, up to step {step}, moved the scales by more than {TOO_FAR:.0%} of themselves, the "
            f"last one by {share:.0%} (lr x |d'|, against {'1' if relative else f'their median of {self.typical:.1e}'}"
            f"): lr {self._lr:g} is probably too large and training diverges; begin anew with an lr of about "
            f"{self._lr * SOUND / self._share:.0e}{amounts}"
        )
