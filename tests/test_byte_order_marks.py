"""JSON and text with a byte order mark in front, as some editors write it, is read as if it were not there."""

import codecs
import json

import pytest
from sample_records import make_record

from bench.records.files import read_json as read_record
from bench.validation.measurement import read_rows
from qzo.errors import QzoError
from qzo.files.folder import read_json
from qzo.quantizers.calibration import calibration_text
from reports.records import load


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    made = make_record("qzo")
    for name, text in (
        ("qzo.json", json.dumps(made)),
        ("rows.jsonl", '{"a": 1}\n{"a": 2}\n'),
        ("text.txt", "A text.\n"),
    ):
        (tmp_path / name).write_bytes(codecs.BOM_UTF8 + text.encode())
    assert read_json(tmp_path / "qzo.json") == read_record(tmp_path / "qzo.json") == made
    with pytest.raises(QzoError, match=r"rows.jsonl, line 1 has no object 'measured_mib'"):  # so it is JSON
        read_rows(tmp_path / "rows.jsonl")
    assert calibration_text(str(tmp_path / "text.txt")) == "A text.\n"
    assert load(tmp_path) == [made]
