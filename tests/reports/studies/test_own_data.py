"""The page on own data: what it says of a record."""

from reports.studies.own_data import page

ENTRY = {
    "data": "snippets.csv",
    "settings": {"layers": "15-21", "batch_size": 16, "lr": 0.2, "eps": 0.05},
    "before": {"loss": 0.75, "accuracy": 0.5, "count": 40},
    "after": {"loss": 0.25, "accuracy": 0.9, "count": 40},
    "best_step": 180, "steps": 200, "forwards": 1600, "killed_at": 100, "cpu_seconds": 900.0, "wall_seconds": 1800.0,
    "answers": {
        "places": 100, "same": 98, "margin": 0.21, "answers": 8, "alike": 8, "texts": ["good |\nfilm", "bad"],
    },
    "environment": {"platform": "Linux", "torch": "2.13", "transformers": "5.23", "python": "3.11", "threads": 1},
}  # fmt: skip
TEXT = {**ENTRY, "before": {"loss": 4.5, "count": 21}, "after": {"loss": 4.25, "count": 21}}
TEXT |= {"answers": {**ENTRY["answers"], "same": 100, "margin": 0.0}}


def test_a_line_tells_a_kind_before_and_after_and_what_llamacpp_says_of_it():
    text = page.render({"model": "smollm2-135m", "rows": 400, "entries": {"classes": ENTRY, "text": TEXT}})
    cells = [
        [cell.strip() for cell in line.split(" | ")] for line in text.splitlines() if line.startswith(("| c", "| t"))
    ]
    chosen = "layers 15-21, 16 rows, lr 0.2, eps 0.05"
    assert cells[0][1:] == ["0.750", "0.250", "0.500", "0.900", "180 of 200", chosen, "1,600", "15", "30 |"]
    assert cells[1][1:5] == ["4.500", "4.250", "", ""]
    assert cells[2][1:4] == ["98 of 100", "0.21", "8 of 8"] and "good \\| film" in text
    assert cells[3][1:3] == ["100 of 100", ""] and "by hand" not in text.partition("\n")[2]
    trial = page.render({"model": "smollm2-135m", "rows": 400, "entries": {"classes": {**ENTRY, "trial": True}}})
    assert "the number of steps was given by hand" in trial
