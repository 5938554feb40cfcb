"""Where the memory goes: the bytes of each role at the peak, and what the process holds on top."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from reports.records import CPU, ROLES, RSS_NOTE, Record, is_ok, label_of
from reports.tables.sizes import NOT_KNOWN, unit_for
from reports.tables.table import Table

REASON_WIDTH = 90


def roles_table(records: Sequence[Record]) -> Table:
    """One row a method: status, bytes by role, and their sum, peak allocated; a failed cell shows its reason."""
    unit = unit_for(records)
    failed = not all(map(is_ok, records))
    rows = []
    for record in records:
        sizes = [record["at_peak"][role] for role in ROLES] if is_ok(record) else [None] * len(ROLES)
        reason = "" if is_ok(record) else textwrap.shorten(record["message"] or "no reason given", REASON_WIDTH)
        cells = [unit.show(nbytes) for nbytes in (*sizes, record["peak"]["allocated"])]
        rows.append([label_of(record), record["status"], *cells, *([reason] if failed else [])])
    return Table(
        f"Breakdown at the peak, {unit.name}",
        ["method", "status", *ROLES, "allocated", *(["reason"] if failed else [])],
        rows,
        ["The roles add up to allocated, to the byte."],
        text_columns=2,
    )


def totals_table(records: Sequence[Record]) -> Table:
    """One row a method: allocated, reserved, process, floor, how far the peak lies above it, and seconds a step."""
    unit = unit_for(records)
    rows = []
    for record in records:
        peak, floor, seconds = record["peak"], record["floor"], record["step_seconds"]
        above = f"{peak['allocated'] / floor:.2f}" if peak["allocated"] is not None and floor else NOT_KNOWN
        sizes = [unit.show(nbytes) for nbytes in (peak["allocated"], peak["reserved"], peak["process"], floor)]
        step = NOT_KNOWN if seconds is None else f"{seconds:.3f}"
        rows.append([label_of(record), record["status"], record["world"], *sizes, above, step])
    notes = [
        "Allocated: what tensors take. Reserved: what the caching allocator holds. Process: what the driver shows for "
        "the process. Floor: codes, scales and unquantized weights.",
    ]
    if any(record["world"] == CPU for record in records):
        notes.append(RSS_NOTE)
    headers = ["method", "status", "world", "allocated", "reserved", "process", "floor", "peak/floor", "s/step"]
    return Table(f"Peak, {unit.name}", headers, rows, notes, text_columns=3)
