"""The step report: ratios within a turn, and what the committed record must show."""

import json

import pytest

from reports.studies.step import page as step


def record():
    taken = {
        "two forward passes": [1.0, 2.0, 4.0],
        "qzo": [0.9, 2.0, 2.0],
        "mezo": [2, 2, 2],
        "mezo-reference": [8] * 3,
    }
    memory = {"peak": 105, "floor": 80, "layer": 10, "activations": 10}
    environment = {"torch": "2", "transformers": "5", "python": "3", "platform": "Linux", "commit": None}
    return {
        "model": "tiny", "batch_size": 16, "seq_len": 40, "threads": 2, "bf16_instructions": False, "compiled": True,
        "environment": environment, "seconds": {"float32": taken}, "memory": memory,
    }  # fmt: skip


def test_ratios_are_medians_within_a_turn():
    taken = record()["seconds"]["float32"]
    assert step.ratio(taken, "two forward passes") == 0.9 and step.ratio(taken, "mezo-reference") == 0.25
    text = step.render([record()])
    assert "0.90" in text and "1.050 times the sum of the other three" in text and "without instructions" in text


def test_a_cpu_with_tiles_has_a_section_that_tells_who_multiplied():
    taken = {**record()["seconds"]["float32"], step.PANELS: [1.8, 4.0, 4.0]}
    tiles = record() | {"bf16_instructions": True, "tiles": True, "compiled_products": False}
    text = step.render([tiles | {"seconds": {"bfloat16": taken}}])
    assert "## A CPU with instructions for bf16 products, and tiles (AMX)" in text
    assert "multiplied by PyTorch operators, once compiled code has rebuilt them" in text
    assert "within the cache (AVX512-BF16)" in text and "0.50" in text


def test_formats_stand_beside_gptq():
    formats = {"gptq": [1.0, 2.0, 4.0], "awq": [1.1, 2.0, 3.0], "hqq-3": [2.0, 4.0, 8.0]}
    text = step.render([record() | {"formats": formats}])
    assert "| awq      |     2.000 |      1.00 |" in text and "at most 1.1 of gptq's time; not by hqq-3" in text


def test_the_committed_report_is_that_of_the_committed_record():
    committed = json.loads((step.HERE / "step.json").read_text())
    assert (step.HERE / "step.md").read_text() == step.render(committed)


def test_the_committed_measurements_keep_every_limit():
    committed = json.loads((step.HERE / "step.json").read_text())
    assert {record["bf16_instructions"] for record in committed} == {True, False}
    for record in committed:
        assert step.memory_ratio(record["memory"]) <= step.MEMORY_LIMIT
        for reference, limit in step.LIMITS.items():
            assert step.ratio(record["seconds"][step.LIMITED], reference) <= limit
        assert step.render([record]).count(": reached") == len(step.LIMITS)


def test_the_readme_tells_what_the_record_holds():
    record = json.loads((step.HERE / "step.json").read_text())[0]
    taken = record["seconds"][step.LIMITED]
    forwards, released = (f"{step.ratio(taken, reference):.2f}" for reference in step.LIMITS)
    readme = " ".join((step.HERE.parents[2] / "README.md").read_text().split())
    assert f"{forwards} of two forward passes of the 16-bit model and {released} of a MeZO step as released" in readme
    assert step.ratio(taken, step.OPERATORS) == pytest.approx(1 / 1.25, abs=0.05)  # "a quarter longer"
    to = sorted(step.to_same(record["formats"]).values())
    assert f"Formats take {to[0]:.2f} to {to[-1]:.2f} of the time of GPTQ" in readme


def test_a_limit_that_is_missed_is_told():
    slow = record() | {"bf16_instructions": True}
    slow["seconds"] = {step.LIMITED: {**slow["seconds"]["float32"], "qzo": [3.0, 3.0, 3.0]}}
    assert step.render([slow]).count("not reached") == 2
