"""The page on a reward: what it says of a record, and that the committed one is what its record gives."""

import json
from pathlib import Path

from reports.studies.reward import page

SETTINGS = {
    "steps": 4, "directions": 8, "estimator": "population", "batch_size": 24, "layers": "15-29", "eps": 0.05,
    "lr": 4e-3, "scheduler": "linear",
}  # fmt: skip
MACHINE = {"platform": "Linux", "torch": "2.13", "transformers": "5.23", "python": "3.11", "threads": 1}


def entry(seed, before, after):
    def scores(value):
        answers = [["Can dogs swim?", "The dog |\nswims"]]
        return {"reward": value, "greedy_reward": value / 2, "spread": 0.4, "count": 16, "answers": answers}

    curve = [{"step": step, "reward": 0.1 * step} for step in (0, 2, 4)]
    measured = {"curve": curve, "losses": [-0.1, -0.2, None, -0.4], "best_step": 4, "seconds": 90.0}
    return {
        "seed": seed, "settings": SETTINGS, "before": scores(before), "after": scores(after), **measured,
        "environment": MACHINE,
    }  # fmt: skip


RECORD = {
    "model": "smollm2-135m", "system": "Be.", "rows": 192, "sizes": {"validation": 24, "test": 16},
    "ways": {"temperature": 1.0, "max_new_tokens": 2, "generations": 1},
    "entries": [entry(0, 0.2, 0.9), entry(1, 0.1, 0.7)],
}  # fmt: skip


def test_a_line_tells_a_seed_before_and_after_and_the_last_one_their_mean():
    lines = page.render(RECORD).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith(("| 0", "| mean"))]
    assert cells[0] == ["0", "0.200", "0.900", "0.100", "0.450", "4", "1.5"]
    assert cells[1] == ["mean", "0.150", "0.800", "0.075", "0.400", "", ""]
    assert any("| Can dogs swim?" in line and "The dog \\| swims" in line for line in lines)
    assert any("about 0.10" in line for line in lines) and "4 steps of 8 directions" in page.render(RECORD)
    assert page.to_png(RECORD).startswith(b"\x89PNG")


def test_the_committed_page_is_what_its_record_gives():
    here = Path(page.__file__).parent
    record = json.loads((here / page.RECORD).read_text(encoding="utf-8"))
    assert (here / page.REPORT).read_text(encoding="utf-8") == page.render(record)
