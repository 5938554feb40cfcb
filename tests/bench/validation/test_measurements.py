"""Predictions stay as good as they are: measurement files predicted again, with thresholds at the level reached.

Files: those committed under reports/measurements, those that QZO_MEASUREMENTS names, and the T4 rows where they lie
beside the checkout (they are others' and no part of the repository).
"""

import os
from pathlib import Path

import pytest

from bench.validation.compare import error_statistics, predict_all, verdicts
from bench.validation.measurement import read_rows

ROOT = Path(__file__).parents[3]
T4 = ROOT.parent / "shared" / "measurements" / "t4_lora.jsonl"
# metric -> mean and worst absolute error in percent
REACHED = {"allocated": (0.1, 0.5), "reserved": (1.0, 5.0), "process": (1.0, 5.0), "forward": (0.15, 0.6)}
REACHED |= {"backward": (0.1, 0.5), "step": (0.2, 0.7)}
ASKED = {"allocated": (1.0, 3.0), "reserved": (4.0, 12.0), "process": (4.0, 12.0)}


def files() -> list[Path]:
    named = [Path(item) for item in os.environ.get("QZO_MEASUREMENTS", "").split(os.pathsep) if item]
    return [*sorted((ROOT / "reports" / "measurements").glob("*.jsonl")), *named]


def check(path: Path, limits: dict[str, tuple[float, float]]) -> None:
    pytest.importorskip("bitsandbytes")  # of QLoRA, which every file has
    results = predict_all(read_rows(path))
    assert [result["message"] for result in results if result["status"] != "ok"] == []
    found = error_statistics(results)
    far = {
        name: found[name]
        for name, (mean, worst) in limits.items()
        if name in found and (found[name]["mean_abs_percent"] > mean or found[name]["worst_abs_percent"] > worst)
    }
    assert far == {}
    assert verdicts(results)["wrong"] == 0


@pytest.mark.skipif(not T4.exists(), reason="the T4 measurements of others are not beside this checkout")
def test_the_t4_rows_are_predicted_as_well_as_before():
    check(T4, REACHED)


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in files()])
def test_a_measurement_file_is_predicted_within_what_was_asked(path):
    check(path, ASKED)
