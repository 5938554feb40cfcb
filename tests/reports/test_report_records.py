"""Reading a folder: what is taken, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.cases import methods as names_of_methods
from bench.records import record, summary
from reports import records as reading
from reports.errors import ReportError


def edit(path: Path, change: Any) -> None:
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def test_both_rooms_name_roles_methods_and_baselines_alike():
    assert reading.ROLES == record.ROLES
    for name in ("METHODS", "BASELINES", "QUANTIZABLE"):
        assert getattr(reading, name) == getattr(names_of_methods, name)
    assert reading.SAME_CASE == summary.SAME_CASE


def test_records_come_in_the_order_of_the_methods(folder: Path):
    assert [reading.method_of(record) for record in reading.load(folder)] == list(reading.METHODS)


def test_ratio_agrees_with_the_summary_of_the_bench(folder: Path):
    records = reading.load(folder)
    summary = json.loads((folder / "summary.json").read_text())["reductions"]
    ratios = {
        baseline: {
            reading.method_of(record): {
                kind: reading.ratio(reading.find(records, baseline), record, kind) for kind in ("allocated", "process")
            }
            for record in records
        }
        for baseline in reading.BASELINES
    }
    assert ratios == summary


def test_extras_of_the_bench_may_be_absent(folder: Path):
    def drop(record: dict) -> None:
        for key in ("losses", "components", "notes"):
            del record[key]

    for path in folder.glob("*o.json"):
        edit(path, drop)
    assert len(reading.load(folder)) == 12


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.update(schema_version=2), "schema_version is 2"),
        (lambda r: r.pop("peak"), "no 'peak'"),
        (lambda r: r["peak"].pop("process"), "peak has no 'process'"),
        (lambda r: r.update(peak=None), "peak has no 'allocated'"),
        (lambda r: r["peak"].update(allocated=None), "peak.allocated or at_peak is null"),
        (lambda r: r.update(at_peak=None), "peak.allocated or at_peak is null"),
        (lambda r: r["at_peak"].pop("noise"), "noise is 'missing'"),
        (lambda r: r["peak"].update(reserved=1.5), "reserved is 1.5"),
        (lambda r: r["peak"].update(process=-1), "process is -1"),
        (lambda r: r["environment"].pop("torch"), "environment has no 'torch'"),
        (lambda r: r["case"].update(method="lora"), "the method is 'lora'"),
    ],
)
def test_record_that_no_table_could_show_is_named(folder: Path, change: Any, reason: str):
    edit(folder / "qzo.json", change)
    with pytest.raises(ReportError) as caught:
        reading.load(folder)
    assert "qzo.json is not a record of schema version 1: " in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe"])
def test_file_that_is_no_json_object_is_named_in_one_line(folder: Path, content: bytes):
    (folder / "qzo.json").write_bytes(content)
    with pytest.raises(ReportError, match=r"qzo\.json is not a record") as caught:
        reading.load(folder)
    assert "\n" not in str(caught.value)


def test_folder_with_only_a_summary_has_no_records(tmp_path: Path):
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ReportError, match="no records in"):
        reading.load(tmp_path)
