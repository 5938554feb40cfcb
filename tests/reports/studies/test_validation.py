"""The validation page: errors by metric and by group, a picture, and no measured number of others."""

import json

import pytest

from reports.studies.validation import page as validation

CASE = {"model_id": "someone/model", "method": "lora", "attention": "eager", "gpu": "Tesla T4"}
GIB = 1 << 30


def row(error: float) -> dict:
    measured = {"allocated": 3 * GIB, "reserved": 5 * GIB}
    return {
        "case": CASE, "measured": measured, "status": "ok", "message": None,
        "predicted": {name: round(value * (1 + error / 100)) for name, value in measured.items()},
        "error_percent": dict.fromkeys(measured, error),
    }  # fmt: skip


@pytest.fixture
def compared() -> dict:
    names = ("mean_abs_percent", "median_abs_percent", "worst_abs_percent", "mean_signed_percent")
    failed = {"case": CASE, "measured": {}, "predicted": None, "error_percent": None, "status": "error", "message": "x"}
    return {
        "statistics": {"allocated": dict(zip(names, (1.5, 1.4, 2.0, -0.5), strict=True))},
        "verdicts": {"asked": 8, "wrong": 1},
        "rows": [row(1.0), row(-2.0), failed],
    }


def test_the_page_has_statistics_groups_and_verdicts(compared):
    text = validation.page([compared])
    assert "| allocated | 1.50 % |   1.40 % |  2.00 % |        -0.50 % |" in text
    assert "3 rows, 1 of them not predicted" in text and "1 of 8 verdicts wrong" in text
    group = next(line for line in text.splitlines() if line.startswith("| someone/model"))
    assert group.split("|")[4].strip() == "2" and "1.50 % (2.00 %)" in group
    assert str(3 * GIB) not in text and f"{3.0:.2f}" not in text


def test_rows_that_state_their_whole_recipe_have_a_line_of_their_own_and_ours_none(compared):
    compared["file"] = "others.jsonl"
    compared["rows"] += [row(30.0) | {"unstated": "its lengths"}, row(50.0) | {"ours": True}]
    table = validation.others_table([compared])
    assert [line[:4] for line in table.rows] == [
        ["aimed at, mean / worst", "", "", "2 / 6 %"],
        ["whole recipe stated", "3", "1", "1.5 / 2.0 / -0.5 %"],
        ["all", "4", "1", "11.0 / 30.0 / +9.7 %"],
    ]
    assert table.notes == ["others, 1 rows, do not state its lengths."]


def test_zeroth_order_rows_are_told_by_what_ran_and_beyond_their_rounding(compared):
    def told(method: str, error: float, repository: str | None, rounding: int) -> dict:
        figures = {"measured": {"process": 10 * GIB}, "predicted": {"process": round(GIB * (10 + error / 10))}}
        case = CASE | {"method": method, "source": {"repo": repository} if repository else {"id": "x"}}
        return row(0.0) | figures | {"case": case, "error_percent": {"process": error}, "rounding": rounding}

    assert validation.zeroth_order_tables([compared]) == []
    compared["file"] = "zeroth.jsonl"
    compared["rows"] += [
        told("mezo", -4.0, "a/b", GIB // 2), told("mezo, layers streamed", 9.0, "a/b", 0), told("mezo", -20.0, None, 0),
        told("zero-shot", -8.0, "a/b", GIB // 2), told("prefix (Adam)", 12.0, "a/b", GIB // 2),
    ]  # fmt: skip
    (table,) = validation.zeroth_order_tables([compared])
    assert [[line[0], line[1], line[-1]] for line in table.rows] == [
        ["evaluations without training", "1", "3.0 / 3.0 / -3.0 %"],
        ["training by Adam", "1", "7.0 / 7.0 / +7.0 %"],
        ["zeroth-order steps", "2", "4.5 / 9.0 / +4.5 %"],
        ["zeroth-order steps, on a card that others may have used", "1", "20.0 / 20.0 / -20.0 %"],
        ["all", "5", "7.8 / 20.0 / -1.4 %"],
    ]


def test_the_picture_is_a_png(compared):
    assert validation.picture([compared]).startswith(b"\x89PNG")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"rows": []}))
    for arguments in ([], [str(tmp_path / "none.json")], [str(path)]):
        assert validation.main(arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_committed_page_has_no_wrong_verdict():
    text = validation.REPORT.read_text(encoding="utf-8")
    assert "0 of 376 verdicts wrong" in text and "47 rows, 0 of them not predicted" in text
    assert validation.FIGURE.exists()
