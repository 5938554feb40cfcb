"""The record's schema, its files, and the summary."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench.records import record as rec
from bench.records.files import SUMMARY, load_results, read_record, write_json, write_record
from bench.records.summary import summarise
from qzo.errors import QzoError

CASE = {
    "model": "llama2-13b", "method": "qzo", "batch_size": 1, "seq_len": 128, "dtype": "bfloat16", "attention": "flash",
    "gradient_checkpointing": False, "optimizer": "zo-sgd",
    "quantization": {"format": "gptq", "bits": 4, "group_size": 128}, "gpu": "rtx-4090",
}  # fmt: skip
ENVIRONMENT = dict.fromkeys(rec.SCHEMA["environment"])


def make(method: str = "qzo", allocated: int = 100, world: str = "simulated", case: dict | None = None, **values: Any):
    given: dict[str, Any] = {
        "total": 50, "trainable": 5, "allocated": allocated, "at_peak": {"weights": allocated - 10, "noise": 10},
        "floor": 80, "phases": {"load": 60, "update": allocated}, "process": 2 * allocated,
    }  # fmt: skip
    return rec.build_record(CASE | {"method": method} | (case or {}), world, ENVIRONMENT, **(given | values))


def failed(method: str = "qzo", status: str = "oom", message: str = "no room"):
    return rec.failed_record(CASE | {"method": method}, "simulated", ENVIRONMENT, status=status, message=message)


def changed(record: dict, path: str, value: Any) -> dict:
    """A copy with one field replaced; `path` is dotted."""
    record = copy.deepcopy(record)
    *parents, last = path.split(".")
    part = record
    for name in parents:
        part = part[name]
    part[last] = value
    return record


def test_record_has_the_keys_of_the_contract_and_ours_in_order():
    assert list(make()) == [
        "schema_version", "status", "message", "world", "case", "parameters", "peak", "at_peak", "floor", "phases",
        "step_seconds", "losses", "components", "notes", "environment",
    ]  # fmt: skip
    assert list(failed()) == list(make())


def test_roles_left_out_count_zero_and_all_eight_are_stored():
    assert make()["at_peak"] == {**dict.fromkeys(rec.ROLES, 0), "weights": 90, "noise": 10}


def test_failed_record_knows_no_peak():
    record = failed(status="error", message="boom")
    assert (record["status"], record["message"]) == ("error", "boom")
    assert record["peak"] == {"allocated": None, "reserved": None, "process": None}
    assert record["at_peak"] is None
    assert record["phases"] == []


def test_loss_that_is_not_finite_becomes_null():
    assert make(losses=[2.5, float("nan"), float("inf")])["losses"] == [2.5, None, None]


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("schema_version", 2, "schema_version is 2"),
        ("schema_version", True, "schema_version is True"),
        ("status", "fine", "status is 'fine'"),
        ("world", "real", "world is 'real'"),
        ("message", "", "message is ''"),
        ("case.model", "", "case.model is ''"),
        ("case.batch_size", 0, "case.batch_size is 0"),
        ("case.seq_len", 128.0, "case.seq_len is 128.0"),
        ("case.gradient_checkpointing", 0, "case.gradient_checkpointing is 0"),
        ("case.quantization", {"format": "gptq", "bits": 4}, "case.quantization lacks 'group_size'"),
        ("case.quantization.group_size", 0, "case.quantization.group_size is 0"),
        ("case.colour", "red", "case has the unknown key 'colour'"),
        ("parameters.total", None, "parameters.total is null"),
        ("peak.allocated", None, "peak.allocated is null"),
        ("peak.allocated", 100.0, "peak.allocated is 100.0"),
        ("peak.reserved", -1, "peak.reserved is -1"),
        ("peak.process", "200", "peak.process is '200'"),
        ("peak.process", True, "peak.process is True"),
        ("at_peak", None, "at_peak is null"),
        ("at_peak.weights", 89, "at_peak sums to 99, but peak.allocated is 100"),
        ("at_peak.weights", 91, "at_peak sums to 101, but peak.allocated is 100"),
        ("at_peak.weights", -90, "at_peak.weights is -90"),
        ("at_peak.magic", 0, "at_peak has the unknown key 'magic'"),
        ("floor", None, "floor is null"),
        ("floor", 1.5, "floor is 1.5"),
        ("phases", None, "phases is None"),
        ("phases", [{"name": "load"}], r"phases\[0\] lacks 'peak_allocated'"),
        ("phases", [{"name": "load", "peak_allocated": -1}], r"phases\[0\].peak_allocated is -1"),
        ("step_seconds", -0.1, "step_seconds is -0.1"),
        ("step_seconds", float("nan"), "step_seconds is nan"),
        ("losses", [1.0, "2"], r"losses\[1\] is '2'"),
        ("components", {"codes": 1.5}, "components is"),
        ("notes", "one", "notes is 'one'"),
        ("environment", {}, "environment lacks 'commit'"),
        ("extra", 1, "record has the unknown key 'extra'"),
    ],
)
def test_wrong_field_is_named(path: str, value: Any, field: str):
    with pytest.raises(QzoError, match=field):
        rec.validate_record(changed(make(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("peak.reserved", None), ("peak.reserved", 0), ("peak.process", None), ("case.quantization", None),
        ("case.quantization.group_size", None), ("case.quantization.bits", 4.5), ("case.attention", None),
        ("case.gpu", None), ("step_seconds", 0), ("step_seconds", 0.25), ("losses", []), ("losses", [-1.5, None]),
        ("components", {"codes": 0}), ("notes", ["random codes"]), ("phases", []), ("floor", 0),
    ],
)  # fmt: skip
def test_near_miss_is_accepted(path: str, value: Any):
    assert rec.validate_record(changed(make(), path, value))


@pytest.mark.parametrize("key", list(rec.SCHEMA))
def test_each_missing_key_is_named(key: str):
    record = make()
    del record[key]
    with pytest.raises(QzoError, match=f"lacks '{key}'"):
        rec.validate_record(record)


@pytest.mark.parametrize("content", [None, [], "qzo", 3])
def test_what_is_no_object_is_refused(content: Any):
    with pytest.raises(QzoError, match="must be an object"):
        rec.validate_record(content)


@pytest.mark.parametrize(
    ("path", "value"),
    [("peak.process", 5), ("at_peak", dict.fromkeys(rec.ROLES, 0)), ("step_seconds", 0.0), ("losses", [1.0]),
     ("phases", [{"name": "load", "peak_allocated": 1}])],
)  # fmt: skip
def test_failed_record_with_a_measured_value_is_refused(path: str, value: Any):
    with pytest.raises(QzoError, match=f"{path} has a value, but the status is oom"):
        rec.validate_record(changed(failed(), path, value))


def test_failed_record_needs_a_reason_and_a_failure():
    with pytest.raises(QzoError, match="message is null"):
        rec.validate_record(changed(failed(), "message", None))
    with pytest.raises(QzoError, match="message is ''"):
        failed(message="")
    with pytest.raises(QzoError, match="status is 'ok'"):
        failed(status="ok")


def test_written_record_reads_back_equal_and_leaves_no_temporary(tmp_path: Path):
    record = make(losses=[1.0], components={"codes": 5}, step_seconds=0.1, notes=["n"])
    path = write_record(tmp_path / "new" / "folder", record)
    assert path == tmp_path / "new" / "folder" / "qzo.json"
    assert read_record(path) == record
    assert [entry.name for entry in path.parent.iterdir()] == ["qzo.json"]


def test_rewriting_never_touches_the_file_that_a_reader_has_open(tmp_path: Path):
    path = write_record(tmp_path, make(allocated=100))
    with path.open() as reader:
        write_record(tmp_path, make(allocated=200))
        assert json.load(reader)["peak"]["allocated"] == 100
    assert read_record(path)["peak"]["allocated"] == 200


def test_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_record(tmp_path, make(allocated=100))

    def full(self: Path, *_: Any, **__: Any):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(QzoError, match=r"cannot write .*No space left"):
        write_record(tmp_path, make(allocated=200))
    assert read_record(path)["peak"]["allocated"] == 100
    assert [entry.name for entry in tmp_path.iterdir()] == ["qzo.json"]


def test_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QzoError, match="cannot write") as caught:
        write_record(tmp_path / "file" / "out", make())
    assert "\n" not in str(caught.value)


def test_invalid_record_is_not_written(tmp_path: Path):
    with pytest.raises(QzoError, match="floor"):
        write_record(tmp_path, changed(make(), "floor", -1))
    assert list(tmp_path.iterdir()) == []


def test_results_come_in_the_order_of_the_methods_without_the_summary(tmp_path: Path):
    for method in ("zz-mine", "qzo", "ft-amp", "lora", "ft-bf16"):
        write_record(tmp_path, make(method))
    write_json(tmp_path / SUMMARY, {"records": "not a record"})
    (tmp_path / ".qzo.json.1.tmp").write_text("{half")
    (tmp_path / "tables.md").write_text("#")
    assert list(load_results(tmp_path)) == ["ft-bf16", "ft-amp", "lora", "qzo", "zz-mine"]


@pytest.mark.parametrize("content", [b"", b"{", b'{"status": "ok"', b"\xff\xfe", b"[]", b'{"status": "ok"}'])
def test_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes):
    write_record(tmp_path, make("lora"))
    (tmp_path / "qzo.json").write_bytes(content)
    with pytest.raises(QzoError, match=r"qzo\.json") as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_file_named_after_another_method_is_refused(tmp_path: Path):
    write_record(tmp_path, make("qzo")).rename(tmp_path / "qzo-old.json")
    with pytest.raises(QzoError, match=r"qzo-old\.json holds the method 'qzo'"):
        load_results(tmp_path)


def test_missing_and_empty_folder_say_what_to_do(tmp_path: Path):
    with pytest.raises(QzoError, match=r"no folder .*nowhere"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(QzoError, match=r"no records in .*bench run"):
        load_results(tmp_path)


def test_summary_holds_records_and_a_reduction_for_each_convention():
    records = {m: make(m, a) for m, a in (("qzo", 10), ("ft-amp", 400), ("ft-mixed", 200), ("ft-bf16", 100))}
    summary = summarise(records)
    assert summary["records"] == [records[m] for m in ("ft-bf16", "ft-mixed", "ft-amp", "qzo")]
    assert {b: summary["reductions"][b]["qzo"] for b in summary["reductions"]} == {
        "ft-bf16": {"allocated": 10.0, "process": 10.0},
        "ft-mixed": {"allocated": 20.0, "process": 20.0},
        "ft-amp": {"allocated": 40.0, "process": 40.0},
    }
    assert summary["reductions"]["ft-mixed"]["ft-mixed"]["allocated"] == 1.0
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.parametrize(
    "baseline",
    [
        failed("ft-mixed"),
        make("ft-mixed", 200, world="measured-cuda"),
        make("ft-mixed", 200, case={"batch_size": 2}),
        make("ft-mixed", 200, case={"seq_len": 64}),
        make("ft-mixed", 200, case={"model": "llama2-7b"}),
        make("ft-mixed", 200, case={"gpu": "a100-80gb"}),
    ],
    ids=["failed", "other world", "other batch", "other length", "other model", "other gpu"],
)
def test_reduction_between_what_cannot_be_compared_is_null(baseline: dict):
    reductions = summarise({"ft-mixed": baseline, "qzo": make("qzo", 10)})["reductions"]
    assert reductions["ft-mixed"]["qzo"] == {"allocated": None, "process": None}
    assert reductions["ft-bf16"]["qzo"] == {"allocated": None, "process": None}


def test_reduction_of_unknown_process_bytes_is_null_beside_a_known_ratio():
    records = {"ft-mixed": make("ft-mixed", 200), "qzo": make("qzo", 10, process=None), "lora": failed("lora")}
    reductions = summarise(records)["reductions"]["ft-mixed"]
    assert reductions["qzo"] == {"allocated": 20.0, "process": None}
    assert reductions["lora"] == {"allocated": None, "process": None}
