"""`bench compare`: two sets of records, and whether memory grew more than allowed."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.ledger.sizes import UNITS
from bench.records.compare import Comparison, Row, compare
from bench.records.files import load_cells
from bench.records.thresholds import DEFAULT_FAIL, Threshold
from qzo.errors import QzoError


def run(baseline: str | Path, current: str | Path, fail_specs: Sequence[str] = ()) -> int:
    """Compare two paths and print the table; `fail_specs` are as for `Threshold.parse` (none: allocated:1%).

    Returns:
        0 passed, 1 regressed, 2 an error, which is told on stderr in one line.
    """
    try:
        fail = [Threshold.parse(spec) for spec in fail_specs] or list(DEFAULT_FAIL)
        before, now = load_cells(baseline), load_cells(current)
        comparison = compare(before, now, fail)
    except QzoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(comparison))
    if comparison.versions:
        print(f"\nversions: {'; '.join(comparison.versions)}")
    cells = len(before | now)
    failed = len({row.method for row in comparison.failures})
    gates = ", ".join(map(str, fail))
    print(f"\nFAILED: {failed} of {cells} cells ({gates})" if failed else f"\npassed: {cells} cells ({gates})")
    return 1 if failed else 0


def format_table(comparison: Comparison) -> str:
    """The rows for people."""
    lines = []
    for row in comparison.rows:
        before, now = (_show(row.metric, value) for value in (row.baseline, row.current))
        lines.append((row.method, row.metric, before, now, _change(row), row.verdict))
    table: str = tabulate(
        lines,
        headers=("method", "metric", "baseline", "current", "change", "verdict"),
        colalign=("left", "left", "right", "right", "right", "left"),
        disable_numparse=True,
    )
    return table


def _change(row: Row) -> str:
    if not _is_amount(row.baseline) or not _is_amount(row.current) or row.metric.startswith("case."):
        return ""
    change = row.current - row.baseline
    sign = "-" if change < 0 else "+"
    percent = f" ({change / row.baseline:+.2%})" if row.baseline else ""
    return sign + _show(row.metric, abs(change)) + percent if change else "0"


def _show(metric: str, value: Any) -> str:
    if value is None:
        return "n/a"
    if not _is_amount(value) or metric.startswith("case."):
        return value if isinstance(value, str) else json.dumps(value)
    if metric == "step_seconds":
        return f"{value:.3f} s"
    for unit in ("GiB", "MiB"):
        if value >= UNITS[unit]:
            return f"{value / UNITS[unit]:.2f} {unit}"
    return f"{value} B"


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
