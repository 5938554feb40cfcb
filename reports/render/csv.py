"""tables.csv: one row a method, every field of its record, raw integer bytes; an unknown value is an empty cell."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from reports.records import ROLES, Record


def to_csv(records: Sequence[Record]) -> str:
    """The records as CSV; a column that only some methods have (a phase, a component) is empty for the others."""
    rows = [_flatten(record) for record in records]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _flatten(record: Record) -> dict[str, Any]:
    at_peak = record["at_peak"] or {}
    losses = record.get("losses")
    return {
        "method": record["case"]["method"],
        "status": record["status"],
        "message": record["message"],
        "world": record["world"],
        **{name: _cell(value) for name, value in record["case"].items() if name != "method"},
        **{f"parameters_{name}": value for name, value in record["parameters"].items()},
        **{f"peak_{kind}_bytes": nbytes for kind, nbytes in record["peak"].items()},
        **{f"at_peak_{role}_bytes": at_peak.get(role) for role in ROLES},
        "floor_bytes": record["floor"],
        "step_seconds": record["step_seconds"],
        **{f"phase_{phase['name']}_bytes": phase["peak_allocated"] for phase in record["phases"]},
        **{f"component_{name}_bytes": nbytes for name, nbytes in (record.get("components") or {}).items()},
        "losses": None if losses is None else json.dumps(losses),
        "notes": "; ".join(record.get("notes") or []),
        **{f"environment_{name}": _cell(value) for name, value in record["environment"].items()},
    }


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list, bool)) else value
