"""The page on what was measured on a GPU."""

import pytest

from reports.errors import ReportError
from reports.studies.gpu import page, seconds


def test_the_committed_page_is_that_of_the_committed_measurements():
    assert (page.HERE / "gpu.md").read_text(encoding="utf-8") == page.render()


def test_predictions_were_made_before_and_are_close():
    text = page.render()
    lines = [[cell.strip(" %") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    far = {(cells[0], cells[1]): list(map(float, cells[2:5])) for cells in lines if cells[1] in page.METRICS}
    for session, bounds in {"1": (0.05, 0.01, 0.6), "2": (0.05, 0.01, 0.6), "3": (0.2, 0.2, 0.3)}.items():
        mean, median, worst = far[session, "allocated"]
        assert all(found < most for found, most in zip((mean, median, worst), bounds, strict=True))
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


def test_a_step_by_kernels_is_three_times_as_fast_as_mezo_as_released_where_one_sequence_is_in_a_batch():
    best = seconds.fastest(page.load(page.MEASUREMENTS / "h100-80gb.seconds.json"))
    for shape in ((1, 128), (1, 512)):
        assert best["llama2-7b", seconds.RELEASED, shape] > 3 * best["llama2-7b", seconds.OURS, shape]
    assert best["llama2-7b", "qzo", (16, 128)] > 7 * best["llama2-7b", seconds.OURS, (16, 128)]


def test_of_several_sessions_the_lower_median_counts_and_a_ratio_is_of_one_shape():
    def row(method, session, *medians):
        shapes = [{"batch_size": 1, "seq_len": n, "median": m, "peak_allocated": 1} for n, m in enumerate(medians)]
        return {"model": "m", "method": method, "session": session, "status": "ok", "profile": None, "shapes": shapes}

    rows = [row("qzo by kernels", 1, 0.5, 0.2), row("qzo by kernels", 2, 0.25), row("mezo-reference", 1, 1.0)]
    best = seconds.fastest({"rows": rows})
    assert best["m", "qzo by kernels", (1, 0)] == 0.25 and best["m", "qzo by kernels", (1, 1)] == 0.2
    assert seconds.ratios(best) == {"m": "4.0 times at 1 x 0"}
    assert seconds.steps({"rows": rows}).rows == [
        ["m", "qzo by kernels", "0.250", "0.200"],
        ["m", "mezo-reference", "1.000", ""],
    ]
    assert not seconds.launches({"rows": rows}).rows


def test_rebuilt_weights_had_the_bits_of_the_operators_and_take_little_more_than_the_memory():
    rows = page.load(page.MEASUREMENTS / "h100-80gb.kernels.json")["rows"]
    assert all(row["status"] == "ok" and row["same_bits"] for row in rows)
    wide = [row for row in rows if row["shape"] != [4096, 4096] and row["format"] != "gptq-4-order"]
    assert all(row["rebuild_seconds"] < 1.3 * row["rebuild_limit"] for row in wide)


def test_what_is_calculated_says_so_and_a_step_by_kernels_moves_less():
    rows = page.load(page.HERE / "roofline.json")["rows"]
    of_7b = {row["way"]: row for row in rows if row["model"] == "llama2-7b" and row["seq_len"] == 32}
    plain, rebuilt = of_7b["two bf16 forward passes"], of_7b["rebuilt weights"]
    assert rebuilt["forward_launches"] == plain["launches"] + 2 * 7 * 32  # a rebuild for each layer, twice
    assert of_7b["codes"]["forward_launches"] == plain["launches"]
    assert of_7b["codes"]["forward_bytes"] < plain["bytes"] / 3 < of_7b["operators"]["bytes"] / 60
    assert rebuilt["launches"] < 3000 and of_7b["codes"]["bytes"] < 20e9
    facts = {"name": "card", "copy_bytes_a_second": 1e12, "bf16_operations_a_second": 1e15}
    table = page.calculated({"rows": rows}, facts)
    assert "Calculated, not measured" in table.notes[0] and len(table.rows) == len(rows)
