"""The command and the four files."""

from __future__ import annotations

import base64
import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_records import all_records, make_failed, make_record, save

import reports
from reports.__main__ import main
from reports.errors import ReportError
from reports.records import ROLES, load
from reports.render.png import segments

PNG = b"\x89PNG\r\n\x1a\n"


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".json"}


def test_command_writes_the_default_files_and_prints_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(folder)]) == 0
    out, err = capsys.readouterr()
    assert files(folder) == {"tables.md", "tables.csv", "memory.png"}
    assert out == (folder / "tables.md").read_text()
    assert [line.rsplit("/", 1)[1] for line in err.splitlines()] == ["tables.md", "tables.csv", "memory.png"]
    titles = [line for line in out.splitlines() if line.startswith("## ")]
    assert titles == [
        "## Breakdown at the peak, GiB", "## Peak, GiB", "## Times smaller than full fine-tuning with AdamW",
        "## What fits", "## Beside the paper, GB of 1e9 bytes",
    ]  # fmt: skip


def test_format_chooses_the_files(folder: Path):
    assert main([str(folder), "--format", "csv, html"]) == 0
    assert files(folder) == {"tables.csv", "report.html"}


def test_writing_again_gives_the_same_bytes(folder: Path):
    first = [path.read_bytes() for path in reports.write(folder, list(reports.FORMATS))]
    assert [path.read_bytes() for path in reports.write(folder, list(reports.FORMATS))] == first


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{}/nowhere"], "no folder"),
        (["{}", "--format", "md,pdf"], "unknown format 'pdf'; choose from md, csv, html, png"),
        (["{}", "--format", ""], "unknown format"),
        (["{}", "--format", "MD"], "unknown format 'MD'"),
        ([], "arguments are required: DIR"),
        (["{}", "--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_wrong_call_is_exit_2_in_one_line_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
):
    assert main([argument.format(folder) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert reason in err
    assert files(folder) == set()


def test_damaged_record_is_exit_2_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "qzo.json").write_text("{")
    assert main([str(folder)]) == 2
    assert "qzo.json" in capsys.readouterr().err
    assert files(folder) == set()


def test_folder_that_cannot_be_written_is_one_line_and_leaves_no_temporary(folder: Path):
    (folder / "tables.md").mkdir()
    with pytest.raises(ReportError, match=r"cannot write .*tables\.md"):
        reports.write(folder, ["md"])
    assert files(folder) == {"tables.md"}


def test_csv_holds_every_method_and_integer_bytes_that_add_up(folder: Path):
    (path,) = reports.write(folder, ["csv"])
    rows = {row["method"]: row for row in csv.DictReader(path.open())}
    assert list(rows) == list(all_records())
    for row in rows.values():
        assert sum(int(row[f"at_peak_{role}_bytes"]) for role in ROLES) == int(row["peak_allocated_bytes"])
    assert rows["ft-mixed"]["at_peak_optimizer_bytes"] == "104126916012"
    assert rows["qzo"]["quantization"] == '{"format": "gptq", "bits": 4, "group_size": 128}'
    assert rows["qzo"]["gradient_checkpointing"] == "false"
    assert (rows["qzo"]["phase_backward_bytes"], rows["ft-bf16"]["phase_forward-plus_bytes"]) == ("", "")


def test_csv_leaves_the_unknown_empty(tmp_path: Path):
    records = {
        "ft-amp": make_failed("ft-amp", "oom", 'said "no", twice'),
        "qzo": make_record("qzo", process=None, losses=[1.5, float("nan")], components={"codes": 7}),
    }
    (path,) = reports.write(save(tmp_path, records), ["csv"])
    failed, ok = csv.DictReader(path.open())
    assert failed["message"] == 'said "no", twice'
    assert {failed[name] for name in failed if name.endswith("_bytes")} == {""}
    assert (ok["peak_process_bytes"], ok["losses"], ok["component_codes_bytes"]) == ("", "[1.5, null]", "7")


class Page(HTMLParser):
    """Collects headings, table rows and whatever a browser would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows = 0
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "iframe")


def test_page_holds_the_figure_and_loads_nothing(folder: Path):
    png, html = reports.write(folder, ["png", "html"])
    page = Page(html.read_text())
    assert len(page.loads) == 1
    assert page.loads[0].startswith("data:image/png;base64,")
    assert base64.b64decode(page.loads[0].split(",")[1]) == png.read_bytes()
    assert page.rows == 4 * (1 + 12) + (1 + 1)
    assert not re.search(r"https?://|url\(|@import", html.read_text())


def test_page_escapes_what_a_record_says(tmp_path: Path):
    folder = save(tmp_path, {"qzo": make_failed("qzo", "error", "<script>alert('x')</script>")})
    (html,) = reports.write(folder, ["html"])
    assert "&lt;script&gt;" in html.read_text()
    assert "<script" not in html.read_text()


@pytest.mark.parametrize(
    "records",
    [
        {"qzo": make_record("qzo")},
        {"qzo": make_failed("qzo"), "lora": make_failed("lora", "error", "long " * 100)},
        {"qzo": make_record("qzo", {"weights": 1 << 20}, world="measured-cpu", gpu=None, reserved=None)},
        {"qzo": make_record("qzo", {"weights": 0}, reserved=0, process=0)},
    ],
    ids=["one method", "all failed", "cpu", "nothing allocated"],
)
def test_figure_is_drawn_for_unusual_folders(tmp_path: Path, records: dict):
    (png,) = reports.write(save(tmp_path, records), ["png"])
    assert png.read_bytes().startswith(PNG)
    assert reports.tables(tmp_path).startswith("# llama2-13b")


def test_bars_close_the_waterfall_up_to_process_bytes(folder: Path):
    for record in load(folder):
        parts = segments(record)
        assert sum(parts.values()) == record["peak"]["process"]
        assert parts["CUDA context"] == record["peak"]["process"] - record["peak"]["reserved"]
        assert 0 not in parts.values()


def test_bar_ends_at_allocated_where_reserved_is_unknown():
    record = make_record("qzo", reserved=None)
    assert sum(segments(record).values()) == record["peak"]["allocated"]
