"""Bytes for people: GiB or MiB in our tables, GB (1e9 bytes) only beside the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reports.records import Record

NOT_KNOWN = "n/a"
GIB = 1 << 30


@dataclass(frozen=True)
class Unit:
    """One unit for all sizes of a table."""

    name: str
    nbytes: int

    def show(self, nbytes: int | None) -> str:
        """Two decimals; "n/a" where unknown, "0" only for exactly nothing."""
        if nbytes is None:
            return NOT_KNOWN
        if 0 < nbytes < self.nbytes / 200:
            return "<0.01"
        return f"{nbytes / self.nbytes:,.2f}" if nbytes else "0"


MEBI = Unit("MiB", 1 << 20)
GIBI = Unit("GiB", GIB)
GIGA = Unit("GB", 10**9)


def unit_for(records: Sequence[Record]) -> Unit:
    """GiB, or MiB where a method's peak lies under 1 GiB."""
    peaks = [record["peak"]["allocated"] for record in records if record["peak"]["allocated"] is not None]
    return MEBI if peaks and min(peaks) < GIB else GIBI
