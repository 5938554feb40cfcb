"""Killed at a file operation: nothing half made is left, and what goes on ends as if it had never been killed.

Here at a few of the operations of each work; at every one in tests/attack/attack_crash_points.py.
"""

import sys

import pytest
from crash_works import works
from crashes import alive, kill_at, operations, sample

MOST = 4  # operations a work


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    before = sys.modules.get("qzo.tasks")
    yield works(tmp_path_factory.mktemp("works"))
    if before is not None:
        sys.modules["qzo.tasks"] = before
    else:
        del sys.modules["qzo.tasks"]


@pytest.mark.parametrize(
    "name", ["train", "train from a run", "first order", "journal", "export", "quantize", "replay"]
)
def test_a_work_killed_at_a_file_operation_comes_to_the_same_end(made, tmp_path, name):
    work = made[name]
    (whole := tmp_path / "whole").mkdir()
    names = operations(whole, lambda: work.begin(whole))
    wanted = work.result(whole)
    assert len(names) > 8 and wanted
    for number in sample(names, MOST):
        (place := tmp_path / f"killed-{number}").mkdir()
        assert kill_at(place, number, lambda: work.begin(place)), names[number]
        left = work.result(place) if work.whole else None
        assert left in (None, wanted), names[number]  # whole or nothing
        if left is None:
            code, text = alive(lambda: work.go_on(place))
            assert code == 0, (names[number], text)
        assert work.result(place) == wanted, names[number]
        assert not [path for path in place.rglob(".*") if "tensorboard" not in str(path)] or left, names[number]
