"""The learning report: what it claims follows from the record."""

import json

import pytest

from reports.studies.accuracy import page as learning

SETTINGS = {
    "method": "qzo",
    "lr": 0.1,
    "scheduler": "linear",
    "eps": 0.01,
    "relative": True,
    "clip_threshold": None,
    "update": "sgd",
    "directions": 4,
    "estimator": "one-sided",
    "centering": 0.5,
    "layers": "4-6",
}
SIGNAL = {
    "samples": 20,
    "layers": {
        f"model.layers.{n}.mlp.up_proj.scales": {"signal": 0.01 * n, "curvature": 0.5, "common": 0.2} for n in range(12)
    },
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
    text = learning.render(record, SIGNAL)
    assert "- QZO GPTQ against zero-shot GPTQ: +25.0 points (at least 25 above: reached)" in text
    assert "- QZO GPTQ against zero-shot GPTQ, calibrated: +5.0 points (above: reached)" in text
    assert "MeZO 16-bit: -4.0 points (at most 2 below, at equal forward passes: not reached)" in text
    assert "75.0 ± 1.0" in text and "74.0 75.0 76.0" in text


def test_rows_are_compared_on_the_seeds_of_both(record):
    record["entries"] = [e for e in record["entries"] if not (e["row"].startswith("MeZO") and e["seed"])]
    text = learning.render(record, SIGNAL)
    assert "MeZO 16-bit: -5.0 points, seed 0 (at most 2 below" in text
    assert "zero-shot GPTQ: +25.0 points (at least" in text


def test_settings_are_shown_as_they_were(record):
    text = learning.render(record, SIGNAL)
    assert "lr 0.1 linear, layers 4-6, 4 directions one-sided, centering 0.5, ε 0.01 relative, no clipping" in text
    assert "seeds 0, 1, 2" in text and "12.0 hours" in text and "commit 0123456789ab" in text


def test_rows_that_are_missing_are_not_judged(record):
    record["entries"] = record["entries"][:3]
    assert "points" not in learning.render(record, SIGNAL)


def test_signals_are_added_up_by_bands_of_layers(record):
    lines = [line.split("|") for line in learning.render(record, SIGNAL).splitlines() if line.startswith("| ")]
    bands = {line[1].strip(): [cell.strip() for cell in line[2:-1]] for line in lines}
    assert bands["5-9"][:4] == ["0.3500", "2.50", "1.00", "0.1400"]  # 0.05 + ... + 0.09 and five times 0.5
    assert bands["4-6"][:2] == ["0.1500", "1.50"]  # what the rows train
    assert bands["10-11"][:2] == ["0.2100", "1.00"] and bands["0-11"][:2] == ["0.6600", "6.00"]
    r, share = 0.14, 0.14 / (0.14 + 1 / 16)
    centred = 0.35 / 1.5
    best = 500 * centred * centred / (centred + 1 / 16)
    assert bands["5-9"][4:] == [f"{500 * r * share:.2f}", f"{best:.2f}", f"{share / 2.5:.3f}"]


def test_the_gain_is_the_maximum_of_the_quadratic_model():
    g2, trace, size = 0.06, 3.0, 16
    _, best, lr = learning.gain(g2, trace, size)

    def gained(rate):
        return rate * g2 - 0.5 * rate**2 * (g2 + trace / size) * trace

    assert gained(lr) == pytest.approx(best)
    assert gained(0.9 * lr) < best > gained(1.1 * lr)
    assert learning.gain(-0.1, trace, size) == (0, 0, 0)


def test_the_picture_is_a_png(record):
    assert learning.to_png(record).startswith(b"\x89PNG")


def test_main_writes_report_and_picture_beside_the_record(record, tmp_path, monkeypatch):
    (tmp_path / "record.json").write_text(json.dumps(record))
    (tmp_path / "signal.json").write_text(json.dumps(SIGNAL))
    monkeypatch.setattr(learning, "HERE", tmp_path)
    assert learning.main() == 0
    assert (tmp_path / "learning.md").read_text().startswith("# tiny on reviews")
    assert (tmp_path / "curves.png").exists()


def test_the_committed_report_is_that_of_the_committed_record():
    record, signal = (json.loads((learning.HERE / name).read_text()) for name in (learning.RECORD, learning.SIGNAL))
    assert (learning.HERE / learning.REPORT).read_text() == learning.render(record, signal)
