"""The learning report: what it claims follows from the record."""

import json

import pytest

from reports import learning

SETTINGS = {
    "method": "qzo",
    "lr": 0.1,
    "scheduler": "linear",
    "eps": 0.01,
    "relative": True,
    "clip_threshold": None,
    "update": "sgd",
    "directions": 4,
    "layers": "14-24",
}
ENVIRONMENT = {"torch": "2.13", "platform": "Linux", "commit": "0123456789abcdef"}


def entry(row, seed, accuracy, settings=None):
    curve = [
        {"step": 0, "accuracy": 0.5, "validation_loss": 0.7},
        {"step": 10, "loss": 0.6},
        {"step": 10, "accuracy": accuracy, "validation_loss": 0.6},
    ]
    trained = {"curve": curve, "steps": 10, "forward_passes": 80} if settings else {"curve": [], "forward_passes": 0}
    test = {"accuracy": accuracy, "loss": 0.5}
    return {"row": row, "seed": seed, "settings": settings, "test": test, "seconds": 3600, **trained} | {
        "environment": ENVIRONMENT
    }


@pytest.fixture
def record():
    entries = [
        *(entry("zero-shot GPTQ", seed, 0.5) for seed in range(3)),
        *(entry("zero-shot GPTQ, calibrated", seed, 0.7) for seed in range(3)),
        *(entry("MeZO 16-bit", seed, 0.79, SETTINGS | {"method": "mezo", "relative": False}) for seed in range(3)),
        *(entry("QZO GPTQ", seed, 0.74 + 0.01 * seed, SETTINGS) for seed in range(3)),
    ]
    return {"model": "tiny", "task": "reviews", "group_size": 32, "entries": entries}


def test_each_claim_is_judged_by_the_mean_of_the_seeds(record):
    text = learning.render(record)
    assert "- QZO GPTQ against zero-shot GPTQ: +25.0 points (at least 25 above: reached)" in text
    assert "- QZO GPTQ against zero-shot GPTQ, calibrated: +5.0 points (above: reached)" in text
    assert "MeZO 16-bit: -4.0 points (at most 2 below, at equal forward passes: not reached)" in text
    assert "75.0 ± 1.0" in text and "74.0 75.0 76.0" in text


def test_settings_are_shown_as_they_were(record):
    text = learning.render(record)
    assert "lr 0.1 linear, layers 14-24, 4 directions, ε 0.01 relative, no clipping" in text
    assert "seeds 0, 1, 2" in text and "12.0 hours" in text and "commit 0123456789ab" in text


def test_rows_that_are_missing_are_not_judged(record):
    record["entries"] = record["entries"][:3]
    assert "points" not in learning.render(record)


def test_the_picture_is_a_png(record):
    assert learning.to_png(record).startswith(b"\x89PNG")


def test_main_writes_report_and_picture_beside_the_record(record, tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text(json.dumps(record))
    monkeypatch.setattr(learning, "HERE", tmp_path)
    assert learning.main() == 0
    assert (tmp_path / "learning.md").read_text().startswith("# tiny on reviews")
    assert (tmp_path / "curves.png").exists()


def test_the_committed_report_is_that_of_the_committed_record():
    committed = json.loads((learning.HERE / learning.RECORD).read_text())
    assert (learning.HERE / learning.REPORT).read_text() == learning.render(committed)
