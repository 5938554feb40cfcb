"""Data files of a user: what is read, and 30 damaged ones, each told in one line with its file and row."""

import codecs
import gzip
import json
import sys
import types
from pathlib import Path

import pytest
from damaged_data import DAMAGED
from own_files import lines, ticket

from qzo import QzoError, tasks
from qzo.tasks.source import parquet
from qzo.tasks.source.files import read

TICKETS = [ticket(n) for n in range(12)]


def fields(place) -> list[dict]:
    return [row.fields for row in read(str(place))["train"]]


def table(rows: list[dict], delimiter: str = ",") -> str:
    return "\n".join([delimiter.join(rows[0]), *(delimiter.join(row.values()) for row in rows)]) + "\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines(TICKETS).encode()),
        ("rows.ndjson", b"\n" + lines(TICKETS).encode() + b"\n\n"),
        ("rows.jsonl.gz", gzip.compress(lines(TICKETS).encode())),
        ("marked.jsonl", codecs.BOM_UTF8 + lines(TICKETS).encode()),
        ("rows.json", json.dumps(TICKETS).encode()),
        ("data.json", json.dumps({"data": TICKETS}, indent=1).encode()),
        ("lines.json", lines(TICKETS).encode()),
        ("rows.csv", table(TICKETS).encode()),
        ("ROWS.CSV", table(TICKETS).replace("\n", "\r\n").encode()),
        ("excel.csv", codecs.BOM_UTF16_LE + table(TICKETS, ";").encode("utf-16-le")),
        ("rows.tsv", table(TICKETS, "\t").encode()),
    ],
)
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert fields(tmp_path / name) == TICKETS


def test_quoted_fields_keep_delimiters_and_line_breaks(tmp_path):
    (tmp_path / "rows.csv").write_text('text,label\n"a, b\nand ""c""",x\nd,y\n')
    rows = read(str(tmp_path / "rows.csv"))["train"]
    assert rows[0].fields == {"text": 'a, b\nand "c"', "label": "x"} and rows[1].where.endswith("rows.csv, line 4")


def test_folders_are_split_by_names_or_joined(tmp_path):
    for name, count in (("train.jsonl", 5), ("valid.jsonl", 3), ("test.csv", 2), ("README.md", 0)):
        rows = TICKETS[:count]
        (tmp_path / name).write_text(table(rows) if name.endswith("csv") else lines(rows))
    assert {split: len(rows) for split, rows in read(str(tmp_path)).items()} == {"train": 5, "validation": 3, "test": 2}
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("b", "a", ".hidden"):
        (texts / f"{name}.txt").write_text(name)
    assert fields(texts) == [{"text": "a"}, {"text": "b"}]
    shards = tmp_path / "shards"
    shards.mkdir()
    for number in (1, 0):
        (shards / f"train-0000{number}-of-00002.jsonl").write_text(lines(TICKETS[number * 3 : number * 3 + 3]))
    assert fields(shards) == TICKETS[:6]


def test_parquet_gives_class_names_in_the_place_of_numbers(tmp_path, monkeypatch):
    """With a stand-in for pyarrow, which is not needed for anything else; a real one if there is."""
    names = {"info": {"features": {"label": {"names": ["bad", "good"]}, "text": {"dtype": "string"}}}}
    content = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    try:
        import pyarrow
        from pyarrow import parquet as writer

        made = pyarrow.Table.from_pylist(content).replace_schema_metadata({"huggingface": json.dumps(names)})
        writer.write_table(made, tmp_path / "rows.parquet")
    except ImportError:
        opened = types.SimpleNamespace(
            metadata=types.SimpleNamespace(num_rows=2),
            schema_arrow=types.SimpleNamespace(metadata={b"huggingface": json.dumps(names).encode()}),
            read=lambda: types.SimpleNamespace(to_pylist=lambda: content),
        )
        library = types.ModuleType("pyarrow")
        library.parquet = types.SimpleNamespace(ParquetFile=lambda file: opened)
        monkeypatch.setitem(sys.modules, "pyarrow", library)
        monkeypatch.setattr(parquet, "find_spec", lambda name: True)
        (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    assert fields(tmp_path / "rows.parquet") == [{"text": "a", "label": "good"}, {"text": "b", "label": "bad"}]


def test_a_hub_data_set_is_its_parquet_files(monkeypatch):
    import huggingface_hub

    files = ["default/train/0000.parquet", "default/validation/0000.parquet", "other/train/0000.parquet"]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: files)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file, **_: f"/cache/{repo}/{file}")
    train, validation = (
        Path("/cache/a/b/default/train/0000.parquet"),
        Path("/cache/a/b/default/validation/0000.parquet"),
    )
    assert parquet.hub_files("a/b") == {"train": [train], "validation": [validation]}
    assert list(parquet.hub_files("a/b:other")) == ["train"]
    with pytest.raises(QzoError, match="has the configurations default, other; choose one"):
        parquet.hub_files("a/b:nothing")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: 1 / 0)
    with pytest.raises(QzoError, match="hub:a/b cannot be had: division by zero; give a file"):
        tasks.from_data("hub:a/b")


@pytest.mark.parametrize("name", list(DAMAGED))
def test_a_damaged_file_is_one_line_with_file_and_row(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QzoError) as error:
        tasks.from_data(str(tmp_path / name)).splits()
    assert message in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_places_that_hold_nothing_are_told(tmp_path):
    for place, message in (
        (tmp_path / "nowhere.jsonl", "cannot be read: No such file"),
        (tmp_path, "has no data file"),
    ):
        with pytest.raises(QzoError, match=message):
            tasks.from_data(str(place))
    (tmp_path / "some.jsonl").write_text(lines(TICKETS))
    with pytest.raises(QzoError, match=r'no column "body"; it has "text", "label"'):
        tasks.from_data(str(tmp_path / "some.jsonl"), columns={"text": "body"})
    other = tmp_path / "other.jsonl"
    other.write_text(lines([{**TICKETS[0], "label": "unseen"}]))
    with pytest.raises(QzoError, match=r'other.jsonl, line 1: no training row has the label "unseen"'):
        tasks.from_data(str(tmp_path / "some.jsonl"), validation=str(other))
    with pytest.raises(QzoError, match='metric "bleu" is not measured on texts with labels; choose accuracy'):
        tasks.from_data(str(tmp_path / "some.jsonl"), metric="bleu")
