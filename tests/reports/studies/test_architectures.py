"""The report on architectures: what it must show, and that the committed one is that of the committed record."""

import json

from reports.studies.architectures.page import HERE, main, render

RUNS = {"allocated": 1, "parameters": 2}


def stopped(message: str) -> dict:
    return {"status": "unsupported", "message": message}


def record():
    return {
        "gpu": "rtx-4090", "batch_size": 2, "seq_len": 128, "methods": ["lora", "qzo", "qzo-full"],
        "environment": dict.fromkeys(("torch", "transformers", "python", "commit"), "x"),
        "types": {
            "a": {"config": None, "layers": 2, "methods": {"lora": RUNS, "qzo": RUNS, "qzo-full": RUNS}},
            "b": {"config": None, "layers": None, "methods": {
                "lora": RUNS, "qzo": stopped("odd sizes"), "qzo-full": stopped("odd sizes")}},
            "c": {"config": "needs timm"},
        },
    }  # fmt: skip


def test_each_reason_stands_once_after_the_methods_it_stops():
    text = render(record())
    assert "Of 3 model types" in text and "1 run all 3 methods, 1 run some and 1 none: 4 of 9 cells" in text
    assert "qzo, qzo-full: odd sizes" in text and "all: needs timm" in text


def test_the_committed_report_is_that_of_the_committed_record():
    committed = json.loads((HERE / "architectures.json").read_text())
    assert (HERE / "architectures.md").read_text() == render(committed)


def test_what_does_not_run_is_no_error_but_a_reason():
    committed = json.loads((HERE / "architectures.json").read_text())
    outcomes = [item for about in committed["types"].values() for item in about.get("methods", {}).values()]
    assert {item["status"] for item in outcomes if "allocated" not in item} <= {"unsupported"}


def test_the_page_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("reports.studies.architectures.page.HERE", tmp_path)
    (tmp_path / "architectures.json").write_text(json.dumps(record()))
    assert main() == 0
    assert (tmp_path / "architectures.md").read_text() == render(record())
