"""Round numbers for an axis, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most `most` round numbers between two limits, and one more: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def whole_ticks(end: int, most: int = 5) -> list[int]:
    """Such numbers from 0 to `end` that are whole."""
    return sorted({round(tick) for tick in ticks(0, end, most) if abs(tick - round(tick)) < 1e-6})


def labels(values: Sequence[float], percent: bool = False) -> list[str]:
    """The numbers of an axis, with the digits that tell them apart and no more."""
    factor, unit = (100.0, " %") if percent else (1.0, "")
    shown = [factor * value for value in values]
    step = min((abs(b - a) for a, b in pairwise(shown)), default=0.0)
    largest = max(map(abs, shown), default=0.0)
    if largest >= 1e6 or 0 < largest < 1e-3:
        return [f"{_short(value)}{unit}" for value in shown]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 3
    return [f"{value + 0.0:,.{decimals}f}{unit}".replace("-", "−") for value in shown]


def _short(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    if not value:
        return "0"
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
