"""The page on what was measured on a GPU."""

import pytest

from reports.errors import ReportError
from reports.studies.gpu import page


def test_the_committed_page_is_that_of_the_committed_measurements():
    assert (page.HERE / "gpu.md").read_text(encoding="utf-8") == page.render()


def test_predictions_were_made_before_and_are_close():
    text = page.render()
    lines = [[cell.strip(" %") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    far = {(cells[0], cells[1]): list(map(float, cells[2:5])) for cells in lines if cells[1] in page.METRICS}
    for session in ("1", "2"):
        mean, median, worst = far[session, "allocated"]
        assert mean < 0.05 and median < 0.01 and worst < 0.6
    assert far["2", "process"][0] < 0.1  # with the context that session 1 measured


def test_a_recipe_s_row_has_the_peaks_of_loading_and_of_its_steps():
    recipe = {"name": "any", "batch_size": 2, "lengths": [3, 7]}
    loading = {"peak_allocated": 9 << 20, "peak_reserved": 18 << 20}
    measured = {"peak_allocated": 4.6, "peak_reserved": 10.0, "process": 12345.6}
    row = {"model_id": "m", "recipe": recipe, "loading": loading, "measured_mib": measured, "versions": {"peft": "1"}}
    assert page.recipes([row]).rows == [["m", "any", "2 x 7", "9", "18", "5", "10", "12,346"]]


def test_without_measurements_one_line_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    with pytest.raises(ReportError, match="make gpu"):
        page.render(tmp_path)
    (tmp_path / "card.jsonl").write_text("")
    monkeypatch.setattr(page, "render", lambda: page.load(tmp_path / "none.json"))
    assert page.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_calculated_says_so_and_a_step_by_kernels_moves_less():
    rows = page.load(page.HERE / "roofline.json")["rows"]
    of_7b = {row["way"]: row for row in rows if row["model"] == "llama2-7b" and row["seq_len"] == 32}
    plain, rebuilt = of_7b["two bf16 forward passes"], of_7b["rebuilt weights"]
    assert rebuilt["forward_launches"] == plain["launches"] + 2 * 7 * 32  # a rebuild for each layer, twice
    assert of_7b["codes"]["forward_launches"] == plain["launches"]
    assert of_7b["codes"]["forward_bytes"] < plain["bytes"] / 3 < of_7b["operators"]["bytes"] / 60
    table = page.calculated({"rows": rows}, {"copy_bytes_a_second": 1e12, "bf16_operations_a_second": 1e15})
    assert "Calculated, not measured" in table.notes[0] and len(table.rows) == len(rows)
