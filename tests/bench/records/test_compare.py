"""The gate: what passes, what fails and why, and what is an error."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from bench.commands.compare import run
from bench.records import compare as cmp
from bench.records.files import load_cells, write_json, write_record
from bench.records.record import SCHEMA, build_record, failed_record
from bench.records.summary import summarise
from bench.records.thresholds import DEFAULT_FAIL, Threshold
from qzo.errors import QzoError

MIB = 1 << 20
CASE = {
    "model": "llama2-13b", "method": "qzo", "batch_size": 1, "seq_len": 128, "dtype": "bfloat16", "attention": "flash",
    "gradient_checkpointing": False, "optimizer": "zo-sgd",
    "quantization": {"format": "gptq", "bits": 4, "group_size": 128}, "gpu": "rtx-4090",
}  # fmt: skip
ENVIRONMENT = dict.fromkeys(SCHEMA["environment"]) | {"torch": "2.13.0"}


def make(method: str = "qzo", allocated: int = 1000, world: str = "simulated", case: dict | None = None, **values: Any):
    """A record in which only weights grow with `allocated`."""
    given: dict[str, Any] = {
        "total": 50, "trainable": 5, "allocated": allocated, "at_peak": {"weights": allocated - 100, "noise": 100},
        "floor": 800, "phases": {"load": 600, "update": allocated}, "reserved": 3000, "process": 4000,
        "step_seconds": 0.5,
    }  # fmt: skip
    return build_record(CASE | {"method": method} | (case or {}), world, ENVIRONMENT, **(given | values))


def failed(status: str, method: str = "qzo"):
    return failed_record(CASE | {"method": method}, "simulated", ENVIRONMENT, status=status, message="no room")


def gate(before: dict, now: dict, *specs: str) -> cmp.Comparison:
    fail = [Threshold.parse(spec) for spec in specs] or DEFAULT_FAIL
    return cmp.compare({"qzo": before}, {"qzo": now}, fail)


def row(comparison: cmp.Comparison, metric: str) -> cmp.Row:
    return next(row for row in comparison.rows if row.metric == metric)


def test_threshold_is_parsed_and_printed():
    assert Threshold.parse("allocated:1%") == DEFAULT_FAIL[0]
    assert Threshold.parse(" process:100MiB ") == Threshold("process", Fraction(100 * MIB), relative=False)
    assert Threshold.parse("phase:forward-plus:0.5%") == Threshold("phase:forward-plus", Fraction(1, 2))
    assert Threshold.parse("step_seconds:0.2s") == Threshold("step_seconds", Fraction(1, 5), relative=False)
    for spec in ("allocated:1%", "activations:0%", "floor:12B", "step_seconds:0.2s", "phase:load:2.5%"):
        assert str(Threshold.parse(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("allocated", "no limit; write METRIC:5%"),
        ("5%", "no limit; write METRIC:5%"),
        (":5%", "unknown metric ''"),
        ("memory:5%", "unknown metric 'memory'; choose one of allocated"),
        ("phase::5%", "unknown metric 'phase:'"),
        ("phase:5%", "unknown metric 'phase'"),
        ("allocated:", "'' is not a limit"),
        ("allocated:5", "'5' is not a limit"),
        ("allocated:-5%", "'-5%' is not a limit"),
        ("allocated:5s", "'5s' is not a limit"),
        ("step_seconds:5MB", "'5MB' is not a limit; write step_seconds:5% or step_seconds:0.2s"),
    ],
)
def test_bad_threshold_is_told(spec: str, reason: str):
    with pytest.raises(QzoError) as caught:
        Threshold.parse(spec)
    assert reason in str(caught.value)


def test_equal_records_pass():
    comparison = gate(make(), make())
    assert comparison.failures == []
    assert [(row.metric, row.verdict) for row in comparison.rows] == [("allocated", "same")]


@pytest.mark.parametrize(
    ("spec", "now", "passes"),
    [
        ("allocated:1%", 1010, True), ("allocated:1%", 1011, False), ("allocated:0%", 1000, True),
        ("allocated:0%", 1001, False), ("allocated:0.1%", 1001, True), ("allocated:0.1%", 1002, False),
        ("allocated:64B", 1064, True), ("allocated:64B", 1065, False), ("allocated:0B", 1001, False),
        ("weights:10%", 1090, True), ("weights:10%", 1091, False), ("phase:update:1%", 1010, True),
        ("phase:update:1%", 1011, False), ("phase:load:1%", 2000, True), ("reserved:1%", 9000, True),
    ],
)  # fmt: skip
def test_exactly_at_the_threshold_passes_and_one_byte_more_fails(spec: str, now: int, passes: bool):
    assert (gate(make(), make(allocated=now), spec).failures == []) is passes


def test_seconds_are_compared_as_they_are_written():
    assert gate(make(step_seconds=1.0), make(step_seconds=1.05), "step_seconds:5%").failures == []
    assert gate(make(step_seconds=1.0), make(step_seconds=1.0501), "step_seconds:5%").failures
    assert gate(make(step_seconds=0.1), make(step_seconds=0.3), "step_seconds:0.2s").failures == []
    assert gate(make(step_seconds=0.1), make(step_seconds=0.31), "step_seconds:0.2s").failures


def test_growth_from_nothing_is_over_any_percentage_but_may_be_within_bytes():
    before = make(at_peak={"weights": 1000})
    now = make(at_peak={"weights": 990, "activations": 10})
    assert row(gate(before, now, "activations:1000%"), "activations").failed
    assert not row(gate(before, now, "activations:10B"), "activations").failed


def test_every_threshold_of_a_metric_must_hold():
    assert gate(make(), make(allocated=1020), "allocated:5%", "allocated:10B").failures
    assert gate(make(), make(allocated=1020), "allocated:1%", "allocated:1MB").failures
    assert gate(make(), make(allocated=1020), "allocated:5%", "allocated:1MB").failures == []


def test_what_moved_without_a_threshold_is_shown_and_does_not_fail():
    comparison = gate(make(), make(allocated=1005, process=9000, reserved=2000), "allocated:1%")
    assert {row.metric: row.verdict for row in comparison.rows} == {
        "allocated": "within allocated:1%", "reserved": "improved", "process": "larger, not gated",
        "weights": "larger, not gated", "phase:update": "larger, not gated",
    }  # fmt: skip
    assert comparison.failures == []


def test_improvement_passes_and_is_shown():
    comparison = gate(make(), make(allocated=500))
    assert row(comparison, "allocated").verdict == "improved"
    assert comparison.failures == []


def test_metric_unknown_in_both_passes_and_lost_in_current_fails():
    unknown = make(process=None)
    assert row(gate(unknown, unknown, "process:1%"), "process").verdict == "n/a"
    assert gate(unknown, unknown, "process:1%").failures == []
    assert row(gate(make(), unknown, "process:1%"), "process").verdict == "REGRESSED: no longer known"
    assert gate(make(), unknown, "process:1%").failures
    assert gate(unknown, make(), "process:1%").failures == []
    assert gate(make(), unknown, "allocated:1%").failures == []


def test_gated_phase_that_vanished_fails():
    assert gate(make(), make(phases={"load": 600}), "phase:update:1%").failures


def test_phase_that_no_record_has_is_an_error_that_lists_them():
    with pytest.raises(QzoError, match="no record has the phase; the records have phase:load, phase:update"):
        gate(make(), make(), "phase:backward:1%")


def test_missing_cell_fails_and_new_cell_is_listed():
    both = {"qzo": make(), "lora": make("lora")}
    lost = cmp.compare(both, {"qzo": make()})
    assert [(row.method, row.verdict) for row in lost.failures] == [("lora", "MISSING")]
    new = cmp.compare({"qzo": make()}, both)
    assert new.failures == []
    assert ("lora", "new") in [(row.method, row.verdict) for row in new.rows]


STATUSES = ("ok", "oom", "unsupported", "error")


@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("now", STATUSES)
def test_only_a_worse_status_fails(before: str, now: str):
    old, new = (make() if status == "ok" else failed(status) for status in (before, now))
    assert bool(gate(old, new).failures) is (STATUSES.index(now) > STATUSES.index(before))


def test_worse_status_tells_the_reason():
    assert row(gate(make(), failed("oom")), "status").verdict == "REGRESSED: no room"


def test_other_world_fails_as_not_comparable():
    comparison = gate(make(), make(world="measured-cuda", allocated=500))
    assert [(row.metric, row.baseline, row.current, row.verdict) for row in comparison.rows] == [
        ("world", "simulated", "measured-cuda", "NOT COMPARABLE")
    ]
    assert comparison.failures


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 2}, {"seq_len": 64}, {"model": "llama2-7b"}, {"gradient_checkpointing": True},
     {"quantization": None}, {"attention": "eager"}, {"gpu": None}, {"dtype": "float16"}],
)  # fmt: skip
def test_other_case_fails_as_not_comparable(change: dict):
    comparison = gate(make(), make(case=change))
    assert [row.metric for row in comparison.failures] == [f"case.{next(iter(change))}"]


def test_what_a_failed_cell_does_not_know_is_no_other_case():
    early = failed("oom")
    early["case"] |= {"dtype": None, "optimizer": None, "quantization": None}
    assert [row.metric for row in gate(make(), early).failures] == ["status"]
    assert gate(early, make()).failures == []
    early["case"]["seq_len"] = 64
    assert [row.metric for row in gate(early, make()).failures] == ["case.seq_len"]


def test_changed_versions_are_told_and_do_not_fail():
    now = copy.deepcopy(make())
    now["environment"]["torch"] = "2.14.0"
    comparison = gate(make(), now)
    assert comparison.versions == ("torch 2.13.0 -> 2.14.0",)
    assert comparison.failures == []


def save(folder: Path, *records: dict) -> Path:
    for record in records:
        write_record(folder, record)
    return folder


def test_folder_record_file_and_summary_are_the_same_cells(tmp_path: Path):
    records = {"lora": make("lora"), "qzo": make()}
    folder = save(tmp_path / "folder", *records.values())
    baseline = write_json(tmp_path / "llama2-13b.json", {"records": list(records.values())})
    summary = write_json(tmp_path / "summary.json", summarise(records))
    assert load_cells(folder) == load_cells(baseline) == load_cells(summary) == records
    assert load_cells(folder / "qzo.json") == {"qzo": records["qzo"]}


def test_run_prints_the_table_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = save(tmp_path / "a", make(allocated=8 << 30), make("lora"))
    now = save(tmp_path / "b", make(allocated=(8 << 30) + 10 * MIB), make("lora"))
    assert run(before, now) == 0
    out, err = capsys.readouterr()
    line = next(line for line in out.splitlines() if line.startswith("qzo") and "allocated" in line)
    assert "8.00 GiB" in line
    assert "8.01 GiB" in line
    assert "+10.00 MiB (+0.12%)" in line
    assert "passed: 2 cells (allocated:1%)" in out
    assert err == ""


def test_run_counts_cells_in_which_nothing_is_gated_or_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lora = make("lora", phases={"backward": 1000})
    before = save(tmp_path / "a", make(), lora)
    assert run(before, before, ["phase:backward:1%"]) == 0
    assert "passed: 2 cells (phase:backward:1%)" in capsys.readouterr().out


def test_run_fails_with_1_and_counts_the_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = save(tmp_path / "a", make(), make("lora"), make("mezo"))
    now = save(tmp_path / "b", make(allocated=2000), make("lora"), failed("oom", "mezo"))
    assert run(before, now, ["allocated:5%", "process:100MiB"]) == 1
    out = capsys.readouterr().out
    assert "REGRESSED: over allocated:5%" in out
    assert "REGRESSED: no room" in out
    assert "FAILED: 2 of 3 cells (allocated:5%, process:104857600B)" in out


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "damaged"), ('{"records": []}', "holds no records"), ('{"records": 3}', "holds no records"),
     ('{"a": 1}', "record lacks"), ("[]", "must be an object")],
)  # fmt: skip
def test_damaged_file_is_exit_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, reason: str
):
    good = save(tmp_path / "a", make())
    bad = tmp_path / "bad.json"
    bad.write_text(content)
    assert run(bad, good) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "bad.json" in err
    assert reason in err


def test_missing_path_bad_threshold_and_doubled_method_are_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good = save(tmp_path / "a", make())
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps({"records": [make(), make()]}))
    assert run(good, tmp_path / "nowhere") == 2
    assert run(good, good, ["allocated:lots"]) == 2
    assert run(twice, good) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [reason in line for line, reason in zip(errors, ("nowhere", "lots", "two records"), strict=True)] == [
        True
    ] * 3
