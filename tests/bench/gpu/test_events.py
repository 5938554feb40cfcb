"""The simulated step beside what a real allocator did, phase by phase (reports/measurements, measured on an H100)."""

import json
from itertools import accumulate
from pathlib import Path

import pytest

from bench.cases.case import BenchCase
from bench.cases.recipes.table import BARE
from bench.gpu import events

FILES = sorted((Path(__file__).parents[3] / "reports" / "measurements").glob("*.events.json"))
CASES = [
    pytest.param(path, cell, id=f"{path.name.split('.')[0]}-{cell['model']}-{cell['method']}")
    for path in FILES
    for cell in json.loads(path.read_text())["cells"]
    if cell.get("allocator")
]
GRANULARITY = 512
# opt-125m: for the small rises of a forward without gradients, and of one in fp32, the attention kernel counts
# qzo: its two losses stay on the GPU until both are read, since the streams were measured
TOLERANCE = {"mezo": 80 << 10, "qlora": 13 << 10, "qzo": 2 * GRANULARITY}


def rise(sizes):
    """How far the phase's allocations rise above its start, and where they end."""
    rounded = [-(-abs(size) // GRANULARITY) * GRANULARITY * (1 if size > 0 else -1) for size in sizes]
    levels = list(accumulate(rounded, initial=0))
    return max(levels), levels[-1]


@pytest.mark.parametrize(("path", "cell"), CASES)
def test_every_phase_rises_as_far_as_on_the_gpu(path, cell):
    bare = None if "dtype" in cell else BARE.get(cell["method"])  # measured before these methods had autocast
    case = BenchCase(cell["model"], cell["method"], gpu=path.name.split(".")[0], seq_len=512, recipe=bare)
    simulated, measured = events.simulated(case), cell["allocator"]
    assert [phase for phase, _ in simulated] == [phase for phase, _ in measured]
    for (phase, ours), (_, theirs) in zip(simulated, measured, strict=True):
        allowed = TOLERANCE.get(cell["method"], 0)
        for found, expected in zip(rise(ours), rise(theirs), strict=True):
            assert found == pytest.approx(expected, abs=allowed), phase


def test_there_are_measured_streams():
    assert len(CASES) >= 6
