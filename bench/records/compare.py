"""The memory gate: what moved between two sets of records, and whether more than allowed.

Each set is a results folder, one record file, or a file with `{"records": [...]}` (`summary.json`, a committed
baseline). Cells are matched by method. Thresholds are written as in pytest-benchmark: `allocated:1%`, `process:100MiB`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.records.record import STATUSES, Record
from bench.records.summary import in_order
from bench.records.thresholds import DEFAULT_FAIL, PHASE, Threshold
from qzo.errors import QzoError

VERSIONS = ("torch", "transformers", "python")


@dataclass(frozen=True)
class Row:
    """One line of the table: a metric of a cell, or what is wrong with the cell as a whole."""

    method: str
    metric: str
    baseline: Any
    current: Any
    verdict: str
    failed: bool = False


@dataclass(frozen=True)
class Comparison:
    """All rows, and the library versions that changed."""

    rows: tuple[Row, ...]
    versions: tuple[str, ...] = ()

    @property
    def failures(self) -> list[Row]:
        """The rows that make the gate fail; none when it passed."""
        return [row for row in self.rows if row.failed]


def compare(
    baseline: Mapping[str, Record], current: Mapping[str, Record], fail: Sequence[Threshold] = DEFAULT_FAIL
) -> Comparison:
    """Compare cell by cell.

    A row fails when a metric in `fail` grew over its limit or became unknown, when a cell of the baseline is missing,
    when its status got worse (ok, then oom, unsupported, error), and when world or case differ, for then there is
    nothing to compare. Cells only in `current` are listed.

    Args:
        baseline, current: method -> record.
        fail: at least one threshold; all of them must hold.

    Raises:
        QzoError: a threshold names a phase that no record has.
    """
    _check_phases(fail, [*baseline.values(), *current.values()])
    rows: list[Row] = []
    for method in in_order({**baseline, **current}):
        if method not in current:
            rows.append(Row(method, "status", baseline[method]["status"], None, "MISSING", failed=True))
        elif method not in baseline:
            rows.append(Row(method, "status", None, current[method]["status"], "new"))
        else:
            rows += _compare_cell(method, baseline[method], current[method], fail)
    return Comparison(tuple(rows), _changed_versions(baseline, current))


def _check_phases(fail: Sequence[Threshold], records: Sequence[Record]) -> None:
    known = {PHASE + phase["name"] for record in records for phase in record["phases"]}
    for threshold in fail:
        if threshold.metric.startswith(PHASE) and threshold.metric not in known:
            choices = ", ".join(sorted(known)) or "none"
            raise QzoError(f"--fail {threshold}: no record has the phase; the records have {choices}: choose one")


def _compare_cell(method: str, baseline: Record, current: Record, fail: Sequence[Threshold]) -> list[Row]:
    rows = []
    if baseline["world"] != current["world"]:
        rows.append(Row(method, "world", baseline["world"], current["world"], "NOT COMPARABLE", failed=True))
    for key, old in baseline["case"].items():
        new = current["case"].get(key)
        # A cell that failed early does not know its dtype or optimizer; that is no other case.
        unknown = (old is None and baseline["status"] != "ok") or (new is None and current["status"] != "ok")
        if old != new and not unknown:
            rows.append(Row(method, f"case.{key}", old, new, "NOT COMPARABLE", failed=True))
    before, now = baseline["status"], current["status"]
    if before != now:
        worse = STATUSES.index(now) > STATUSES.index(before)
        verdict = f"REGRESSED: {textwrap.shorten(current['message'], 100)}" if worse else "improved"
        rows.append(Row(method, "status", before, now, verdict, failed=worse))
    elif now != "ok":
        rows.append(Row(method, "status", before, now, "same"))
    if rows:
        return rows
    return _compare_metrics(method, _values(baseline), _values(current), fail)


def _compare_metrics(
    method: str, baseline: Mapping[str, Any], current: Mapping[str, Any], fail: Sequence[Threshold]
) -> list[Row]:
    """The gated metrics, and whatever else moved."""
    rows = []
    for metric in {**baseline, **current}:
        before, now = baseline.get(metric), current.get(metric)
        gates = [threshold for threshold in fail if threshold.metric == metric]
        if not gates and before == now:
            continue
        verdict, failed = _judge(before, now, gates)
        rows.append(Row(method, metric, before, now, verdict, failed))
    return rows


def _judge(before: Any, now: Any, gates: Sequence[Threshold]) -> tuple[str, bool]:
    """The verdict on a metric, and whether it fails."""
    if before is None:
        return ("n/a" if now is None else "new"), False
    if now is None:
        return ("REGRESSED: no longer known", True) if gates else ("no longer known, not gated", False)
    if now <= before:
        return ("same" if now == before else "improved"), False
    broken = [str(gate) for gate in gates if gate.exceeded(before, now)]
    if broken:
        return f"REGRESSED: over {', '.join(broken)}", True
    return (f"within {', '.join(map(str, gates))}" if gates else "larger, not gated"), False


def _values(record: Record) -> dict[str, Any]:
    """Metric -> value of an ok record."""
    return {
        **record["peak"],
        "floor": record["floor"],
        "step_seconds": record["step_seconds"],
        **record["at_peak"],
        **{PHASE + phase["name"]: phase["peak_allocated"] for phase in record["phases"]},
    }


def _changed_versions(baseline: Mapping[str, Record], current: Mapping[str, Record]) -> tuple[str, ...]:
    changes = set()
    for method in baseline.keys() & current.keys():
        before, now = baseline[method]["environment"], current[method]["environment"]
        changes |= {f"{name} {before[name]} -> {now[name]}" for name in VERSIONS if before[name] != now[name]}
    return tuple(sorted(changes))
