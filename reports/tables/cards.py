"""What fits on which card."""

from __future__ import annotations

from collections.abc import Sequence

from reports.records import CPU, Record, is_ok, label_of, needed_bytes
from reports.tables.sizes import GIB, GIBI, NOT_KNOWN
from reports.tables.table import Table

CARDS_GIB = (8, 12, 16, 24, 40, 48, 80)
DAGGER = "†"


def smallest_card(nbytes: int) -> int | None:
    """GiB of the smallest card that holds `nbytes`; None when the largest does not."""
    return next((card for card in CARDS_GIB if nbytes <= card * GIB), None)


def verdict(nbytes: int, card: int) -> str:
    """ "fits, 4.1 GiB left" or "needs 2.3 GiB more"; rounded so that it never promises more than there is."""
    tenths = (card * GIB - nbytes) * 10 // GIB
    return f"fits, {tenths / 10:.1f} GiB left" if tenths >= 0 else f"needs {-tenths / 10:.1f} GiB more"


def cards_table(records: Sequence[Record]) -> Table:
    """One row a method: bytes needed, the smallest card that holds them, and the room left or missing on each."""
    rows = []
    for record in records:
        nbytes, kind = needed_bytes(record)
        if nbytes is None:
            rows.append([label_of(record), *[NOT_KNOWN] * (2 + len(CARDS_GIB))])
            continue
        card = smallest_card(nbytes)
        needs = GIBI.show(nbytes) + (DAGGER if kind == "allocated" else "")
        smallest = f"{card} GiB" if card else f"over {CARDS_GIB[-1]} GiB"
        rows.append([label_of(record), needs, smallest, *(verdict(nbytes, card) for card in CARDS_GIB)])
    headers = ["method", "needs, GiB", "smallest card", *(f"{card} GiB" for card in CARDS_GIB)]
    return Table("What fits", headers, rows, _notes(records))


def _notes(records: Sequence[Record]) -> list[str]:
    notes = ["By process bytes against the card's nominal memory, of which a display or another process takes a share."]
    if any(is_ok(record) and needed_bytes(record)[1] == "allocated" for record in records):
        notes.append(f"{DAGGER} process bytes unknown: allocated bytes instead, without slack and CUDA context.")
    if any(record["world"] == CPU for record in records):
        notes.append(
            f"{CPU}: process bytes are the process's peak RSS on the CPU, Python and libraries included; "
            "a GPU holds less of these, and a CUDA context besides."
        )
    return notes
