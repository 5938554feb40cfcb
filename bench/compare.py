"""The memory gate: what moved between two sets of records, and whether more than allowed.

Each set is a results folder, one record file, or a file with `{"records": [...]}` (`summary.json`, a committed
baseline). Cells are matched by method. Thresholds are written as in pytest-benchmark: `allocated:1%`, `process:100MiB`.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.record import ROLES, STATUSES, Record, in_order, load_results, read_json, validate_record
from qzo.errors import QzoError

METRICS = ("allocated", "reserved", "process", "floor", "step_seconds", *ROLES)
PHASE = "phase:"
VERSIONS = ("torch", "transformers", "python")
UNITS = {
    prefix + "B": base**power
    for base, prefixes in ((1000, ("", "K", "M", "G", "T", "P")), (1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")))
    for power, prefix in enumerate(prefixes)
}


def parse_bytes(text: str) -> int:
    """Bytes in "24 MB" (1000**2 each), "1.5GiB" (1024**3 each) or "512B".

    Raises:
        QzoError: not a number followed by one of these units.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGTP]i?B|B)\s*", text)
    if match is None:
        raise QzoError(f"{text!r} is not a size; write a number and a unit, as in 24MB, 1.5GiB or 512B")
    return int(Fraction(match[1]) * UNITS[match[2].replace("k", "K")])


@dataclass(frozen=True)
class Threshold:
    """How much a metric may grow: `limit` percent of the baseline, or `limit` bytes (seconds for `step_seconds`)."""

    metric: str
    limit: Fraction
    relative: bool = True

    def __post_init__(self) -> None:
        if self.metric not in METRICS and not (self.metric.startswith(PHASE) and self.metric != PHASE):
            raise QzoError(f"unknown metric {self.metric!r}; choose one of {', '.join(METRICS)} or {PHASE}NAME")

    @classmethod
    def parse(cls, spec: str) -> Threshold:
        """The threshold in METRIC:5%, METRIC:100MiB or step_seconds:0.2s.

        Raises:
            QzoError: unknown metric, or no such limit.
        """
        metric, colon, limit = spec.strip().rpartition(":")
        if not colon:
            raise QzoError(f"--fail {spec}: no limit; write METRIC:5% or METRIC:100MiB")
        cls(metric, Fraction(0))  # an unknown metric is told before a wrong limit
        number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|s)", limit)
        if number and (number[2] == "%" or metric == "step_seconds"):
            return cls(metric, Fraction(number[1]), relative=number[2] == "%")
        absolute = "0.2s" if metric == "step_seconds" else "100MiB"
        try:
            if metric == "step_seconds":
                raise QzoError(f"{limit!r} is not a time")
            return cls(metric, Fraction(parse_bytes(limit)), relative=False)
        except QzoError as error:
            raise QzoError(
                f"--fail {spec}: {limit!r} is not a limit; write {metric}:5% or {metric}:{absolute}"
            ) from error

    def exceeded(self, baseline: Any, current: Any) -> bool:
        """Whether the growth is over the limit; exactly at the limit it is not. From 0, any percentage is over."""
        allowed = _exact(baseline) * self.limit / 100 if self.relative else self.limit
        return _exact(current) - _exact(baseline) > allowed

    def __str__(self) -> str:
        number = f"{float(self.limit):g}"
        if self.relative:
            return f"{self.metric}:{number}%"
        return f"{self.metric}:{number}s" if self.metric == "step_seconds" else f"{self.metric}:{int(self.limit)}B"


DEFAULT_FAIL = (Threshold("allocated", Fraction(1)),)


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
            raise QzoError(f"--fail {threshold}: no record has the phase; the records have {choices}")


def _compare_cell(method: str, baseline: Record, current: Record, fail: Sequence[Threshold]) -> list[Row]:
    rows = []
    if baseline["world"] != current["world"]:
        rows.append(Row(method, "world", baseline["world"], current["world"], "NOT COMPARABLE", failed=True))
    for key, old in baseline["case"].items():
        new = current["case"][key]
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


def load_cells(path: str | Path) -> dict[str, Record]:
    """Method -> record, from a results folder, a record file, or a file with `{"records": [...]}`.

    Raises:
        QzoError: nothing there, damaged, or two records of one method; the path is named.
    """
    path = Path(path)
    if path.is_dir():
        return load_results(path)
    content = read_json(path)
    records = content["records"] if isinstance(content, dict) and "records" in content else [content]
    cells: dict[str, Record] = {}
    try:
        if not isinstance(records, list) or not records:
            raise QzoError("holds no records")
        for record in map(validate_record, records):
            method = record["case"]["method"]
            if method in cells:
                raise QzoError(f"two records of the method {method!r}; cells are matched by method")
            cells[method] = record
    except QzoError as error:
        raise QzoError(f"{path}: {error}") from error
    return cells


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


def _exact(value: float) -> Fraction:
    """The number as it is written in the record, so that exactly 5 % more is not more than 5 %."""
    return Fraction(str(value))
