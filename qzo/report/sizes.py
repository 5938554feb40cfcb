"""Bytes, seconds and scores as people read them."""

from __future__ import annotations

import math
from datetime import timedelta

GIB, MIB = 2**30, 2**20


def size(nbytes: int | None) -> str:
    """In GiB from one on, else in MiB."""
    if nbytes is None:
        return "–"
    return f"{nbytes / GIB:,.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:,.1f} MiB"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds; of less than ten seconds the tenths."""
    return f"{seconds:.1f} s" if seconds < 10 else str(timedelta(seconds=round(seconds)))


def score(value: float | None, percent: bool) -> str:
    """A score; "–" where it is not known."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{100 * value:.1f} %" if percent else f"{value:,.4f}".replace("-", "−")


def number(value: float) -> str:
    """A number in as many digits as tell something."""
    return f"{value:.6g}".replace("-", "−") if math.isfinite(value) else "–"
