"""The page on what was measured on a GPU."""

import pytest

from reports.errors import ReportError
from reports.studies.gpu import page


def test_the_committed_page_is_that_of_the_committed_measurements():
    assert (page.HERE / "gpu.md").read_text(encoding="utf-8") == page.render()


def test_predictions_were_made_before_and_are_close():
    text = page.render()
    line = next(line for line in text.splitlines() if line.startswith("| allocated "))
    mean, median, worst = (float(cell.strip(" %")) for cell in line.split("|")[2:5])
    assert (mean, median) < (0.05, 0.01) and worst < 0.6


def test_without_measurements_one_line_says_how_to_make_them(tmp_path, monkeypatch, capsys):
    with pytest.raises(ReportError, match="make gpu"):
        page.render(tmp_path)
    (tmp_path / "card.jsonl").write_text("")
    monkeypatch.setattr(page, "render", lambda: page.load(tmp_path / "none.json"))
    assert page.main() == 2
    assert capsys.readouterr().err.count("\n") == 1
