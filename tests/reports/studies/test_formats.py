"""The report of all formats: what it says of a record, and that the committed one is what its record gives."""

import json
from pathlib import Path

from reports.studies.formats import page as formats

SETTINGS = {
    "steps": 24, "directions": 8, "batch_size": 16, "lr": 0.15, "eps": 0.01, "clip_threshold": 1.0,
    "first_layer": 15, "last_layer": 21, "examples": 200, "seed": 0,
}  # fmt: skip
MACHINE = {"platform": "Linux", "torch": "2.13", "transformers": "5.23", "python": "3.11", "threads": 1}


def entry(name: str, nbytes: int, before: float, after: float) -> dict:
    scores = {"before": {"accuracy": before, "loss": 1.0}, "after": {"accuracy": after, "loss": 0.5}}
    measured = {"weights": 1000, "quantized_bytes": nbytes, "scales": 12345, "step_seconds": 4.125}
    return {"format": name, **measured, "peak_allocated_bytes": 3 << 20, **scores, "environment": MACHINE}


RECORD = {
    "model": "smollm2-135m",
    "task": "rotten-tomatoes",
    "settings": SETTINGS,
    "entries": [
        {**entry("gguf file", 700, 0.5, 0.7), "read back": {"accuracy": 0.695, "loss": 0.501}},
        entry("nf4", 562, 0.5, 0.755),
        entry("hqq-2", 312, 0.48, 0.5),
        {"format": "torchao-int8", "missing": "this needs the library torchao"},
    ],
}


def test_a_line_tells_bytes_a_weight_scales_seconds_peak_and_both_accuracies():
    lines = formats.render(RECORD).splitlines()
    cells = [cell.strip() for cell in next(line for line in lines if line.startswith("| nf4")).split("|")[1:-1]]
    assert cells == ["nf4", "0.562", "12,345", "4.12", "3.0", "50.0", "75.5"]
    assert sum(line.startswith("| torchao") for line in lines) == 0
    assert "- not run: torchao-int8, this needs the library torchao" in lines


def test_a_file_that_was_read_back_tells_both_accuracies():
    lines = [line for line in formats.render(RECORD).splitlines() if "dequantizes it" in line]
    assert len(lines) == 1 and "69.5 % with loss 0.5010; packed, as it was trained: 70.0 % with loss 0.5000" in lines[0]


def test_steps_examples_and_machine_are_told():
    text = formats.render(RECORD)
    assert "QZO: 24 steps of 8 one-sided directions on batches of 16, the scales of layers 15 to 21" in text
    assert "Accuracy on 200 test examples: about 3.1 points of standard error each" in text
    assert "Machine: Linux, 1 thread, torch 2.13, transformers 5.23, python 3.11" in text


def test_the_readme_gets_the_table_between_its_markers_and_nothing_else_changes():
    readme = f"before\n{formats.BEGIN}old\n{formats.END}\nafter\n"
    new = formats.renewed(readme, RECORD)
    assert new.startswith(f"before\n{formats.BEGIN}\n| format") and new.endswith(f"\n\n{formats.END}\nafter\n")
    assert "old" not in new and "| nf4 " in new and formats.renewed(new, RECORD) == new


def test_the_committed_report_and_readme_are_what_the_record_gives():
    here = Path(formats.__file__).parent
    record = here / formats.RECORD
    assert record.exists() == (here / formats.REPORT).exists()
    if record.exists():
        content = json.loads(record.read_text(encoding="utf-8"))
        assert (here / formats.REPORT).read_text(encoding="utf-8") == formats.render(content)
        readme = (here.parents[2] / "README.md").read_text(encoding="utf-8")
        assert formats.renewed(readme, content) == readme
